"""ViTs with prompts, heads and memories: where they start, what trains, and what a round trip keeps."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from stages.vit_memory.models import HeadedViT, LinearProbeViT, MemoryAugmentedViT, VPTDeep, VPTShallow

DIM, BLOCKS, CLASSES = 32, 3, 5
POSITIONS = ["after_attn", "after_ffn"]
MODES = ["associative", "class_prototype", "metric"]


def vit():
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": DIM, "depth": BLOCKS, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **shape)


def images(count=6):
    return torch.randn(count, 3, 32, 32), torch.arange(count) % CLASSES


def remembering(mode, position, **options):
    options = {"num_classes": CLASSES, "mem_size": 20, "hopfield_position": position, "memory_mode": mode} | options
    return MemoryAugmentedViT(vit(), **options)


def trainable(model):
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_at_step_0_a_memory_leaves_the_backbone_bit_equal_and_its_gate_can_learn(mode, position):
    model, (x, labels) = remembering(mode, position, memory_blocks=(1, -1)), images()
    plain = HeadedViT(vit(), CLASSES)
    plain.head.load_state_dict(model.head.state_dict())
    assert torch.equal(model(x), plain(x))
    model.memorise(x, labels)
    assert torch.equal(model(x), plain(x))
    cross_entropy(model(x), labels).backward()
    for block in model.memory_blocks:
        assert block.gate.grad.abs().max() > 0
        with torch.no_grad():
            block.gate -= 0.5
    assert not torch.equal(model(x), plain(x))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip_is_strict_and_complete(mode, position):
    model, (x, labels) = remembering(mode, position), images()
    model.memorise(x, labels)
    torch.nn.init.normal_(model.memory_blocks[0].gate)
    copy = remembering(mode, position)
    shapes = {name: tensor.shape for name, tensor in copy.state_dict().items()}
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), copy(x))
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_predictions_change_no_buffer_and_do_not_depend_on_the_batch():
    model, (x, labels) = remembering("associative", "after_attn"), images(8)
    model.memorise(x, labels)
    torch.nn.init.normal_(model.memory_blocks[0].gate)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    together, order = model(x), torch.randperm(8)
    torch.testing.assert_close(model(x[order]), together[order])
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), together, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_forgotten_class_is_as_if_it_had_never_been_memorised():
    x, labels = images(10)
    model, never = (remembering("metric", "after_ffn", memory_blocks=(0, 2)) for _ in range(2))
    never.load_state_dict(model.state_dict())
    model.memorise(x, labels)
    model.forget(3)
    never.memorise(x[labels != 3], labels[labels != 3])
    # features of 10 images and of 9 are rounded otherwise
    for a, b in zip(model.buffers(), never.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_exactly_the_named_parameters_train():
    head = {"head.weight": DIM * CLASSES, "head.bias": CLASSES}
    assert trainable(LinearProbeViT(vit(), num_classes=CLASSES)) == head
    assert trainable(VPTShallow(vit(), num_classes=CLASSES)) == {"prompts": 10 * DIM, **head}
    assert trainable(VPTDeep(vit(), num_classes=CLASSES)) == {"prompts": BLOCKS * 10 * DIM, **head}
    gate = {f"vit.blocks.2.{name}": size for name, size in (("gate", DIM), ("out.weight", DIM**2))}
    assert trainable(remembering("associative", "after_attn")) == gate | head


def test_a_frozen_backbone_never_drops_anything_and_one_that_trains_does():
    for freeze in (True, False):
        model = HeadedViT(vit(), CLASSES, freeze_backbone=freeze).train()
        assert model.training
        assert model.vit.training != freeze
        assert model.vit.blocks[0].attn.training != freeze
        assert not model.eval().vit.training


@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_prompts_are_drawn_as_xavier_would_draw_the_patch_embedding(kind):
    prompts = kind(vit(), num_classes=CLASSES, num_prompts=200).prompts
    limit = (6 / (3 * 8 * 8 + DIM)) ** 0.5
    assert 0.98 * limit < prompts.abs().max() <= limit
    assert prompts.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


def test_parameter_counts_of_vit_base():
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=0)
        models = [kind(copy.deepcopy(base)) for kind in (LinearProbeViT, VPTShallow, VPTDeep)]
    assert [sum(trainable(model).values()) for model in models] == [7690, 15370, 99850]


def test_without_freezing_everything_trains():
    model = remembering("associative", "after_attn", freeze_backbone=False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_no_prompts_are_the_backbone(kind):
    x, _ = images()
    model, plain = kind(vit(), num_classes=CLASSES, num_prompts=0), HeadedViT(vit(), CLASSES)
    plain.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_prompts_matter_and_the_backbone_gets_no_gradient(kind):
    x, labels = images()
    model = kind(vit(), num_classes=CLASSES)
    cross_entropy(model(x), labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {"prompts", "head.weight", "head.bias"}
    each = gradients["prompts"].view(-1, 10, DIM).abs().sum((1, 2))
    assert (each > 0).all()


def test_deep_prompts_of_the_first_block_alone_are_shallow_ones_where_there_is_one_block():
    x, _ = images()
    one = vit()
    one.blocks = one.blocks[:1]
    shallow, deep = VPTShallow(one, num_classes=CLASSES), VPTDeep(one, num_classes=CLASSES)
    deep.head.load_state_dict(shallow.head.state_dict())
    with torch.no_grad():
        deep.prompts[0] = shallow.prompts
    torch.testing.assert_close(deep(x), shallow(x))


@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_other_prompts_of_the_same_kind_give_other_outputs_in_each_block(kind):
    x, _ = images()
    model = kind(vit(), num_classes=CLASSES)
    before = model(x)
    for block in model.prompts if kind is VPTDeep else [model.prompts]:
        with torch.no_grad():
            kept = block.clone()
            block.normal_()
        assert not torch.allclose(model(x), before, atol=1e-3)
        with torch.no_grad():
            block.copy_(kept)
        assert torch.equal(model(x), before)


def pooled(name):
    """A ViT of a kind that timm pools in another way than by a class token."""
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": DIM, "depth": BLOCKS, "num_heads": 4}
    return timm.create_model(name, img_size=32, num_classes=CLASSES, **shape)


POOLED = ["vit_medium_patch16_gap_240", "vit_little_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"]


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("make", [HeadedViT, LinearProbeViT, VPTShallow, VPTDeep, MemoryAugmentedViT])
def test_a_vit_without_class_token_is_read_as_timm_reads_it(name, make):
    x, _ = images()
    original = pooled(name).eval()
    options = {"num_prompts": 0} if make in (VPTShallow, VPTDeep) else {}
    model = make(copy.deepcopy(original), num_classes=CLASSES, **options).eval()
    model.head.load_state_dict(original.head.state_dict())
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("name", POOLED)
def test_without_class_token_a_memory_holds_means_of_patches(name):
    x, labels = images()
    model = MemoryAugmentedViT(pooled(name), num_classes=CLASSES, mem_size=20).eval()
    model.memorise(x, labels)
    (block,) = model.memory_blocks
    tokens = model.embed(x)
    for earlier in model.vit.blocks[:-1]:
        tokens = earlier(tokens)
    site = block.site(tokens)[:, model.vit.num_prefix_tokens :]
    assert site.shape[1] == 16
    torch.testing.assert_close(block.memory.values[: len(x)], site.mean(1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        block.gate += 0.5
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_prompts_stand_beside_patches_and_never_in_what_is_read(name, kind):
    model = kind(pooled(name), num_classes=CLASSES, num_prompts=3)
    first = model.vit.num_prefix_tokens
    tokens = torch.randn(2, first + 16, DIM)
    prompts = model.prompts if kind is VPTShallow else model.prompts[0]
    both = model.prompted(tokens, prompts)
    assert torch.equal(both[:, first : first + 3], prompts.expand(2, -1, -1))
    assert torch.equal(both[:, first + 3 :], tokens[:, first:])
    assert torch.equal(model.unprompted(both), tokens)


def test_a_vit_that_pools_nothing_is_an_error():
    shape = {"patch_size": 8, "embed_dim": DIM, "depth": BLOCKS, "num_heads": 4, "class_token": False}
    unpooled = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool="", **shape)
    with pytest.raises(ValueError, match="expected a class token, or global_pool='avg'"):
        LinearProbeViT(unpooled)


def test_blocks_that_add_in_another_order_are_an_error():
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    other = VisionTransformer(img_size=32, patch_size=8, embed_dim=DIM, depth=2, num_heads=4, block_fn=ResPostBlock)
    with pytest.raises(ValueError, match=r"expected timm's Block, .* got ResPostBlock"):
        MemoryAugmentedViT(other, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_mode": "prototype"},
            "memory_mode: expected one of associative, class_prototype, metric, got 'prototype'",
        ),
        (
            {"hopfield_position": "after_mlp"},
            "hopfield_position: expected one of after_attn, after_ffn, got 'after_mlp'",
        ),
        ({"memory_blocks": (3,)}, r"memory_blocks: expected one or more blocks of -3 to 2, each once, got \(3,\)"),
        ({"memory_blocks": (-1, 2)}, r"each once, got \(-1, 2\)"),
        ({"memory_blocks": ()}, r"got \(\)"),
        ({"num_classes": 0}, "num_classes: expected 1 or more, got 0"),
        ({"mem_size": 0}, "size: expected 1 or more, got 0"),
        ({"beta": -1.0}, "beta: expected a number above 0, got -1.0"),
    ],
)
def test_a_memory_of_a_kind_that_is_not_there_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryAugmentedViT(vit(), **{"num_classes": CLASSES} | options)


def test_nothing_is_done_to_a_vit_that_is_given_with_a_mistake():
    given = vit()
    with pytest.raises(ValueError, match="hopfield_position"):
        MemoryAugmentedViT(given, hopfield_position="after_mlp", memory_mode="associative")
    assert all(p.requires_grad for p in given.parameters())
    assert not [block for block in given.blocks if hasattr(block, "memory")]


@pytest.mark.parametrize("name", ["weights.pt", "weights.ckpt", Path("somewhere/weights"), 7])
def test_what_is_no_backbone_is_an_error(name):
    with pytest.raises(ValueError, match=r"backbone_name: expected a model's name, a .safetensors file"):
        LinearProbeViT(name)
    with pytest.raises(ValueError, match="got an object of ResNet"):
        LinearProbeViT(timm.create_model("resnet18", num_classes=0))


@pytest.mark.parametrize("kind", [LinearProbeViT, VPTShallow, VPTDeep, MemoryAugmentedViT])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 3, 16, 16),
        torch.zeros(3, 32, 32),
    ],
)
def test_images_that_a_backbone_does_not_read_are_an_error(kind, x):
    with pytest.raises(ValueError, match=r"x: expected float images \[n, 3, 32, 32\].* got torch"):
        kind(vit(), num_classes=CLASSES)(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [[0, 1, 5], [0, -1, 2], [0.0, 1.0, 2.0], [0, 1]])
def test_labels_that_are_none_of_the_classes_are_an_error(mode, labels):
    model, (x, _) = remembering(mode, "after_attn"), images(3)
    with pytest.raises(ValueError, match="labels: expected"):
        model.memorise(x, torch.tensor(labels))
    for label in (-1, CLASSES):
        with pytest.raises(ValueError, match=f"label: expected 0 to {CLASSES - 1}, got {label}"):
            model.forget(label)
    assert all(buffer.abs().max() <= 1 for name, buffer in model.named_buffers() if "labels" in name)
