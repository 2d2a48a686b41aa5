"""A head that was trained along is near the base's, and one that was drawn is not."""

import pytest
import torch

from stages.common.stage import InputError
from stages.recall.heads import NEAR, check_head, distance, saved_head

BASE = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))


def test_what_is_added_to_all_classes_alike_does_not_count_and_zero_is_one_norm_away():
    assert distance(BASE + torch.arange(32), BASE) == pytest.approx(0, abs=1e-6)
    assert distance(0 * BASE, BASE) == pytest.approx(1) and distance(1.2 * BASE, BASE) == pytest.approx(0.2)


@pytest.mark.parametrize("size", [1e-3, 0.1, 0.3, 1.0, 10.0])
def test_no_draw_is_near_however_large_and_no_other_order_of_classes(size):
    for seed in range(200):
        random = torch.Generator().manual_seed(seed + 1)
        for drawn in (torch.randn(10, 32, generator=random), torch.rand(10, 32, generator=random) - 0.5):
            assert distance(size * drawn, BASE) > 0.8  # at best sqrt(1 - cosine^2) of the base's norm
        order = torch.randperm(10, generator=random)
        if (order != torch.arange(10)).any():
            assert distance(BASE[order], BASE) > NEAR
    swapped = torch.arange(10)
    for i in range(10):
        for j in range(i):
            swapped[[i, j]] = swapped[[j, i]]
            assert distance(BASE[swapped], BASE) > NEAR
            swapped[[i, j]] = swapped[[j, i]]


def test_near_is_a_cone_around_the_base_s():
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        step = torch.randn(10, 32, generator=random)
        step = (step - step.mean(0)) * NEAR * (BASE - BASE.mean(0)).norm() / (step - step.mean(0)).norm()
        check_head("x", BASE + 0.999 * step, BASE)
        centred = [w - w.mean(0) for w in (BASE + step, BASE)]
        assert torch.cosine_similarity(*(w.flatten() for w in centred), dim=0) >= (1 - NEAR**2) ** 0.5 - 1e-6
        with pytest.raises(InputError, match="x: its head is a new one, or has the classes in another order: 50%"):
            check_head("x", BASE + 1.001 * step, BASE)


@pytest.mark.parametrize("classes", [3, 11])
def test_another_number_of_classes_is_said(classes):
    with pytest.raises(InputError, match=rf"of {classes} classes and 32 dimensions, where the base's has 10 and 32"):
        check_head("x", torch.ones(classes, 32), BASE)


@pytest.mark.parametrize(
    "name",
    [
        "head.weight",
        "decoder.head.weight",
        "base_model.model.head.weight",
        "a.classifier.modules_to_save.default.weight",
    ],
)
def test_a_head_is_found_by_the_names_that_libraries_give_it(name):
    found = saved_head({"norm.weight": BASE[0], "fc_norm.weight": BASE[0], name: BASE})
    assert found is BASE
    assert saved_head({"norm.weight": BASE[0], "decoder.block.weight": BASE}) is None
