"""Streams of random numbers do not mix, and drawing is what it is said to be."""

from threading import Thread

import torch
from torch import nn

from stages.common.randomness import generator, seeded_init, set_seed


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
