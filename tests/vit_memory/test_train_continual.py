"""The stage of continual learning: what is chosen where, and what is written."""

from dataclasses import replace

import pytest
import timm
import torch

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.metrics import mean_std
from stages.vit_memory.streams import hold_out, make_stream
from stages.vit_memory.train_continual import (
    METHODS,
    Examples,
    Job,
    Params,
    Shared,
    accuracy_rows,
    choose_strengths,
    compute,
    summarise,
)
from stages.vit_memory.ways import Budget, Space


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
    # before a task is learned its own classes are told by chance, and among all classes not at all
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


def examples(count=48):
    labels = torch.arange(count) % 4
    centres = 2 * torch.randn(4, 6)
    images = torch.randint(256, (count, 1, 16, 16), dtype=torch.uint8)
    return Examples(images, labels, centres[labels] + torch.randn(count, 6))


@pytest.mark.parametrize("method", ["nearest_mean", "finetune"])
def test_strengths_are_chosen_without_the_test_images_and_runs_are_tested_on_them(method):
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **shape)
    backbone = Backbone(vit, BackboneConfig("small", False, 16, None), "", {})
    train, test = examples(), examples()
    trial = hold_out(train.pool(100), 0.5, 9, images_per_class=100)
    streams = {0: make_stream(train.pool(100), test.pool(100), 2, 0), None: make_stream(*trial, 2, 9)}
    budget = Budget(steps=2, batch_size=4, learning_rate=1e-3, buffer=8, fisher_images=4)
    shared = Shared(backbone, train, test, streams, budget, Space(6, 4, 8, 10, 0.1))
    other = replace(shared, test=Examples(255 - test.images, test.labels, -test.x))
    assert compute(Job(method, 1.0, None), shared) == compute(Job(method, 1.0, None), other)
    assert compute(Job(method, 1.0, 0), shared) != compute(Job(method, 1.0, 0), other)
    assert len(compute(Job(method, 1.0, 0), shared)["class"]) == 2
