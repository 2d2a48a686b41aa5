"""ViTs with prompts, heads and memories: where they start, what trains, and what a round trip keeps."""

import copy

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
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), never.buffers(), strict=True))


def test_exactly_the_named_parameters_train():
    head = {"head.weight": DIM * CLASSES, "head.bias": CLASSES}
    assert trainable(LinearProbeViT(vit(), num_classes=CLASSES)) == head
    assert trainable(VPTShallow(vit(), num_classes=CLASSES)) == {"prompts": 10 * DIM, **head}
    assert trainable(VPTDeep(vit(), num_classes=CLASSES)) == {"prompts": BLOCKS * 10 * DIM, **head}
    gate = {f"vit.blocks.2.{name}": size for name, size in (("gate", DIM), ("out.weight", DIM**2))}
    assert trainable(remembering("associative", "after_attn")) == gate | head


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
