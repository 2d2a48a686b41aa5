"""A stack trains and runs like each network alone, on images of its own pool."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_vit import CLASSES, TEST, TRAIN, autoencoder, base_of
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stages.common.optim import warmup_cosine
from stages.common.vectors import Layout
from stages.recall.fine_tunes import FineTune, Recipe, draw_fine_tune
from stages.recall.fleet import (
    BETAS,
    PatchedImages,
    accuracy,
    patchify_pools,
    train_fine_tunes,
    train_own_bases,
    train_stack,
)
from stages.recall.functional_vit import FIXED, HEAD, Weights
from stages.recall.objective import Objective
from stages.recall.pools import pool

RECIPE = Recipe(n_images=(16, 64), label_noise=(0.0, 0.4), steps=(2, 6), learning_rate=(1e-3, 1e-2))
LAYERS = Layout({"a": (5, 4), "b": (5,)})


def assert_near(a: Tensor, b: Tensor, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draw_few(n: int, test: bool) -> list[FineTune]:
    """Fine-tunes on some of the classes, whose images are of one pool."""
    labels = pool(TRAIN, "test" if test else "train").labels
    return [draw_fine_tune(f"few {test} {i}", test, RECIPE, labels) for i in range(n)]


def cosines(rows: Tensor) -> Tensor:
    """The cosines of the angles between different rows."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]


def two_layers(vector: Tensor, frozen: Weights, x: Tensor, y: Tensor) -> Tensor:
    w = LAYERS.unflatten(vector)
    return cross_entropy(torch.tanh(linear(x, w["a"], w["b"])) @ frozen["head"], y)


def one_schedule(_step: int) -> float:
    return 1.0


@pytest.mark.parametrize("schedule", [one_schedule, warmup_cosine(7, 0.3)])
def test_a_stack_trains_as_adam_trains_each_network_alone(schedule: Callable[[int], float]):
    first, head = torch.randn(3, 25).double(), torch.randn(3, 5, 3).double()
    x, y = torch.randn(7, 3, 6, 4).double(), torch.randint(3, (7, 3, 6))
    rates, steps = torch.tensor([0.3, 0.01, 0.1]).double(), torch.tensor([7, 2, 4])
    given = first.clone()

    def train(rows: slice) -> Tensor:
        def batch(step: int) -> tuple[Tensor, Tensor]:
            return x[step, rows], y[step, rows]

        return train_stack(two_layers, first[rows], {"head": head[rows]}, batch, rates[rows], steps[rows], schedule)

    last = train(slice(None))
    assert torch.equal(first, given)  # left as it was
    for i in range(3):
        vector = first[i].clone().requires_grad_()
        optimiser = torch.optim.Adam([vector], rates[i].item(), BETAS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
        for step in range(steps[i]):
            optimiser.zero_grad()
            two_layers(vector, {"head": head[i]}, x[step, i], y[step, i]).backward()
            optimiser.step()
            scheduler.step()
        assert_near(last[i], vector.detach(), 1e-9)
        assert_near(train(slice(i, i + 1))[0], last[i], 1e-9)


def keys(patches: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in patches]


def test_reference_inputs_are_balanced_and_nothing_is_evaluated_on_them_or_trained_on_tests(base, images):
    label = dict(zip(keys(base.patchify(TEST.images)), TEST.labels.tolist(), strict=True))
    references, evaluated = keys(images.references), keys(images.evaluation[0])
    assert len(set(references)) == 20 and len(set(evaluated)) == 48
    assert set(references) | set(evaluated) <= label.keys()
    assert not set(references) & set(evaluated)
    counts = np.bincount([label[key] for key in references], minlength=CLASSES)
    assert counts.max() - counts.min() == 1
    assert [label[key] for key in evaluated] == images.evaluation[1].tolist()
    trained = [key for patches, _ in images.pools.values() for key in keys(patches)]
    assert not set(trained) & label.keys()
    for name, (patches, labels) in images.pools.items():
        part = pool(TRAIN, name)
        assert torch.equal(patches, base.patchify(part.images)) and torch.equal(labels, part.labels)


def poisoned(images: PatchedImages, *spared: str) -> PatchedImages:
    """The images, none of which can be looked at but those of the pools spared."""
    pools = {name: (x if name in spared else torch.full_like(x, torch.nan), y) for name, (x, y) in images.pools.items()}
    return replace(images, pools=pools)


@pytest.mark.parametrize("learns", ["labels", "pixels"])
def test_a_fine_tune_sees_images_of_its_own_pool_alone(base, images, learns):
    objective = Objective(base, learns, 0.75)
    for test, own in ((False, "train"), (True, "test")):
        fine_tunes = draw_few(3, test)
        before, after, frozen = train_fine_tunes(fine_tunes, objective, images, 4)
        _, blind, _ = train_fine_tunes(fine_tunes, objective, poisoned(images, own), 4)
        assert after.isfinite().all() and torch.equal(after, blind)
        assert torch.equal(before, objective.start.expand(len(fine_tunes), -1))
        assert (after != before).float().mean() > 0.5
        assert all(torch.equal(value, frozen[FIXED][0]) for value in frozen[FIXED])
        assert torch.equal(frozen[FIXED][0], base.encoder[FIXED])


def test_an_independent_fine_tune_shares_neither_base_nor_head_but_positions(base, images):
    fine_tunes, objective = [*draw_few(3, False), *draw_few(1, True)], Objective(base, "labels", 0.75)
    first, frozen = train_own_bases(fine_tunes, objective, poisoned(images, "base"), 4, 3)
    assert first.isfinite().all()
    names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "cls_token"]
    for name in names:
        rows = torch.stack([objective.layout.unflatten(row)[name].flatten() for row in [*first, objective.start]])
        assert cosines(rows).abs().max() < 5 / rows.shape[1] ** 0.5, name  # like unrelated ones
    heads = torch.cat([frozen["head.weight"].flatten(1), base.decoder["head.weight"].flatten()[None]])
    assert cosines(heads).abs().max() < 5 / heads.shape[1] ** 0.5
    assert torch.equal(frozen[FIXED], base.encoder[FIXED].expand(4, -1, -1, -1))
    before, _, behind = train_fine_tunes(fine_tunes, objective, images, 4, 3)
    assert torch.equal(before, first) and torch.equal(behind["head.weight"], frozen["head.weight"])
    for i in (0, 3):
        alone, head = train_own_bases(fine_tunes[i : i + 1], objective, images, 4, 3)
        assert_near(alone[0], first[i], 1e-4)
        assert torch.equal(head["head.weight"][0], frozen["head.weight"][i])
    untrained, _ = train_own_bases(fine_tunes, objective, images, 4, 1)
    assert not torch.allclose(untrained, first)


@torch.no_grad()
@pytest.mark.parametrize("learns", ["labels", "rule"])
def test_accuracy_of_what_is_written_is_that_of_the_network_that_is_run(learns):
    model = autoencoder()
    base = base_of(model)
    images, objective = patchify_pools(base, TRAIN, TEST, 20, 48), Objective(base, learns, 0.75)
    x, y = images.evaluation
    change = 0.3 * torch.randn(25, len(objective.start))  # more than run together
    change[0] = 0
    labels = torch.stack([y] * 25) if learns == "labels" else torch.randint(2, (25, 48))
    counted = (torch.rand(25, 48) < 0.5).float()
    found = accuracy(objective, change.numpy(), (x, y), labels)
    of_some = accuracy(objective, change.numpy(), (x, y), labels, counted)
    for i in (0, 7, 24):
        weights = objective.layout.unflatten(objective.start + change[i])
        model.vit.load_state_dict({**model.vit.state_dict(), **weights})
        tokens = model.vit.forward_features(model.unpatchify(x))
        read_out = tokens[:, 0] if learns == "labels" else tokens.mean(1)
        answers = linear(read_out, *(objective.frozen[name] for name in HEAD))
        given = answers.argmax(1) if learns == "labels" else (answers[:, 0] > 0).long()
        right = (given == labels[i]).double()
        assert found[i] == pytest.approx(right.mean().item(), abs=1e-6)
        assert of_some[i] == pytest.approx(right[counted[i] > 0].mean().item(), abs=1e-6)
    assert len(set(found)) > 1
