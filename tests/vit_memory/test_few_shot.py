"""Ways to classify from a few images: each learns from its view of the support images alone, and none is told the queries' labels."""

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.functional import cosine_similarity

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.metrics import accuracy
from stages.common.randomness import generator
from stages.vit_memory.classifiers import RanPAC, Whitening, linear_probe, memory_log_probabilities
from stages.vit_memory.few_shot import (
    FROZEN,
    METHODS,
    THROUGH,
    Examples,
    Settings,
    Training,
    memory_heads,
    train_through,
)
from stages.vit_memory.models import MemoryAugmentedViT, VPTShallow

CLASSES, SIDE, DIM = 3, 16, 8
VIEWS = {"pixels": "images", "random_vit": "random_x"} | dict.fromkeys(THROUGH, "images")  # else x


def examples(count, seed=0):
    """Images whose class each view shows."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    patterns = torch.zeros(CLASSES, 1, SIDE, SIDE)
    for c in range(CLASSES):
        patterns[c, :, 5 * c : 5 * c + 4] = 200
    images = (patterns[labels] + 50 * torch.rand(count, 1, SIDE, SIDE, generator=random)).byte()
    x, random_x = (4 * torch.eye(CLASSES, DIM)[labels] + torch.randn(count, DIM, generator=random) for _ in range(2))
    return Examples(images, x, random_x, labels, CLASSES, 11)


def settings():
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=0, **shape)
    backbone = Backbone(vit, BackboneConfig("small", False, SIDE, None), "", {})
    training = Training(backbone, num_prompts=2, beta=16.0, steps=30, batch_size=12, learning_rate=0.01)
    base = torch.arange(400) % 10
    whiten = Whitening(torch.randn(10, DIM)[base] + torch.randn(400, DIM), base)
    return Settings(0.01, whiten, (8.0, 1.0), 200, 1.0, 0.1, 100, training)


SUPPORT, QUERIES = examples(15), examples(60, seed=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_right_where_classes_are_apart_and_reads_no_label_of_a_query(name):
    logits = METHODS[name](SUPPORT, QUERIES, settings())
    assert logits.shape == (60, CLASSES)
    assert not logits.requires_grad
    assert accuracy(logits, QUERIES.labels) > 0.85
    wrong = replace(QUERIES, labels=(QUERIES.labels + 1) % CLASSES)
    assert torch.equal(METHODS[name](SUPPORT, wrong, settings()), logits)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_one_view_of_the_images(name):
    logits = METHODS[name](SUPPORT, QUERIES, settings())
    read = VIEWS.get(name, "x")
    other = examples(15, seed=7), examples(60, seed=8)
    for view in ("images", "x", "random_x"):
        changed = [
            replace(given, **{view: getattr(fresh, view)})
            for given, fresh in zip((SUPPORT, QUERIES), other, strict=True)
        ]
        assert torch.equal(METHODS[name](*changed, settings()), logits) == (view != read), view


@pytest.mark.parametrize("name", METHODS)
def test_each_query_is_answered_alone(name):
    both = METHODS[name](SUPPORT, QUERIES, settings())
    views = {view: getattr(QUERIES, view)[:5] for view in ("images", "x", "random_x", "labels")}
    few = METHODS[name](SUPPORT, replace(QUERIES, **views), settings())
    torch.testing.assert_close(few, both[:5], rtol=1e-4, atol=1e-4)


def test_the_memory_head_without_weight_is_the_whitened_probe():
    without = replace(settings(), strength=(8.0, 0.0))
    head, probe = (FROZEN[name](SUPPORT, QUERIES, without) for name in ("memory_head", "whitened_linear_probe"))
    torch.testing.assert_close(head, probe)
    assert not torch.allclose(FROZEN["memory_head"](SUPPORT, QUERIES, settings()), probe)


def test_the_nearest_mean_is_by_cosine_from_the_mean_of_the_means():
    logits = FROZEN["nearest_mean"](SUPPORT, QUERIES, settings())
    means = torch.stack([SUPPORT.x[SUPPORT.labels == c].mean(0) for c in range(CLASSES)])
    origin = means.mean(0)
    expected = cosine_similarity((QUERIES.x - origin)[:, None], (means - origin)[None], dim=2)
    torch.testing.assert_close(logits, expected)


def test_the_plain_probe_takes_the_steps_and_the_rate_it_is_told():
    known = replace(settings(), plain_steps=0)
    first = FROZEN["plain_linear_probe"](SUPPORT, QUERIES, known)
    assert torch.equal(first, FROZEN["plain_linear_probe"](SUPPORT, QUERIES, replace(known, plain_learning_rate=9.0)))
    one = FROZEN["plain_linear_probe"](SUPPORT, QUERIES, replace(known, plain_steps=1, plain_learning_rate=1e-4))
    step = (one - first).abs().max()
    assert 0 < step < 1e-4 * (1 + QUERIES.x.abs().sum(1).max())  # Adam's first step is the rate


def test_training_through_the_backbone_leaves_it_as_it_was_and_is_the_same_again():
    told = settings().training
    before = {name: p.clone() for name, p in told.backbone.vit.named_parameters()}

    def build(vit):
        return VPTShallow(vit, num_classes=CLASSES, num_prompts=2)

    one, again = (train_through(build, SUPPORT, told) for _ in range(2))
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in one.state_dict().items())
    assert all(torch.equal(p, before[name]) for name, p in told.backbone.vit.named_parameters())
    assert not one.training
    start = train_through(build, SUPPORT, replace(told, steps=0))
    assert not torch.equal(start.prompts, one.prompts)
    other = train_through(build, replace(SUPPORT, seed=12), replace(told, steps=0))
    assert not torch.equal(start.prompts, other.prompts)


def test_a_memory_in_a_block_holds_the_support_images():
    told = replace(settings().training, steps=1)

    def build(vit):
        return MemoryAugmentedViT(vit, num_classes=CLASSES, mem_size=15, beta=told.beta)

    (block,) = train_through(build, SUPPORT, told).memory_blocks
    held = block.memory.labels[block.memory.writes > 0]
    assert set(held.tolist()) == {0, 1, 2}
    assert block.gate.abs().max() > 0  # one step has opened it


READ = {  # by the method, another value than `settings` has
    "linear_probe": {"decay": 0.5},
    "plain_linear_probe": {"plain_steps": 50, "plain_learning_rate": 0.01},
    "whitened_linear_probe": {"decay": 0.5},
    "memory_head": {"decay": 0.5, "strength": (2.0, 1.0)},
    "ranpac": {"random_features": 20, "ridge": 100.0},
    "random_vit": {"decay": 0.5},
    "pixels": {"decay": 0.5},
    "vpt_deep": {"num_prompts": 3, "steps": 3, "batch_size": 2, "learning_rate": 0.1},
    "vpt_shallow": {"num_prompts": 3, "steps": 3, "batch_size": 2, "learning_rate": 0.1},
    "memory_block": {"beta": 2.0, "steps": 3, "batch_size": 2, "learning_rate": 0.1},
}


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, values in READ.items() for setting in values])
def test_each_setting_of_a_method_counts(name, setting):
    told, value = settings(), READ[name][setting]
    told = replace(told, training=replace(told.training, steps=5))
    if hasattr(told, setting):
        other = replace(told, **{setting: value})
    else:
        other = replace(told, training=replace(told.training, **{setting: value}))
    assert not torch.equal(METHODS[name](SUPPORT, QUERIES, told), METHODS[name](SUPPORT, QUERIES, other))


def test_the_memory_head_adds_log_probabilities_for_each_strength():
    told, strengths = settings(), [(2.0, 0.5), (8.0, 0.0), (8.0, 3.0)]
    keys, x = told.whiten(SUPPORT.x), told.whiten(QUERIES.x)
    probe = linear_probe(keys, SUPPORT.labels, x, CLASSES, told.decay).log_softmax(1)
    heads = memory_heads(SUPPORT, QUERIES, told.whiten, told.decay, strengths)
    for head, (beta, weight) in zip(heads, strengths, strict=True):
        memory = memory_log_probabilities(keys, SUPPORT.labels, x, CLASSES, beta)
        torch.testing.assert_close(head, probe + weight * memory)


def test_ranpac_has_random_features_of_the_episodes_seed():
    told = settings()
    head = RanPAC(DIM, told.random_features, CLASSES, generator(SUPPORT.seed, "RanPAC"))
    head.write(SUPPORT.x, SUPPORT.labels)
    assert torch.equal(METHODS["ranpac"](SUPPORT, QUERIES, told), head.scores(QUERIES.x, told.ridge))
