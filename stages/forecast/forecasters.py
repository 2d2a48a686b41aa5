"""Forecast the weights of a network from its past: w(t + h) = w(t) + scale(t) y_h, for several horizons h at once.

The learned forecasters share one predictor over all weights and start as "no change" (their last layers are zero), so that
what they learn is the movement. The others are the baselines that they have to beat.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.common.artifacts import require
from stages.forecast.trajectory import WINDOW, Features, Layout, Trajectory, read_features

Forecast = Float[Tensor, "h p"]
CHUNK = 16384  # weights forecast at a time


class SharedForecaster(nn.Module):
    """A predictor shared over weights: features of n weights -> movements [n, h] in units of the scale. Subclasses say how.

    horizons: snapshots ahead. with_state: reads the optimiser's direction. with_context: reads means over the two neurons
    that a weight connects. Of subclasses, n_layers: parameter tensors of the networks to forecast; d_model: width.
    """

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool) -> None:
        super().__init__()
        self.horizons = tuple(horizons)
        self.reads = {"with_state": with_state, "with_context": with_context}
        self.token_size = 2 + with_state + with_context * (2 + 2 * with_state)
        self.static_size = 5
        self.flat_size = WINDOW * self.token_size + self.static_size

    @torch.no_grad()
    def predict(self, run: Trajectory, t: int) -> Forecast:
        """Return the weights of a run at t + h for every horizon, from its snapshots up to t."""
        movement = []
        for index in torch.arange(run.layout.size).split(CHUNK):
            features = read_features(run, t, index, **self.reads)
            movement.append((features.scale[:, None] * self(features)).T)
        return run.weights[t] + torch.cat(movement, 1)


class TransformerForecaster(SharedForecaster):
    """A transformer over time: a token for each of the last WINDOW deltas, and one that sums up the static features and the layer.

    One pre-norm block, of which only the summary's output is computed, since only that is read: attention of one query
    over WINDOW + 1 keys costs an eighth of a full block.
    """

    def __init__(
        self, horizons: Sequence[int], with_state: bool, with_context: bool, n_layers: int, d_model: int, seed: int
    ) -> None:
        super().__init__(horizons, with_state, with_context)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.token = nn.Linear(self.token_size, d_model)
            self.static = nn.Linear(self.static_size, d_model)
            self.layer = nn.Embedding(n_layers, d_model)
            self.position = nn.Parameter(0.02 * torch.randn(WINDOW + 1, d_model))
            self.norm = nn.LayerNorm(d_model)
            self.query = nn.Linear(d_model, d_model)
            self.key_value = nn.Linear(d_model, 2 * d_model)
            self.feed_forward = nn.Sequential(
                nn.LayerNorm(d_model), nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
            )
            self.head = zero_linear(d_model, len(self.horizons))
            self.skip = zero_linear(self.flat_size, len(self.horizons))

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        summary = self.static(features.static) + self.layer(features.layer)
        tokens = torch.cat([self.token(features.tokens), summary[:, None]], 1) + self.position
        normed = self.norm(tokens)
        query, (keys, values) = self.query(normed[:, -1]), self.key_value(normed).chunk(2, -1)
        attention = (torch.einsum("nd,ntd->nt", query, keys) * query.shape[1] ** -0.5).softmax(1)
        summary = tokens[:, -1] + torch.einsum("nt,ntd->nd", attention, values)
        return self.head(summary + self.feed_forward(summary)) + self.skip(features.flat)


class MLPForecaster(SharedForecaster):
    """A multilayer perceptron on the same features: what the transformer's attention is worth."""

    def __init__(
        self, horizons: Sequence[int], with_state: bool, with_context: bool, n_layers: int, d_model: int, seed: int
    ) -> None:
        super().__init__(horizons, with_state, with_context)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Embedding(n_layers, 16)
            self.body = nn.Sequential(
                nn.Linear(self.flat_size + 16, d_model), nn.GELU(), nn.Linear(d_model, d_model), nn.GELU()
            )
            self.head = zero_linear(d_model, len(self.horizons))
            self.skip = zero_linear(self.flat_size, len(self.horizons))

    def forward(self, features: Features) -> Float[Tensor, "n h"]:
        flat = features.flat
        return self.head(self.body(torch.cat([flat, self.layer(features.layer)], 1))) + self.skip(flat)


class RidgeForecaster(SharedForecaster):
    """Ridge regression on the same features, for each parameter tensor: what nonlinearity is worth is the rest."""

    def __init__(self, horizons: Sequence[int], with_state: bool, with_context: bool, n_layers: int) -> None:
        super().__init__(horizons, with_state, with_context)
        size = self.flat_size
        self.register_buffer("gram", torch.zeros(n_layers, size, size, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(n_layers, size, len(self.horizons), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(n_layers, size, len(self.horizons)))

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


# --- baselines: functions of a run, an origin t and horizons -------------------------------------------------------------


def persistence(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """The last weights: w(t)."""
    return run.weights[t].expand(len(horizons), -1)


def linear(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """w(t) + h d(t), with the last delta d."""
    h = torch.tensor(horizons)[:, None]
    return run.weights[t] + h * (run.weights[t] - run.weights[t - 1])


def quadratic(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """w(t) + h d(t) + h (h + 1) / 2 (d(t) - d(t - 1)): the parabola through the last three snapshots."""
    h = torch.tensor(horizons)[:, None]
    delta, before = run.weights[t] - run.weights[t - 1], run.weights[t - 1] - run.weights[t - 2]
    return run.weights[t] + h * delta + h * (h + 1) / 2 * (delta - before)


def average(n: int) -> Callable[[Trajectory, int, Sequence[int]], Forecast]:
    """The mean of the last n snapshots (latest weight averaging, Kaddour 2022, arXiv:2209.14981)."""

    def latest_average(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
        return run.weights[t - n + 1 : t + 1].mean(0).expand(len(horizons), -1)

    return latest_average


def dynamic_modes(run: Trajectory, t: int, horizons: Sequence[int], rank: int = 8, window: int = 30) -> Forecast:
    """Dynamic mode decomposition of the last `window` snapshots (Schmid 2010), with the part outside its modes kept as it is."""
    past = run.weights[max(0, t - window + 1) : t + 1].double()
    mean, centred = past.mean(0), past - past.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    basis = centred.T @ vectors[:, -rank:] / values[-rank:].clamp(min=1e-12).sqrt()  # [p, rank]
    coefficients = centred @ basis
    step = torch.linalg.lstsq(coefficients[:-1], coefficients[1:]).solution
    outside = past[-1] - mean - basis @ coefficients[-1]
    ahead = [coefficients[-1] @ torch.linalg.matrix_power(step, h) for h in horizons]
    return torch.stack([mean + basis @ c + outside for c in ahead]).float()


BASELINES = {
    "persistence": persistence,
    "linear": linear,
    "quadratic": quadratic,
    "dmd": dynamic_modes,
    "average_3": average(3),
    "average_5": average(5),
    "average_7": average(7),
}


# --- the plain design: a transformer over PCA coefficients ----------------------------------------------------------------


class CoefficientForecaster(nn.Module):
    """The design this system started from: PCA of whole weight vectors, a transformer from the coefficients of the last 3
    snapshots to the next ones, unnormalised, applied again and again for longer horizons.
    """

    sequence = 3

    def __init__(
        self, mean: Float[Tensor, " p"], basis: Float[Tensor, "k p"], horizons: Sequence[int], d_model: int, seed: int
    ):
        super().__init__()
        self.horizons = tuple(horizons)
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
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


def principal_components(
    snapshots: Float[Tensor, "n p"], k: int
) -> tuple[Float[Tensor, " p"], Float[Tensor, "k p"], Float[Tensor, " n"]]:
    """Return the mean, the min(k, n - 1) principal axes and all n variances, by the Gram matrix (n is much smaller than p)."""
    mean = snapshots.mean(0)
    centred = (snapshots - mean).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = min(k, len(snapshots) - 1)
    basis = (vectors[:, :k].T @ centred) / values[:k, None].sqrt().clamp(min=1e-12)
    return mean, basis.float(), (values / len(snapshots)).float()


def build_forecaster(config: dict[str, Any], pca: dict[str, Tensor] | None = None) -> nn.Module:
    """Return an untrained forecaster. config: kind, horizons, with_state, with_context, n_layers, d_model, seed.

    pca: mean [p] and basis [k, p], for kind `pca_transformer` alone.
    """
    reads = [config[key] for key in ("horizons", "with_state", "with_context", "n_layers")]
    match config["kind"]:
        case "transformer":
            return TransformerForecaster(*reads, config["d_model"], config["seed"])
        case "mlp":
            return MLPForecaster(*reads, config["d_model"], config["seed"])
        case "ridge":
            return RidgeForecaster(*reads)
        case "pca_transformer":
            return CoefficientForecaster(
                pca["mean"], pca["basis"], config["horizons"], config["d_model"], config["seed"]
            )
        case kind:
            raise ValueError(f"expected transformer, mlp, ridge or pca_transformer, got {kind!r}")


def load_forecaster(path: Path) -> nn.Module:
    """Return a trained forecaster; InputError if the file is missing."""
    saved = torch.load(require(path), weights_only=True)
    state = saved["state_dict"]
    model = build_forecaster(saved["config"], state)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def random_coordinates(layout: Layout, n: int, random: torch.Generator) -> Int[Tensor, " n"]:
    """Return n weights to learn from: three quarters of them uniform, the rest as many of each parameter tensor."""
    uniform = torch.randint(layout.size, (n - n // 4,), generator=random)
    each = -(-(n // 4) // len(layout.shapes))
    spread = [torch.randint(w.start, w.stop, (each,), generator=random) for w in layout.slices.values()]
    return torch.cat([uniform, *spread])
