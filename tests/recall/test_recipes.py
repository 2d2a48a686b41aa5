"""Networks of a stack train as torch's optimisers train each alone, by recipes that are drawn apart from the data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_vit import TEST, TRAIN, autoencoder, base_of
from torch.func import grad
from torch.nn.functional import cross_entropy, linear

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.adapt_backbone import Recipes
from stages.recall.adapters import merged_adapter
from stages.recall.fine_tunes import draw_fine_tune
from stages.recall.fleet import patchify_pools
from stages.recall.objective import Objective
from stages.recall.pools import pool
from stages.recall.recipes import (
    EarlyStopping,
    Rules,
    Stopping,
    Training,
    WideFineTune,
    WideRecipe,
    draw_wide_fine_tune,
    shifted,
    train_by_rules,
    train_wide_fine_tunes,
    trained_weights,
    with_repeats,
)

BASE = base_of(autoencoder())
OBJECTIVE = Objective(BASE, "labels", 0.5)
IMAGES = patchify_pools(BASE, TRAIN, TEST, 16, 8)
WHOLE = WideRecipe(
    n_images=(16, 64),
    label_noise=(0.0, 0.4),
    steps=(2, 6),
    learning_rate=(1e-3, 1e-2),
    presence=0.5,
    optimisers=["sgd", "adam", "adamw"],
    sgd_factor=3.0,
    batch_sizes=[8],
    weight_decay=(0.0, 0.5),
    warmup=(0.0, 0.5),
    shifts=[0, 2],
    layers=["all", "last_half", "first_half", "norms"],
    ranks=[],
    test_ranks=[],
    targets=[],
    distinct=(1.0, 1.0),
    stopping=Stopping(patience=[0], every=2, held_out=0.25),
)
ADAPTERS = WHOLE.model_copy(update={"ranks": [1, 4], "test_ranks": [3], "targets": ["qkv", "perceptron"], "layers": []})
LABELS = {test: pool(TRAIN, "test" if test else "train").labels for test in (False, True)}


def few(recipe: WideRecipe, n: int, test: bool = False) -> list[WideFineTune]:
    return [draw_wide_fine_tune(f"few {i}", test, recipe, LABELS[test]) for i in range(n)]


PLAIN = few(WHOLE, 1)[0].training


def training(**values) -> Training:
    return replace(PLAIN, **{"weight_decay": 0.0, "warmup": 0.0, "cosine": False} | values)


LAYERS = Layout({"a": (5, 4), "b": (5,)})


def two_layers(vector, frozen, x, y):
    w = LAYERS.unflatten(vector)
    return cross_entropy(10 * torch.tanh(linear(x, w["a"], w["b"])) @ frozen["head"], y)


@pytest.mark.parametrize(
    ("one", "optimiser"),
    [
        (training(optimiser="sgd", learning_rate=0.1, steps=9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (
            training(optimiser="sgd", learning_rate=0.1, steps=5, weight_decay=0.3),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.3),
        ),
        (training(optimiser="adam", learning_rate=0.02, steps=7), lambda p: torch.optim.Adam(p, 0.02)),
        (
            training(optimiser="adamw", learning_rate=0.02, steps=6, weight_decay=0.3),
            lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3),
        ),
    ],
)
def test_a_network_of_a_stack_trains_as_by_torchs_optimiser_alone(one, optimiser):
    other = training(optimiser="adam", learning_rate=0.3, steps=8)
    first, head = torch.randn(2, 25).double(), torch.randn(2, 5, 3).double()
    x, y = torch.randn(9, 2, 6, 4).double(), torch.randint(3, (9, 2, 6))
    rules, everything = Rules.of([one, other], torch.device("cpu")), torch.ones(2, 25, dtype=torch.bool)
    trained = train_by_rules(two_layers, first, {"head": head}, lambda t: (x[t], y[t]), everything, rules)
    alone = first[0].clone().requires_grad_()
    steps = optimiser([alone])
    for t in range(one.steps):
        loss = two_layers(alone, {"head": head[0]}, x[t, 0], y[t, 0])
        (alone.grad,) = torch.autograd.grad(loss, alone)
        torch.nn.utils.clip_grad_norm_([alone], 1.0)
        steps.step()
    torch.testing.assert_close(trained[0], alone.detach(), rtol=1e-4, atol=1e-5)


def test_rates_warm_up_fall_by_a_cosine_and_end():
    rules = Rules.of(
        [
            training(learning_rate=2.0, steps=10, warmup=0.4),
            training(learning_rate=1.0, steps=4, cosine=True),
        ],
        torch.device("cpu"),
    )
    rates = torch.stack([rules.rate_at(t) for t in range(11)], 1)
    torch.testing.assert_close(rates[0], torch.tensor([0.5, 1.0, 1.5, *[2.0] * 7, 0.0]))
    torch.testing.assert_close(rates[1, :4], 0.5 * (1 + torch.cos(torch.pi * torch.arange(4) / 4)))
    assert not rates[1, 4:].any()


def test_what_is_not_trained_stays_and_halves_make_a_whole():
    layout = OBJECTIVE.layout
    masks = {kind: trained_weights(layout, kind) for kind in ("all", "last_half", "first_half", "norms")}
    assert masks["all"].all() and torch.equal(masks["last_half"], ~masks["first_half"])
    assert (
        masks["last_half"][layout.slices["norm.bias"]].all() and masks["first_half"][layout.slices["cls_token"]].all()
    )
    assert {n for n, s in layout.slices.items() if masks["norms"][s].any()} == {n for n in layout.shapes if "norm" in n}
    members = few(WHOLE, 12)
    changes, steps = train_wide_fine_tunes(members, OBJECTIVE, IMAGES)
    assert steps.tolist() == [f.steps for f in members]
    assert {f.training.layers for f in members} == set(masks)
    for change, f in zip(changes, members, strict=True):
        mask = masks[f.training.layers]
        assert not change[~mask].any() and (change[mask] != 0).float().mean() > 0.8


def test_a_stack_of_adapters_trains_as_each_alone_and_changes_matrices_by_its_rank():
    members = few(ADAPTERS, 6)
    changes, _ = train_wide_fine_tunes(members, OBJECTIVE, IMAGES)
    for i in (0, 3):
        alone, _ = train_wide_fine_tunes([members[i]], OBJECTIVE, IMAGES)
        torch.testing.assert_close(alone[0], changes[i], rtol=1e-3, atol=1e-5)
    for change, f in zip(changes, members, strict=True):
        weights = (OBJECTIVE.start + change).numpy()
        assert merged_adapter(change.numpy(), weights, OBJECTIVE.layout) is not None
        moved = {n: w for n, w in OBJECTIVE.layout.unflatten(change).items() if w.any()}
        assert len(moved) == {"qkv": 2, "perceptron": 4}[f.training.targets]
        for w in moved.values():
            values = torch.linalg.svdvals(w.double())
            assert (values > 1e-5 * values[0]).sum() == f.training.rank


def test_recipes_are_drawn_apart_from_data_sets_and_test_ranks_for_tests_alone():
    name, labels = "a fine-tune", LABELS[False]
    wide, other = (draw_wide_fine_tune(name, False, recipe, labels) for recipe in (WHOLE, ADAPTERS))
    plain = draw_fine_tune(name, False, WHOLE, labels)
    for f in (wide, other):
        assert torch.equal(f.images, plain.images) and torch.equal(f.labels, plain.labels)
        assert np.array_equal(f.characteristics["proportions"], plain.characteristics["proportions"])
    assert {f.training.rank for f in few(ADAPTERS, 40)} == {1, 4}
    assert {f.training.rank for f in few(ADAPTERS, 40, test=True)} == {1, 3, 4}
    rates = {f.training.optimiser: [] for f in few(WHOLE, 40)}
    for f in few(WHOLE, 40):
        rates[f.training.optimiser].append(f.training.learning_rate)
        assert (f.training.weight_decay == 0) == (f.training.optimiser == "adam")
    assert rates.keys() == {"sgd", "adam", "adamw"}
    assert min(rates["sgd"]) >= 3e-3 and max(rates["sgd"]) <= 3e-2 and max(rates["adam"]) <= 1e-2


def test_images_are_shifted_whole_and_their_edges_continued():
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[0, 0, 6:9, 6:9] = 255
    patches = BASE.patchify(images.expand(200, -1, -1, -1))
    moved = BASE.unpatchify(shifted(BASE, patches, 2, torch.Generator().manual_seed(0)))[:, 0] > 0.5
    assert (moved.sum((1, 2)) == 9).all()
    places = {tuple(m.nonzero()[0].tolist()) for m in moved}
    assert places == {(r, c) for r in range(4, 9) for c in range(4, 9)}
    bright = BASE.patchify(torch.full((3, 1, 16, 16), 255, dtype=torch.uint8))
    torch.testing.assert_close(shifted(BASE, bright, 4, torch.Generator().manual_seed(0)), bright)


def test_each_class_is_present_as_often_as_said():
    rare = WHOLE.model_copy(update={"presence": 0.2})
    seldom, often = (np.stack([f.characteristics["present"] for f in few(r, 200)]).mean() for r in (rare, WHOLE))
    assert seldom < often - 0.05
    assert min(f.characteristics["present"].sum() for f in few(rare, 200)) == 2


def stopped_alone(f: WideFineTune) -> tuple[torch.Tensor, int, int]:
    """SGD with momentum, early stopping written out: the best change, after how many steps it was reached, and how many were taken."""
    held_out, pixels = round(0.25 * len(f.images)), IMAGES.pools["train"][0]
    learned, of = len(f.images) - held_out, (f.steps, f.training.batch_size)
    places, masks = torch.randint(learned, of, generator=f.random("batches")), f.random("masks")
    noise = torch.rand(held_out, BASE.patches, generator=f.random("held out"))
    w, m, best, lowest, at, waited = OBJECTIVE.start.clone(), 0.0, None, float("inf"), 0, 0
    for t in range(1, f.steps + 1):
        drawn = places[t - 1]
        hidden = torch.rand(len(drawn), BASE.patches, generator=masks)
        g = grad(OBJECTIVE.loss)(w, OBJECTIVE.frozen, pixels[f.images[drawn]], f.labels[drawn], hidden)
        g = g / max(1.0, g.norm().item())
        m = 0.9 * m + g
        w = w - f.training.learning_rate * m
        if t % f.training.every and t < f.steps:
            continue
        rest = f.images[learned:], f.labels[learned:]
        loss = OBJECTIVE.loss(w, OBJECTIVE.frozen, pixels[rest[0]], rest[1], noise).item()
        waited += 1
        if loss < lowest:
            best, lowest, at, waited = w, loss, t, 0
        if waited == f.training.patience:
            break
    return best - OBJECTIVE.start, at, t


def test_a_stack_with_early_stopping_trains_as_each_alone_by_a_plain_loop():
    simple = {"layers": ["all"], "optimisers": ["sgd"], "shifts": [0], "warmup": (0.0, 0.0), "steps": (9, 40)}
    simple |= {"weight_decay": (0.0, 0.0), "learning_rate": (3e-3, 3e-2)}
    recipe = WHOLE.model_copy(update=simple | {"stopping": Stopping(patience=[0, 1, 2], every=4, held_out=0.25)})
    members = [replace(f, training=replace(f.training, cosine=False)) for f in few(recipe, 14)]
    changes, steps = train_wide_fine_tunes(members, OBJECTIVE, IMAGES)
    endings = set()
    for f, change, kept in zip(members, changes, steps.tolist(), strict=True):
        if not f.training.patience:
            assert kept == f.steps and f.learned == len(f.images)
            never, _ = train_wide_fine_tunes([f], OBJECTIVE, IMAGES)
            torch.testing.assert_close(never[0], change, rtol=1e-3, atol=1e-5)
            continue
        alone, at, taken = stopped_alone(f)
        torch.testing.assert_close(change, alone, rtol=1e-3, atol=2e-5)
        assert kept == at
        endings.add((taken < f.steps, at < taken))
    assert endings >= {(True, True), (False, False)}  # some stop early, some are best at their end


def test_a_stack_of_adapters_with_early_stopping_trains_as_each_alone():
    early = {"stopping": Stopping(patience=[1], every=2, held_out=0.25), "steps": (6, 16), "optimisers": ["sgd"]}
    members = few(ADAPTERS.model_copy(update=early), 6)
    changes, steps = train_wide_fine_tunes(members, OBJECTIVE, IMAGES)
    assert any(kept < f.steps for f, kept in zip(members, steps.tolist(), strict=True))
    for i, f in enumerate(members):
        alone, kept = train_wide_fine_tunes([f], OBJECTIVE, IMAGES)
        assert kept.item() == steps[i]
        torch.testing.assert_close(alone[0], changes[i], rtol=1e-3, atol=1e-5)


def test_a_network_whose_loss_falls_trains_as_one_that_never_stops_and_one_that_stopped_stays():
    rules = Rules.of([training(optimiser="adam", learning_rate=0.1, steps=n) for n in (7, 9, 9)], torch.device("cpu"))
    first, head, everything = torch.randn(3, 25), torch.randn(3, 5, 3), torch.ones(3, 25, dtype=torch.bool)
    x, y = torch.randn(9, 3, 6, 4), torch.randint(3, (9, 3, 6))
    seen = []

    def look(w: torch.Tensor) -> torch.Tensor:
        seen.append(w.clone())
        k = len(seen)
        return torch.tensor([-k, -k, [9, 1, 2, 0, 1, 0][k - 1]]).float()

    steps, data = rules.steps, ({"head": head}, lambda t: (x[t], y[t]), everything, rules)
    stopping = EarlyStopping(look, torch.tensor([2, 2, 2]), 2, steps)
    plain, watched = train_by_rules(two_layers, first, *data), train_by_rules(two_layers, first, *data, stopping)
    torch.testing.assert_close(watched[:2], plain[:2], rtol=0, atol=0)
    assert stopping.taken.tolist() == [7, 9, 4] and len(seen) == 6  # after 2, 4, 6, 7, 8 and 9 steps
    assert torch.equal(watched[2], seen[1][2]) and torch.equal(seen[4][2], seen[5][2])
    assert not torch.equal(seen[1][2], seen[2][2])


def test_weights_that_are_no_numbers_from_the_first_are_not_hidden():
    stopping = EarlyStopping(lambda w: w.sum(1), torch.tensor([1]), 1, torch.tensor([5]))
    weights = torch.full((1, 3), torch.nan)
    stopping.evaluate(1, weights)
    assert stopping.kept(torch.zeros(1, 3)).isnan().all()


def test_repeats_leave_classes_as_they_are_and_as_many_distinct_images_as_said():
    recipe = WHOLE.model_copy(update={"n_images": (60, 60)})
    for i in range(20):
        drawn, share = draw_fine_tune(f"t{i}", False, recipe, LABELS[False]), (i + 1) / 20
        repeated = with_repeats(drawn, share, LABELS[False])
        before, after = (LABELS[False][f.images] for f in (drawn, repeated))
        assert torch.equal(before, after) and len(repeated.images) == 60
        assert set(repeated.images.tolist()) <= set(drawn.images.tolist())
        kept = sum(max(1, round(share * n)) for n in before.bincount().tolist() if n)
        distinct = len(repeated.images.unique())
        assert 2 ** repeated.characteristics["log2_distinct"] == pytest.approx(distinct)
        assert distinct <= kept and (share < 1 or torch.equal(repeated.images, drawn.images))
        for c in before.unique():  # every image that is kept is there as often as any other, or once more
            counts = torch.unique(
                torch.stack([repeated.images, repeated.labels])[:, before == c], dim=1, return_counts=True
            )[1]
            twice = torch.unique(drawn.images[before == c], return_counts=True)[1].max() > 1
            assert twice or counts.max() - counts.min() <= 1


def test_of_halves_and_of_all_images_twice_the_same_is_trained():
    drawn = draw_fine_tune("t", False, WHOLE.model_copy(update={"n_images": (40, 40)}), LABELS[False])
    doubled = replace(drawn, images=drawn.images.repeat(2), labels=drawn.labels.repeat(2))
    halved = with_repeats(doubled, 0.5, LABELS[False])
    pairs = [torch.stack([f.images, f.labels]).unique(dim=1, return_counts=True) for f in (drawn, doubled, halved)]
    for values, counts in pairs[1:]:
        assert torch.equal(values, pairs[0][0]) and torch.equal(counts, 2 * pairs[0][1])


def test_data_sets_and_recipes_are_the_same_whether_or_not_images_repeat_and_training_may_stop():
    update = {"distinct": (0.1, 0.9), "stopping": Stopping(patience=[1, 2], every=2, held_out=0.25)}
    for plain, changed in zip(few(WHOLE, 20), few(WHOLE.model_copy(update=update), 20), strict=True):
        assert "log2_distinct" not in plain.characteristics and "log2_distinct" in changed.characteristics
        assert replace(changed.training, patience=0) == plain.training
        for key, value in plain.characteristics.items():
            assert np.array_equal(value, changed.characteristics[key])


def test_of_a_base_of_ones_own_no_fine_tune_stops_early():
    values = WHOLE.model_dump() | {"new_heads": [False]}
    Recipes.parse(values, ".".join)
    with pytest.raises(InputError, match=r"stopping: .* of a base of one's own stops early: set patience to"):
        Recipes.parse(values | {"stopping": values["stopping"] | {"patience": [0, 2]}}, ".".join)
