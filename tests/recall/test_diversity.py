"""What the recipe tells is not said to be told by networks, nor the number of images where only that of distinct ones is told."""

import numpy as np
import pytest
from tiny_vit import CLASSES, autoencoder, base_of

from stages.common.stage import InputError
from stages.recall import measures
from stages.recall.diversity import READS, Described, auroc, beyond, groups_of, standard, tell, told_by
from stages.recall.fleet_files import Fleet
from stages.recall.reading import References

N = 600
RANDOM = np.random.default_rng(0)
RECIPE = {
    "log rate": RANDOM.uniform(-3, 0, N),
    "log steps": RANDOM.uniform(3, 5, N),
    "log batch": RANDOM.choice(np.log([16, 32, 64]), N),
    "constant": np.ones(N),
    "shift": RANDOM.choice([0.0, 0.0, 1.0, 2.0], N),
}
SIZE = RANDOM.uniform(4, 9, N)
DISTINCT = SIZE + RANDOM.uniform(-3, 0, N)


def described(shown: np.ndarray, noise: float = 0.05) -> Described:
    """Fine-tunes of which networks show some values, in one unit, and nothing else."""
    random = np.random.default_rng(1)
    x = np.column_stack([(shown - shown.mean(0)) / shown.std(0), random.standard_normal((N, 5))])
    x = x + noise * random.standard_normal(x.shape)
    return Described(
        np.arange(N) >= 400,
        columns=dict.fromkeys(READS, x / x.shape[1] ** 0.5),
        recipe=RECIPE,
        truth={"log2_size": SIZE[:, None], "log2_distinct": DISTINCT[:, None], "shift": RECIPE["shift"][:, None]},
    )


def test_what_networks_tell_of_distinct_images_is_not_told_of_all():
    found = tell(described(DISTINCT[:, None]), 100)
    assert found["log2_distinct"]["r2"]["mean"] > 0.95
    assert found["log2_distinct"]["r2_given_recipe_and_log2_size"]["mean"] > 0.9
    assert 0.4 < found["log2_size"]["r2"]["mean"] < 0.95  # as far as both go together
    assert found["log2_size"]["r2_given_recipe_and_log2_distinct"]["mean"] < 0.05
    assert found["shift"]["auroc"]["low"] < 0.5 < found["shift"]["auroc"]["high"]
    assert abs(found["shift"]["r2_given_recipe"]["mean"]) < 0.05
    assert (found["learned_from"], found["measured_on"]) == (400, 200)


def test_networks_that_show_the_recipe_alone_tell_nothing_once_it_is_known():
    steps = RECIPE["log steps"] + RECIPE["log rate"]
    shown, y = described(steps[:, None]), steps[:, None] + 0.1 * RANDOM.standard_normal((N, 1))
    known = standard(np.column_stack(list(RECIPE.values())), shown.learned)
    assert beyond(shown.columns, known, y, shown, 100)["mean"] < 0.03
    nothing = standard(RECIPE["shift"][:, None], shown.learned)
    assert beyond(shown.columns, nothing, y, shown, 100)["mean"] > 0.9


def test_what_the_recipe_hides_is_told_once_it_is_known():
    both = 5 * RECIPE["log rate"] + DISTINCT
    shown = described(both[:, None])
    found = tell(shown, 100)["log2_distinct"]
    assert found["r2"]["mean"] < 0.5 and found["r2_given_recipe"]["mean"] > 0.8


def test_shifts_are_told_from_networks_that_show_them():
    found = tell(described(np.column_stack([RECIPE["shift"], SIZE])), 100)["shift"]
    assert found["auroc"]["mean"] > 0.99
    assert found["r2_of_the_recipe_alone"] < 0.05  # the number itself is not read
    assert found["r2_given_recipe"]["mean"] > 0.9


def test_the_chance_that_a_positive_is_higher_is_that_of_all_pairs():
    scores, positive = RANDOM.integers(0, 9, 80).astype(float), RANDOM.random(80) < 0.4
    assert auroc(scores, positive.astype(float)) == pytest.approx(
        measures.auroc(scores[positive], scores[~positive]), abs=1e-12
    )


def test_numbers_that_do_not_vary_are_left_out_and_scales_are_of_training_fine_tunes():
    x = standard(np.column_stack([RECIPE["constant"], RECIPE["shift"], SIZE]), np.arange(400))
    assert x.shape == (N, 2)
    assert (x[:400] ** 2).sum(1).mean() == pytest.approx(1) and np.abs(x[:400].mean(0)).max() < 1e-12


def test_fine_tunes_that_may_stop_early_are_apart_from_those_that_go_to_their_end():
    patience = RANDOM.choice([0.0, 3.0], N)
    early = RECIPE | {"patience": patience, "log steps kept": RECIPE["log steps"] - patience}
    groups = groups_of(early)
    assert np.array_equal(groups["early_stopping"], ~groups["to_the_end"]) and groups["all"].all()
    assert set(groups_of(RECIPE)) == {"all", "long_runs"}
    assert (groups["long_runs"] <= groups_of(RECIPE)["long_runs"]).all()
    assert np.array_equal(groups_of(RECIPE)["long_runs"], np.exp(RECIPE["log steps"] + RECIPE["log batch"]) > 2560)


def fleet_of(n: int, recipe: dict[str, np.ndarray]) -> tuple[Fleet, References]:
    """Networks that changed the more the larger their data sets, and do so in one direction; a third is for tests."""
    random, base = np.random.default_rng(0), base_of(autoencoder())
    inputs, layout, size = 16, base.layout, SIZE[:n, None]
    change = size * random.standard_normal(layout.size) + random.standard_normal((n, layout.size))
    answers = inputs * (CLASSES + len(base.encoder["norm.weight"]))
    fleet = Fleet(
        np.arange(n) % 3 == 0,
        change=change.astype(np.float32),
        responses=random.standard_normal((n, answers)).astype(np.float32),
        truth={"log2_size": SIZE[:n], "recipe": np.column_stack([values[:n] for values in recipe.values()])},
        mean_image=np.zeros((n, 0)),
        scores={},
        metadata=layout.metadata | {"recipe": list(recipe)},
    )
    return fleet, References(np.arange(inputs) % CLASSES, random.standard_normal(answers), CLASSES)


def test_of_a_fleet_what_it_has_is_told_and_of_groups_that_are_large_enough():
    fleet, references = fleet_of(90, RECIPE | {"log batch": np.full(N, np.log(16)), "log steps": np.full(N, 3.0)})
    told = told_by(fleet, references, 50)
    assert set(told) == {"all"}  # none is a long run
    assert set(told["all"]) == {"learned_from", "measured_on", "log2_size", "shift"}
    assert told["all"]["log2_size"]["r2"]["low"] > 0.5 > 0.3 > told["all"]["shift"]["r2"]["mean"]
    small, references = fleet_of(30, RECIPE)
    with pytest.raises(InputError, match=r"^a fleet of train_auditor.apart needs 20 fine-tunes .* got 10: set train"):
        told_by(small, references, 50)
