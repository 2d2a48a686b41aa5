"""A forecaster of better weights, rather than of later ones: where to jump while training.

Axes: n weights, p all weights of a network, d what the step is linear in.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.forecast.shared import TransformerForecaster, move, zero_linear
from stages.forecast.trajectory import DISTANCE, DISTANCE_GAIN, WINDOW, Features, Trajectory


class JumpForecaster(nn.Module):
    """Weights of a lower loss than the last ones, here and now: a transformer and a step, tuned through the
    networks that it proposes.

    It starts as the mean of the last WINDOW + 1 snapshots (latest weight averaging, Kaddour 2022, arXiv:2209.14981), and
    learns where to go from there, linearly in the features and in what the transformer makes of them.
    """

    def __init__(self, body: TransformerForecaster) -> None:
        super().__init__()
        self.body, self.reads = body, body.reads
        self.step = zero_linear(body.head.in_features + body.flat_size, 1)

    @torch.no_grad()
    def read(self, features: Features) -> Float[Tensor, "n d"]:
        """Return what the learned step is linear in. The transformer itself is not tuned: that is no better, and 15 times slower."""
        return torch.cat([self.body.summarise(features), features.flat], 1)

    def forward(self, features: Features) -> Float[Tensor, "n 1"]:
        return recent_mean(features) + self.step(self.read(features))

    @torch.no_grad()
    def propose(self, run: Trajectory, t: int) -> Float[Tensor, " p"]:
        """Return the weights to jump to at t, from snapshots up to t."""
        return run.weights[t] + move(run, t, self.reads, self)[:, 0]


def recent_mean(features: Features) -> Float[Tensor, "n 1"]:
    """Return the way from the last weights to the mean of the last WINDOW + 1 snapshots, in units of the scale."""
    distances = features.tokens[:, :, DISTANCE] / DISTANCE_GAIN
    return distances.sum(1, keepdim=True) / (WINDOW + 1)
