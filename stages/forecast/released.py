"""Forecasters that are published with the project: of any network, without training anything first.

Two read weights alone. A third reads the optimiser's state, too, and serves the horizons at which that helps.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import load_json, remedy, require
from stages.common.released import PROJECT
from stages.common.stage import InputError
from stages.common.work import fingerprint
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.shrinkage import Prior
from stages.forecast.trajectory import Forecast, Trajectory

RELEASED = Path("models/released/forecaster.safetensors")  # in the project's folder: nearest in weights
OUTPUTS = Path("models/released/forecaster-outputs.safetensors")  # nearest in outputs, and better in loss
STATE = Path("models/released/forecaster-state.safetensors")  # nearest in weights where the optimiser's state is known
BELIEFS = ("factor", "strength", "spread", "noise")  # of a prior, of each horizon


@dataclass(frozen=True)
class ByHorizon:
    """Two forecasters of the same horizons as one: one reads the optimiser's state and `serves` some, one of weights alone the others."""

    with_state: LayerForecaster
    weights_only: LayerForecaster
    serves: tuple[int, ...]

    @property
    def horizons(self) -> tuple[int, ...]:
        """Those of both."""
        return self.weights_only.horizons

    def _rows(self, forecast: Callable[[LayerForecaster], Float[Tensor, "h n"]]) -> Float[Tensor, "h n"]:
        rows = forecast(self.weights_only)
        for i, row in enumerate(forecast(self.with_state)):
            if self.horizons[i] in self.serves:
                rows[i] = row
        return rows

    def movements(self, run: Trajectory, t: int, index: Int[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """Return how far the weights at the increasing `index` move until t + h for every horizon; ValueError if the run has no state."""
        return self._rows(lambda model: model.movements(run, t, index))

    def predict(self, run: Trajectory, t: int) -> Forecast:
        """Return the weights of a run at t + h for every horizon; ValueError if the run has no state."""
        return self._rows(lambda model: model.predict(run, t))


def load_released(path: Path) -> tuple[LayerForecaster, Prior, dict[str, Any]]:
    """Return a forecaster of learn_world, what is believed of it beforehand, and its card, the JSON beside the file of its weights.

    InputError if either is missing or damaged, or if they do not belong together.
    """
    beside = path.with_suffix(".json")
    digest = fingerprint(require(path))
    card = load_json(beside)
    try:
        config, prior = card["config"], card["prior"]
        described = card["sha256"]
        vectors = {name: torch.tensor(prior[name]) for name in BELIEFS}
        believed = Prior(**vectors, worth=float(prior["worth"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{beside} is no card of a forecaster: it has no {error}{remedy(path)}") from None
    if digest != described:
        raise InputError(f"{path} is not the file that {beside} describes: its SHA-256 is another{remedy(path)}")
    model = LayerForecaster(config["horizons"], config["d_model"], config["seed"], config["with_state"])
    model.load_state_dict(load_file(path))
    model.gains = {of: {int(every): row for every, row in rows.items()} for of, rows in card.get("gains", {}).items()}
    return model.eval().requires_grad_(False), believed, card


def load_with_state(path: Path) -> tuple[ByHorizon, Prior, dict[str, Any]]:
    """Return a forecaster that reads the optimiser's state where that helps, what is believed of it beforehand, and its card.

    The card says which horizons it `serves`; the others are those of RELEASED's file beside it. InputError as load_released.
    """
    model, prior, card = load_released(path)
    other, belief, _ = load_released(path.with_name(RELEASED.name))
    if not card["config"]["with_state"] or not card.get("serves") or model.horizons != other.horizons:
        raise InputError(
            f"{path}: expected a forecaster that reads the optimiser's state, whose card says which horizons it serves"
        )
    served = torch.tensor([h in card["serves"] for h in model.horizons])
    vectors = {name: torch.where(served, getattr(prior, name), getattr(belief, name)) for name in BELIEFS}
    return ByHorizon(model, other, tuple(card["serves"])), Prior(**vectors, worth=belief.worth), card


def default_forecaster() -> LayerForecaster:
    """Return the published forecaster for NowcastOptimizer, wherever the process was started; standard error says which it is.

    It is the one that was learned for outputs: what it proposes is judged by a loss.
    """
    model, _, card = load_released(PROJECT / OUTPUTS)
    learned_from = card["learned_from"]
    print(f"forecasts by {OUTPUTS}, learned from {learned_from['runs']} runs", file=sys.stderr)
    return model
