"""Forecast the weights of a network from its past: w(t + h) = w(t) + scale(t) y_h, for several horizons h at once.

One predictor is shared over all weights, so it serves networks of any shape. It starts as "no change" (its last layers are
zero), so what it learns is the movement.

Axes: n weights, p all weights of a network, h horizons, d features of a weight in one row.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.common.randomness import seeded_init
from stages.common.vectors import Layout
from stages.forecast.trajectory import STATIC, WINDOW, Features, Forecast, Trajectory, read_features

CHUNK = 4096  # weights forecast at a time: what the processor's cache holds


class SharedForecaster(nn.Module):
    """A predictor shared over weights: features of n weights -> movements [n, h] in units of the scale. Subclasses say how.

    horizons: snapshots ahead. with_state: reads the optimiser's direction. with_context: reads means over the two neurons
    that a weight connects. Of subclasses, d_model: width; seed: of initial weights.
    """

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool) -> None:
        super().__init__()
        self.horizons = tuple(horizons)
        self.reads = {"with_state": with_state, "with_context": with_context}
        self.token_size = 2 + with_state + with_context * (2 + 2 * with_state)
        self.flat_size = WINDOW * self.token_size + STATIC

    @torch.no_grad()
    def predict(self, run: Trajectory, t: int) -> Forecast:
        """Return the weights of a run at t + h for every horizon, from its snapshots up to t."""
        return run.weights[t] + move(run, t, self.reads, self).T

    @torch.no_grad()
    def movements(self, run: Trajectory, t: int, index: Int[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """Return how far the weights at `index` move until t + h for every horizon, from the snapshots up to t."""
        chunks = (read_features(run, t, part, **self.reads) for part in index.split(CHUNK))
        return torch.cat([features.scale[:, None] * self(features) for features in chunks]).T


def move(run: Trajectory, t: int, reads: dict[str, bool], predictor: nn.Module) -> Float[Tensor, "p h"]:
    """Return `predictor`'s movements of all weights of a run from t on, in units of weights."""
    p = run.layout.size
    chunks = (slice(start, min(start + CHUNK, p)) for start in range(0, p, CHUNK))
    moved: Tensor | None = None  # filled chunk by chunk: a list of chunks beside it would double the memory
    for chunk in chunks:
        features = read_features(run, t, chunk, **reads)
        movements = features.scale[:, None] * predictor(features)
        moved = movements.new_empty(p, movements.shape[1]) if moved is None else moved
        moved[chunk] = movements
    return moved


class TransformerForecaster(SharedForecaster):
    """A transformer over time: a token for each of the last WINDOW deltas, and one that sums up the static features.

    One pre-norm block with a single head, of which only the summary's output is computed, since only that is read. With one
    query q, keys and values need not be formed for every token: q . (K x) = (K^T q) . x, whose matrix `query` holds, and
    sum_t a_t V x_t = V sum_t a_t x_t.
    """

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool, d_model: int, seed: int) -> None:
        super().__init__(horizons, with_state, with_context)
        with seeded_init(seed):
            self.token = nn.Linear(self.token_size, d_model)
            self.static = nn.Linear(STATIC, d_model)
            self.position = nn.Parameter(0.02 * torch.randn(WINDOW + 1, d_model))  # as ViT draws its
            self.norm = nn.LayerNorm(d_model)
            self.query = nn.Linear(d_model, d_model)
            self.value = nn.Linear(d_model, d_model)
            self.feed_forward = nn.Sequential(
                nn.LayerNorm(d_model), nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
            )
            self.head = zero_linear(d_model, len(self.horizons))
            self.skip = zero_linear(self.flat_size, len(self.horizons))

    def summarise(self, features: Features) -> Float[Tensor, "n d_model"]:
        """Return what the block makes of each weight's past."""
        tokens = torch.cat([self.token(features.tokens), self.static(features.static)[:, None]], 1) + self.position
        normed = self.norm(tokens)
        scores = (self.query(normed[:, -1])[:, None] * normed).sum(2) * normed.shape[2] ** -0.5
        attended = self.value((scores.softmax(1)[:, :, None] * normed).sum(1))
        summary = tokens[:, -1] + attended
        return summary + self.feed_forward(summary)

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        return self.head(self.summarise(features)) + self.skip(features.flat)


class MLPForecaster(SharedForecaster):
    """A multilayer perceptron on the same features: what the transformer's attention is worth."""

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool, d_model: int, seed: int) -> None:
        super().__init__(horizons, with_state, with_context)
        with seeded_init(seed):
            self.body = nn.Sequential(
                nn.Linear(self.flat_size, d_model), nn.GELU(), nn.Linear(d_model, d_model), nn.GELU()
            )
            self.head = zero_linear(d_model, len(self.horizons))
            self.skip = zero_linear(self.flat_size, len(self.horizons))

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        return self.head(self.body(features.flat)) + self.skip(features.flat)


class RidgeForecaster(SharedForecaster):
    """Ridge regression on the same features, for each parameter tensor: what nonlinearity is worth is the rest.

    n_layers: parameter tensors of the networks that it is fitted on, the only ones that it can forecast.
    """

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool, n_layers: int) -> None:
        super().__init__(horizons, with_state, with_context)
        size, h = self.flat_size, len(self.horizons)
        self.gram = torch.zeros(n_layers, size, size, dtype=torch.float64)
        self.moment = torch.zeros(n_layers, size, h, dtype=torch.float64)
        self.register_buffer("weight", torch.zeros(n_layers, size, h))

    def observe(self, features: Features, target: Float[Tensor, "n h"]) -> None:
        """Add examples."""
        flat, target = features.flat.double(), target.double()
        for layer in features.layer.unique():
            rows = features.layer == layer
            self.gram[layer] += flat[rows].T @ flat[rows]
            self.moment[layer] += flat[rows].T @ target[rows]

    def solve(self, ridge: float) -> None:
        """Fit: (X^T X + ridge diag(X^T X)) w = X^T y."""
        diagonal = torch.diag_embed(self.gram.diagonal(dim1=1, dim2=2))
        # 1e-6: a feature that is always 0, such as a place in the network, must not make the matrix singular
        damped = self.gram + ridge * diagonal + 1e-6 * torch.eye(self.flat_size, dtype=torch.float64)
        self.weight.copy_(torch.linalg.solve(damped, self.moment))

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        return torch.einsum("nd,ndh->nh", features.flat, self.weight[features.layer])


def zero_linear(d_input: int, d_output: int) -> nn.Linear:
    """Return a linear layer of zeros: a forecaster that starts as "no change"."""
    layer = nn.Linear(d_input, d_output)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def movement_target(run: Trajectory, t: int, index: Int[Tensor, " n"], horizons: Sequence[int]) -> Float[Tensor, "n h"]:
    """Return the true movement until t + h in units of the scale at t: what a forecaster should predict."""
    scale = run.scales[t, run.layout.layer_of[index]]
    return torch.stack([(run.weights[t + h, index] - run.weights[t, index]) / scale for h in horizons], 1)


def random_coordinates(layout: Layout, n: int, random: torch.Generator) -> Int[Tensor, " n"]:
    """Return n weights to learn from: three quarters of them uniform, the rest as many of each parameter tensor."""
    uniform = torch.randint(layout.size, (n - n // 4,), generator=random)
    each = -(-(n // 4) // len(layout.shapes))
    spread = [torch.randint(w.start, w.stop, (each,), generator=random) for w in layout.slices.values()]
    return torch.cat([uniform, *spread])


@torch.no_grad()
def roll_out(model: SharedForecaster, run: Trajectory, t: int, steps: int) -> Float[Tensor, "steps p"]:
    """Return forecasts for t + 1, ..., t + steps, each from the ones before it, by the model's shortest horizon, which is 1.

    The optimiser's state is not forecast: it stays as it was at t.
    """
    if model.horizons[0] != 1:
        raise ValueError(f"expected a forecaster whose first horizon is 1, got {model.horizons[0]}")
    past = run.until(t)
    for _ in range(steps):
        ahead = model.predict(past, len(past) - 1)[:1]
        state = None if past.state is None else torch.cat([past.state, past.state[-1:]])
        past = Trajectory(past.layout, torch.cat([past.weights, ahead]), state)
    return past.weights[-steps:]
