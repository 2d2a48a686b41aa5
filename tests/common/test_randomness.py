"""Streams of random numbers do not mix, and drawing is what it is said to be."""

import math
from threading import Thread

import pytest
import torch
from torch import nn

from stages.common.randomness import generator, log_uniform, seeded_init, set_seed


def test_random_streams_are_separate_and_reproducible():
    def draw(*key):
        return torch.rand(4, generator=generator(*key))

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    set_seed(5)
    first = torch.rand(3)
    set_seed(5)
    assert torch.equal(first, torch.rand(3))


def test_modules_built_by_a_seed_are_the_same_whatever_others_draw_and_leave_the_generator_alone():
    def build(seed: int, into: list) -> None:
        with seeded_init(seed):
            into.append(nn.Linear(50, 50).weight)

    first: list[torch.Tensor] = []
    before = torch.get_rng_state()
    build(3, first)
    assert torch.equal(torch.get_rng_state(), before)
    others: list[list[torch.Tensor]] = [[] for _ in range(8)]
    threads = [Thread(target=build, args=(3 + i % 2, into)) for i, into in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(into[0], first[0]) == (i % 2 == 0) for i, into in enumerate(others))


def test_log_uniform_is_the_geometric_way_between_its_ends():
    assert log_uniform((1e-3, 10.0), 0.0) == pytest.approx(1e-3)
    assert log_uniform((1e-3, 10.0), 1.0) == pytest.approx(10.0)
    assert log_uniform((1e-3, 10.0), 0.5) == pytest.approx(math.sqrt(1e-3 * 10.0))
    assert log_uniform((7.0, 7.0), 0.3) == pytest.approx(7.0)
