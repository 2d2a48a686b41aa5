"""The demonstration of a memory: what is written is remembered, what is forgotten is gone, and mistakes are said."""

import pytest
import torch

from stages.common.stage import InputError
from stages.vit_memory.remember import first_of_each, remember


def test_examples_far_apart_are_all_remembered_and_a_class_forgotten_is_never_answered():
    labels = torch.arange(4).repeat_interleave(3)
    x = torch.eye(4)[labels] * 5 + 0.1 * torch.randn(12, 4)
    memory = remember(x, labels)
    assert (memory.attend(x).argmax(1) == labels).all()
    memory.forget(2)
    assert not (memory.attend(x).argmax(1) == 2).any()


def test_the_first_of_each_class_are_taken_and_some_are_left_to_ask_for():
    labels = torch.tensor([1, 0, 1, 0, 1])
    assert first_of_each(labels, 1).tolist() == [1, 0]
    for shots in (0, 2):
        with pytest.raises(InputError, match="expected 1 to 1 images"):
            first_of_each(labels, shots)
