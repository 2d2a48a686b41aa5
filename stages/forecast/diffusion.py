"""A forecaster that draws movements of weights, and says their mean.

Axes: s samples, n weights, d = h horizons.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.common.randomness import seeded_init
from stages.forecast.shared import SharedForecaster, zero_linear
from stages.forecast.trajectory import Features


class DiffusionForecaster(SharedForecaster):
    """A conditional diffusion model of the movements z = y_h / sqrt(h), whose forecast is the mean of two samples.

    The denoiser D(z; s) = z / (s^2 + 1) + s / sqrt(s^2 + 1) F and its loss are those of Karras et al. 2022, "Elucidating the
    design space of diffusion-based generative models", table 1, with data of unit variance. Samples follow the
    probability-flow equation from two starting points, the same for every weight (so relabelling neurons permutes the forecast) and of
    opposite sign (so an untrained model says "no change").
    """

    levels = (10.0, 3.0, 1.0, 0.3, 0.0)  # of noise, while sampling: from ten times the data's spread by thirds to none
    spread = 1.5  # of the logarithm of the noise level in training: it covers the levels above
    limit = 7.0  # of |z|: a few weights move far and would drown the rest

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool, d_model: int, seed: int) -> None:
        super().__init__(horizons, with_state, with_context)
        d = len(self.horizons)
        with seeded_init(seed):
            self.condition = nn.Sequential(nn.Linear(self.flat_size, d_model), nn.GELU(), nn.Linear(d_model, d_model))
            self.noisy = nn.Linear(d + 1, d_model)
            self.body = nn.Sequential(nn.ReLU(), nn.Linear(d_model, d_model), nn.ReLU())
            self.head = zero_linear(d_model, d)
            self.skip = zero_linear(self.flat_size, d)
            start = torch.randn(1, 1, d)
        self.register_buffer("starts", torch.cat([start, -start]))
        self.register_buffer("units", torch.tensor(self.horizons).float().sqrt())

    def denoise(
        self, z: Float[Tensor, "*s n d"], level: Float[Tensor, "*n 1"], known: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "*s n d"]:
        """Return D(z; level); known: what `read` made of the features."""
        condition, skip = known
        variance = level.square() + 1
        # level.log() / 4: c_noise of the paper's table 1
        inlet = torch.cat([z / variance.sqrt(), (level.log() / 4).expand(*z.shape[:-1], 1)], -1)
        return z / variance + level / variance.sqrt() * (self.head(self.body(condition + self.noisy(inlet))) + skip)

    def read(self, features: Features) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d"]]:
        """Return what every denoising step needs of the features."""
        return self.condition(features.flat), self.skip(features.flat)

    def denoising_loss(self, features: Features, target: Float[Tensor, "n h"], random: torch.Generator) -> Tensor:
        """Return the mean over noise levels of the weighted squared error of D."""
        z = (target / self.units).clamp(-self.limit, self.limit)
        level = (self.spread * torch.randn(len(z), 1, generator=random)).exp()
        noisy = z + level * torch.randn(z.shape, generator=random)
        squares = (self.denoise(noisy, level, self.read(features)) - z).square()
        return (squares * (1 + level.square()) / level.square()).mean()

    def sample(self, features: Features) -> Float[Tensor, "s n h"]:
        """Return a sample of the movements of n weights from every starting point, in units of the scale."""
        known = self.read(features)
        z = self.levels[0] * self.starts.expand(-1, len(features.scale), -1)
        for level, following in zip(self.levels[:-1], self.levels[1:], strict=True):
            clean = self.denoise(z, torch.full((1, 1), level), known)
            z = clean + following / level * (z - clean)  # a step of Euler's method
        return z * self.units

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        return self.sample(features).mean(0)
