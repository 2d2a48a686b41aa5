"""Some networks of one architecture, stacked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stages.weightnet.tracing.program import Program, Weights
from stages.weightnet.tracing.symmetry import Symmetry


@dataclass(frozen=True)
class Networks:
    """Some networks of one architecture: what predictors read."""

    program: Program
    symmetry: Symmetry
    weights: Weights
    tanh: Bool[Tensor, " n"]  # those with tanh in place of ReLU

    def __len__(self) -> int:
        return len(self.tanh)

    def subset(self, places: Int[Tensor, " m"]) -> "Networks":
        """Return those at some places of the stack."""
        weights = {name: tensor[places] for name, tensor in self.weights.items()}
        return replace(self, weights=weights, tanh=self.tanh[places])


def stacked(several: Sequence[Networks]) -> Networks:
    """Return the networks of several stacks of one architecture, one stack after the other."""
    first, *others = several
    if not others:
        return first
    weights = {name: torch.cat([some.weights[name] for some in several]) for name in first.weights}
    return replace(first, weights=weights, tanh=torch.cat([some.tanh for some in several]))
