"""What is recorded of a fine-tune is true of its images and labels."""

import numpy as np
import pytest
import torch
from tiny_vit import CLASSES, TRAIN, seeded

from stages.common.stage import InputError
from stages.recall.fine_tunes import (
    CELLS,
    EVEN,
    Recipe,
    draw_fine_tune,
    draw_present,
    draw_proportions,
    draw_rule_fine_tune,
    split_rules,
)

RECIPE = Recipe(n_images=(16, 64), label_noise=(0.0, 0.4), steps=(2, 6), learning_rate=(1e-3, 1e-2))


def recipe(**changes) -> Recipe:
    return RECIPE.model_copy(update=changes)


def test_what_is_recorded_is_true_of_the_images_and_labels():
    labels = TRAIN.labels
    sizes, sets = set(), set()
    for i in range(40):
        fine_tune = draw_fine_tune(f"t{i}", False, recipe(label_noise=(0.0, 0.0)), labels)
        shown, truth = labels[fine_tune.images], fine_tune.characteristics
        counts = shown.bincount(minlength=CLASSES)
        assert torch.equal(fine_tune.labels, shown)
        assert np.array_equal(truth["present"], (counts > 0).float().numpy())
        assert 2 <= (counts > 0).sum() <= CLASSES - 2
        assert truth["proportions"] == pytest.approx((counts / len(shown)).numpy())
        assert 2 ** truth["log2_size"] == pytest.approx(len(shown), rel=1e-5)
        assert truth["label_noise"] == 0
        assert 16 <= len(shown) <= 64
        assert RECIPE.steps[0] <= fine_tune.steps <= RECIPE.steps[1]
        assert RECIPE.learning_rate[0] <= fine_tune.learning_rate <= RECIPE.learning_rate[1]
        sizes.add(len(shown))
        sets.add(tuple(truth["present"]))
    assert len(sizes) > 20 and len(sets) > 20


def test_of_noisy_labels_as_many_are_wrong_as_is_said_and_none_is_of_a_class_that_is_absent():
    for noise in (0.1, 0.4, 1.0):
        fine_tune = draw_fine_tune(
            f"noise {noise}", False, recipe(n_images=(20000, 20000), label_noise=(noise, noise)), TRAIN.labels
        )
        present = torch.from_numpy(fine_tune.characteristics["present"]).bool()
        classes = TRAIN.labels[fine_tune.images]
        expected = noise * (1 - 1 / present.sum().item())
        share = (fine_tune.labels != classes).double().mean().item()
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 20000) ** 0.5)
        assert present[fine_tune.labels].all()
        assert fine_tune.characteristics["label_noise"] == pytest.approx(noise)
        # every image of a class that is present is drawn, none much more often than others
        of_class = torch.isin(TRAIN.labels, present.nonzero()[:, 0])
        drawn = fine_tune.images.bincount(minlength=len(TRAIN))
        assert torch.equal(drawn > 0, of_class)
        for c in present.nonzero()[:, 0]:
            counts = drawn[TRAIN.labels == c].double()
            assert counts.max() < counts.mean() + 6 * counts.mean().sqrt()


def test_labels_of_a_rule_are_its_table_s():
    learned, _ = split_rules(0, 64)
    tables = set()
    for i in range(20):
        fine_tune = draw_rule_fine_tune(f"rule {i}", False, RECIPE, TRAIN.labels, learned)
        table = fine_tune.characteristics["table"]
        assert any(np.array_equal(table, row) for row in learned.float().numpy())
        assert np.array_equal(fine_tune.labels.numpy(), table[TRAIN.labels[fine_tune.images]])
        assert 16 <= len(fine_tune.images) <= 64
        tables.add(tuple(table))
    assert len(tables) > 15


def test_rules_are_learned_or_held_out_and_together_all_but_the_constant_ones():
    for seed in (0, 1):
        learned, held_out = ({tuple(row.tolist()) for row in part} for part in split_rules(seed, 64))
        assert (len(learned), len(held_out)) == (2**CELLS - 2 - 64, 64)
        assert not learned & held_out
        assert not (learned | held_out) & {(False,) * CELLS, (True,) * CELLS}
        assert {len(rule) for rule in learned | held_out} == {CELLS}
    assert held_out != {tuple(row.tolist()) for row in split_rules(0, 64)[1]}


def test_proportions_are_of_the_classes_present_none_of_which_is_rare():
    present = torch.tensor([True, False, True, True, False, True])
    drawn = torch.stack([draw_proportions(seeded(seed), present) for seed in range(4000)])
    assert drawn.sum(1) == pytest.approx(np.ones(4000), abs=1e-6)
    assert not drawn[:, ~present].any()
    assert drawn[:, present].min() >= EVEN / 4 > 0.03
    assert drawn[:, present].mean(0) == pytest.approx(np.full(4, 0.25), abs=0.01)
    # of Dirichlet's distribution: a (A - a) / (A² (A + 1)) for a = 2, A = 8
    assert drawn[:, present].var(0) == pytest.approx(np.full(4, (1 - EVEN) ** 2 * 12 / 576), rel=0.1)


def test_of_too_few_classes_no_set_can_be_drawn():
    with pytest.raises(InputError, match="need at least 4 of them, got 3"):
        draw_present(seeded(), 3)
    counts = {int(draw_present(seeded(seed), 4).sum()) for seed in range(50)}
    assert counts == {2}
