"""Sums and differences of changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_vit import TRAIN
from torch import Tensor

from stages.common.stage import InputError
from stages.recall import arithmetic
from stages.recall.arithmetic import add_and_negate, draw_pairs, pair_cosines, train_pairs
from stages.recall.fine_tunes import FineTune, Recipe
from stages.recall.fleet import PatchedImages

RECIPE = Recipe(n_images=(16, 32), label_noise=(0.0, 0.0), steps=(2, 4), learning_rate=(1e-3, 1e-2))


def test_pairs_are_disjoint_and_the_third_is_their_union():
    fine_tunes = draw_pairs(7, 3, RECIPE, TRAIN.labels, seed=0)
    assert len(fine_tunes) == 21
    sets = [set(fine_tune.characteristics["present"].nonzero()[0]) for fine_tune in fine_tunes]
    for a, b, union in zip(sets[0::3], sets[1::3], sets[2::3], strict=True):
        assert len(a) == len(b) == 3 and not a & b and union == a | b
    assert len({tuple(sorted(part)) for part in sets[0::3]}) > 3
    assert all(set(TRAIN.labels[t.images].tolist()) == s for t, s in zip(fine_tunes, sets, strict=True))
    assert len({fine_tune.name for fine_tune in fine_tunes}) == 21
    assert all(fine_tune.test for fine_tune in fine_tunes)
    with pytest.raises(InputError, match="two sets of 5 need more than 8 classes"):
        draw_pairs(7, 5, RECIPE, TRAIN.labels, seed=0)


def test_the_scale_of_sums_is_chosen_on_other_pairs_than_are_reported(monkeypatch):
    vectors = torch.linalg.qr(torch.randn(20, 8))[0].T
    asked = []

    def train(stack: list[FineTune], *_) -> tuple[Tensor, Tensor, None]:
        present = torch.stack([torch.from_numpy(fine_tune.characteristics["present"]) for fine_tune in stack])
        return torch.zeros(len(stack), 20), present @ vectors, None

    def run(_objective, changes, _on, _labels, counted) -> np.ndarray:
        """How near a change is to 2 of the union's: the scale that is best; of the two other classes nothing is known."""
        asked.append(len(changes))
        if (counted.sum(1) == 2).all():
            return np.zeros(len(changes))
        return -((changes - 2 * counted.numpy()[:, :8] @ vectors.numpy()) ** 2).sum(1)

    monkeypatch.setattr(arithmetic, "train_fine_tunes", train)
    monkeypatch.setattr(arithmetic, "accuracy", run)
    y = torch.arange(8)
    images = PatchedImages({"test": (torch.zeros(0), TRAIN.labels)}, (torch.zeros(8, 1, 1), y), torch.zeros(0))
    objective = SimpleNamespace(start=torch.zeros(1))
    fine_tunes = draw_pairs(7, 3, RECIPE, TRAIN.labels, seed=0)
    changes = train_pairs(fine_tunes, objective, images, batch_size=4)
    found = add_and_negate(fine_tunes, changes, objective, images, [0.5, 1.0, 2.0], validation_pairs=2)
    assert asked == [2] * 2 * 3 + [5] * (5 + 4 + 2 * 5)
    assert found["scale"] == 2.0
    on = {name: value["mean"] for name, value in found["on_union"].items()}
    assert on["sum"] == pytest.approx(0, abs=1e-5) and on["base"] == pytest.approx(-24, abs=1e-3)
    assert on["a"] == pytest.approx(-15, abs=1e-3) and on["trained_on_union"] == pytest.approx(-6, abs=1e-3)
    # of A, which is taken away, nothing is left; B stays
    taken = {name: value["mean"] for name, value in found["negation"].items()}
    assert taken["union_without_a_on_b"] == pytest.approx(-3, abs=1e-3)
    assert taken["union_without_a_on_a"] == pytest.approx(-15, abs=1e-3)
    assert found["cosine"]["sum_and_union"]["mean"] == pytest.approx(1, abs=1e-5)
    assert found["on_union_minus_on_others"] == found["on_union"]
    assert found["cosine"]["sum_and_another_union"]["mean"] < 0.95


def test_cosines_are_around_the_mean_change_of_each_kind():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 40, 30))
    own = pair_cosines(a, b, a + b, slice(10, None))
    shared = pair_cosines(a + 7, b - 9, a + b + 5, slice(10, None))  # what all fine-tunes of a kind share tells nothing
    assert own.keys() == shared.keys() == {"sum_and_union", "sum_and_another_union", "a_and_b"}
    for name, cosines in own.items():
        assert len(cosines) == 30
        assert shared[name] == pytest.approx(cosines, abs=1e-9)
    assert own["sum_and_union"] == pytest.approx(np.ones(30))
    assert abs(own["a_and_b"].mean()) < 0.15 and abs(own["sum_and_another_union"].mean()) < 0.15
    first, second = a[:10] - a.mean(0), b[:10] - b.mean(0)
    expected = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert pair_cosines(a, b, a + b, slice(0, 10))["a_and_b"] == pytest.approx(expected)
