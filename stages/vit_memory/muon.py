"""Muon: steps of momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon is the same in bfloat16. On processors that do not multiply bfloat16 in hardware it takes ten times as long, which
for matrices as small as ours is more than the whole forward and backward pass.

Axes: r rows, c columns.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def orthogonalised(x: Float[Tensor, "r c"], steps: int = 5) -> Float[Tensor, "r c"]:
    """Return U V^T of x = U S V^T, roughly: singular values end between about 0.7 and 1.2. By Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # of the quintic a s + b s^3 + c s^5, which takes all of 0 to 1 near 1 quickly
    wide = x.shape[0] <= x.shape[1]
    x = (x if wide else x.mT) / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices; weight decay is decoupled."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [list(p.shape) for group in self.param_groups for p in group["params"]]
        if others := [shape for shape in shapes if len(shape) != 2]:
            raise ValueError(f"parameters: expected matrices, got shapes {others}")

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonalised(p.grad.lerp(average, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
