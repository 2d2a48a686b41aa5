"""Work side by side gives what work one after the other gives."""

import pytest
import torch

from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError

CPU = torch.device("cpu")


def learn(seed: int) -> torch.Tensor:
    """A layer's weights after a step, by a generator of its own."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=random).requires_grad_()
    (torch.randn(16, 8, generator=random) @ weight.T).square().mean().backward()
    return weight.detach() - 0.1 * weight.grad


def test_results_are_those_of_one_after_the_other_in_the_items_order():
    pin_threads()  # as stages do
    found = parallel_map(learn, range(20), CPU)
    assert all(torch.equal(one, learn(seed)) for seed, one in enumerate(found))
    assert parallel_map(learn, [], CPU) == []


def test_the_users_mistake_in_an_item_is_the_callers_error():
    def fail(item: int) -> int:
        if item == 2:
            raise InputError("epochs must be positive")
        return item

    with pytest.raises(InputError, match=r"^epochs must be positive$"):
        parallel_map(fail, range(4), CPU)
