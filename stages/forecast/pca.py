"""The forecaster that this system started from.

Axes: n snapshots, p weights, k components, b batch, s snapshots of a sequence.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.common.randomness import seeded_init
from stages.forecast.trajectory import Forecast, Trajectory


class CoefficientForecaster(nn.Module):
    """The design this system started from: PCA of whole weight vectors, a transformer from the coefficients of the last 3
    snapshots to the next ones, unnormalised, applied again and again for longer horizons.
    """

    sequence = 3  # snapshots, as in that design

    def __init__(
        self, mean: Float[Tensor, " p"], basis: Float[Tensor, "k p"], horizons: Sequence[int], d_model: int, seed: int
    ):
        super().__init__()
        self.horizons = tuple(horizons)
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        with seeded_init(seed):
            self.inlet = nn.Linear(len(basis), d_model)
            self.position = nn.Parameter(torch.zeros(self.sequence, d_model))
            block = nn.TransformerEncoderLayer(d_model, 4, 2 * d_model, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            self.outlet = nn.Linear(d_model, len(basis))

    def encode(self, weights: Float[Tensor, "t p"]) -> Float[Tensor, "t k"]:
        """Return the PCA coefficients of snapshots."""
        return (weights - self.mean) @ self.basis.T

    def forward(self, coefficients: Float[Tensor, "b s k"]) -> Float[Tensor, "b k"]:
        return self.outlet(self.encoder(self.inlet(coefficients) + self.position)[:, -1])

    @torch.no_grad()
    def predict(self, run: Trajectory, t: int) -> Forecast:
        """Return the weights of a run at t + h for every horizon, rolled out from its last 3 snapshots."""
        window = self.encode(run.weights[t - self.sequence + 1 : t + 1])
        path = []
        for _ in range(max(self.horizons)):
            window = torch.cat([window[1:], self(window[None])])
            path.append(window[-1])
        return self.mean + torch.stack([path[h - 1] for h in self.horizons]) @ self.basis
