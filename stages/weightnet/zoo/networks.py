"""Some networks of one architecture, stacked."""

from dataclasses import dataclass

from jaxtyping import Bool
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
