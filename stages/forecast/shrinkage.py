"""How far a forecast can be trusted, going by the run's own past: forecasts shrunk towards the last weights.

A forecast moves a layer by y, where it then moves by d. Of all k, the movement k y has the least error |d - k y|^2 at
k = <y, d> / <y, y>: 1 of a forecast to be trusted, 0 of one that knows nothing. Origins whose future is known by now tell k; where
they are few, a prior counts for more. Going over all past origins, k is kept within 0 and 1: a shrunk forecast never moves further.
Up to twice the best k a forecast is no worse than to keep the last weights, so far it is safe: it is trusted no further than twice
what <y, d> is at least, in 99 runs of 100.

Axes: o origins, h horizons, l layers, p all weights of a network, n some of them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.common.vectors import Layout
from stages.forecast.trajectory import WINDOW, Trajectory, moved_lately

SAMPLE = 1 << 14  # weights of a layer by which a forecast is checked: of larger ones, evenly spread
LAYER_WORTH = 2.0  # origins that what all layers tell counts for, beside a layer's own
CAUTION = 2.33  # standard deviations: 99 runs in 100
BREAK_EVEN = 2.0  # times the best factor is as bad as not to move
NEARBY = 0.5
SMALLEST = 1e-30  # of squares: a layer that stands still must not divide by 0


class Forecaster(Protocol):
    """What forecasts the movements of some weights until t + h."""

    horizons: tuple[int, ...]

    def movements(self, run: Trajectory, t: int, index: Int[Tensor, " n"]) -> Float[Tensor, "h n"]: ...


@dataclass(frozen=True)
class Prior:
    """What is believed of a forecaster before a run's own past speaks, of each horizon.

    factor: how far its movements can be trusted, 0 to 1. strength: <y, y> over <d, d>. spread: standard deviation between runs of
    <y, d> over <d, d>, 0 to ask for no caution; noise: between the origins of a run. worth: how many origins it counts for.
    """

    factor: Float[Tensor, " h"]
    strength: Float[Tensor, " h"]
    spread: Float[Tensor, " h"]
    noise: Float[Tensor, " h"]
    worth: float

    @staticmethod
    def sceptical(horizons: int) -> "Prior":
        """Return that of a forecaster of which nothing is known: to keep the last weights."""
        none = torch.zeros(horizons)
        return Prior(none, torch.full((horizons,), 0.2), none, torch.ones(horizons), 2.0)


@dataclass(frozen=True)
class Agreement:
    """How forecasts from past origins agree with what came, by layer: <y, d>, <y, y> and <d, d>, nan where that is not known yet.

    first: the first origin; each following snapshot is one.
    """

    horizons: tuple[int, ...]
    cross: Float[Tensor, "o h l"]
    square: Float[Tensor, "o h l"]
    energy: Float[Tensor, "o h l"]
    first: int = WINDOW

    def until(self, t: int) -> "Agreement":
        """Return what is known at t: of origins s and horizons h with s + h <= t."""
        origins = self.first + torch.arange(len(self.cross))
        known = (origins[:, None] + torch.tensor(self.horizons) <= t)[:, :, None]
        cross, square, energy = (torch.where(known, x, torch.nan) for x in (self.cross, self.square, self.energy))
        return Agreement(self.horizons, cross, square, energy, self.first)

    def errors(self, factors: Float[Tensor, "h l"] | Float[Tensor, "o h l"]) -> Float[Tensor, "o h l"]:
        """Return |d - k y|^2."""
        return self.energy - 2 * factors * self.cross + factors**2 * self.square


def sample_of(layout: Layout) -> Int[Tensor, " n"]:
    """Return evenly spread weights of each layer, all of one with SAMPLE or fewer."""
    spread = [torch.arange(w.start, w.stop, max(1, (w.stop - w.start) // SAMPLE)) for w in layout.slices.values()]
    return torch.cat(spread)


def compare_with_past(model: Forecaster, run: Trajectory) -> Agreement:
    """Return how forecasts from each snapshot on agree with what is known of the run after it."""
    index = sample_of(run.layout)
    layer, layers = run.layout.layer_of[index], len(run.layout.shapes)
    counts = torch.bincount(layer, minlength=layers)
    weight = torch.tensor(run.layout.sizes) / counts  # so many weights does one of the sample stand for
    origins = range(WINDOW, len(run) - 1)
    sums = torch.full((3, len(origins), len(model.horizons), layers), torch.nan, dtype=torch.float64)
    for o, t in enumerate(origins):
        known = [i for i, h in enumerate(model.horizons) if t + h < len(run)]
        if not known:
            break
        # what stands still is not forecast
        y = (model.movements(run, t, index)[known] * moved_lately(run, t, index)).double()
        d = (run.weights[[t + model.horizons[i] for i in known]][:, index] - run.weights[t, index]).double()
        for part, product in enumerate((y * d, y * y, d * d)):
            totals = torch.zeros(len(known), layers, dtype=torch.float64).index_add_(1, layer, product)
            sums[part, o, known] = totals * weight
    return Agreement(model.horizons, *sums)


def evidence(agreement: Agreement) -> Float[Tensor, "5 o h l"]:
    """Return what each origin tells of each layer: <y, d> and <y, y> over its own <d, d>, both over that of all layers, and the share
    of the first in the second; 0 where it is not known.

    Each origin counts alike, whatever its movements' size, but those of horizon h overlap: together they count for 1/h of their number.
    """
    energy = agreement.energy.clamp(min=SMALLEST)
    total = energy.sum(2, keepdim=True)
    parts = [agreement.cross / energy, agreement.square / energy, agreement.cross / total, agreement.square / total]
    overlap = torch.tensor(agreement.horizons)[:, None]
    return torch.stack([*parts, energy / total]).nan_to_num() / overlap


def trusted(sums: Float[Tensor, "5 *o h l"], prior: Prior) -> Float[Tensor, "*o h l"]:
    """Return how far to trust each horizon's movement of each layer, by the evidence of all origins.

    All layers together are shrunk towards the prior, each layer towards all together.
    """
    own_cross, own_square = sums[:2]
    cross, square, origins = sums[2:].sum(-1)
    belief = prior.worth * prior.strength.double()
    all_layers = (belief * prior.factor + cross) / (belief + square).clamp(min=SMALLEST)
    strength = (belief + square) / (prior.worth + origins)
    belief = (LAYER_WORTH * strength)[..., None]
    by_layer = ((belief * all_layers[..., None] + own_cross) / (belief + own_square).clamp(min=SMALLEST)).clamp(0, 1)
    return torch.minimum(by_layer, cautious(sums, prior)[..., None])


def cautious(sums: Float[Tensor, "5 *o h l"], prior: Prior) -> Float[Tensor, "*o h"]:
    """Return the largest factor that is safe to the CAUTION-th standard deviation, going by the prior and by what is known so far.

    |d - k y|^2 is at most |d|^2 up to k = BREAK_EVEN <y, d> / <y, y>. <y, d> over <d, d> is normal between runs, and within a run
    between origins; what shorter horizons tell counts, too, and by NEARBY less from one to the next.
    """
    known = sums[2:].sum(-1)
    told = [known[..., 0]]
    for i in range(1, known.shape[-1]):
        told.append(known[..., i] + NEARBY * told[-1])
    cross, square, origins = torch.stack(told, -1)
    mean, strength, spread, noise = (
        x.double() for x in (prior.factor * prior.strength, prior.strength, prior.spread, prior.noise)
    )
    worth = (noise / spread.clamp(min=1e-6)) ** 2  # of the prior, in origins
    expected = (worth * mean + cross) / (worth + origins)
    deviation = noise / (worth + origins).sqrt()
    best = (expected - CAUTION * deviation) / ((worth * strength + square) / (worth + origins)).clamp(min=SMALLEST)
    return torch.where(spread > 0, (BREAK_EVEN * best).clamp(0, 1), 1.0)


def shrinkage(agreement: Agreement, prior: Prior) -> Float[Tensor, "h l"]:
    """Return how far to trust each horizon's movement of each layer, 0 to 1, by all that is known."""
    return trusted(evidence(agreement).sum(1), prior)


def causal_shrinkage(agreement: Agreement, prior: Prior) -> Float[Tensor, "o h l"]:
    """Return what `shrinkage` would have said at every past origin, by what was known then: of origins h earlier or more."""
    so_far = evidence(agreement).cumsum(1)
    known = torch.zeros_like(so_far)
    for i, h in enumerate(agreement.horizons):
        known[:, h:, i] = so_far[:, : max(0, so_far.shape[1] - h), i]
    return trusted(known, prior)


def spread_over_weights(factors: Float[Tensor, " l"], layout: Layout) -> Float[Tensor, " p"]:
    """Return each weight's factor: that of its layer."""
    return factors.float().repeat_interleave(torch.tensor(layout.sizes))


def trust(ratios: dict[int, float], origins: dict[int, int], snapshots: int) -> str:
    """Return in words how far shrunk forecasts can be trusted; ratios: of errors, to keeping the last weights, by horizon."""
    if not ratios:
        return f"{snapshots} snapshots are too few to check a forecast on: trust it no further than its card says"
    good = [h for h, ratio in ratios.items() if ratio <= 0.95]
    poor = [h for h in ratios if h not in good]
    parts = []
    if good:
        best = ", ".join(f"{ratios[h]:.2f} at {h}" for h in good)
        parts.append(f"it would have been nearer than the last weights so far (error {best} ahead)")
    if poor:
        parts.append(f"{' and '.join(map(str, poor))} ahead it knows little more than to keep the last weights")
    few = [h for h in ratios if origins[h] < 3 * h]
    if few:
        parts.append(f"{' and '.join(map(str, few))} ahead the past is short, and tells little")
    return "how far to trust it: " + "; ".join(parts)
