"""The stage of continual learning: what is chosen where, and what is written."""

import pytest
import torch

from stages.common.metrics import mean_std
from stages.vit_memory.train_continual import (
    METHODS,
    Examples,
    Job,
    Params,
    accuracy_rows,
    choose_strengths,
    summarise,
)


def test_strengths_are_chosen_for_the_question_that_a_method_is_made_for():
    def final(by_class, by_task):
        return {"class": [[0.9, 0.9], [by_class, by_class]], "task": [[0.1, 0.1], [by_task, by_task]]}

    trials = {
        Job("ewc", 1.0, None): final(0.9, 0.2),
        Job("ewc", 2.0, None): final(0.1, 0.8),
        Job("memory", 3.0, None): final(0.9, 0.2),
        Job("memory", 4.0, None): final(0.1, 0.8),
    }
    assert choose_strengths(trials, {"memory": [3.0, 4.0], "ewc": [1.0, 2.0]}) == {"memory": 3.0, "ewc": 2.0}


def test_tables_have_every_cell_and_the_spread_over_seeds():
    eye = [[1.0, 0.5], [0.25, 1.0]]
    results = {
        Job(m, 1.0, seed): {"class": [[a + 0.1 * seed for a in row] for row in eye], "task": eye}
        for m in METHODS
        for seed in (0, 1, 2)
    }
    rows = accuracy_rows(results)
    assert len(rows) == len(METHODS) * 3 * 2 * 4
    assert {"method": "ewc", "seed": 2, "kind": "task", "after": 1, "on": 0, "acc": 0.25} in rows
    methods = summarise(results, width=4)
    assert list(methods) == list(METHODS)
    assert methods["slda"]["class"]["final"] == pytest.approx(mean_std([0.625, 0.725, 0.825]))
    # before a task is learnt its own classes are told by chance, and among all classes not at all
    assert methods["slda"]["task"]["forward_transfer"]["mean"] == pytest.approx(0.5 - 1 / 4)
    assert methods["slda"]["class"]["forward_transfer"]["mean"] == pytest.approx(0.6)


@pytest.mark.usefixtures("project")
def test_strengths_of_what_is_no_method_are_named():
    values = Params.load("train_continual", "digits").model_dump()
    with pytest.raises(ValueError, match=r"expected some of icarl, .*, got emc"):
        Params(**values | {"strengths": {"emc": [1.0]}})


def test_a_pool_is_of_all_images():
    labels = torch.arange(9) % 3
    pool = Examples(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), labels, torch.zeros(9, 2)).pool(2)
    assert pool.index.tolist() == list(range(9))
    assert pool.labels is labels
    assert pool.images_per_class == 2
