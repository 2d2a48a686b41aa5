"""Forecasters that are published with the project: of any network, from its weights alone, without training anything first."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stages.common.files import load_json, remedy, require
from stages.common.released import PROJECT
from stages.common.stage import InputError
from stages.common.work import fingerprint
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.shrinkage import Prior

RELEASED = Path("models/released/forecaster.safetensors")  # in the project's folder: nearest in weights
OUTPUTS = Path("models/released/forecaster-outputs.safetensors")  # nearest in outputs, and better in loss


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
        vectors = {name: torch.tensor(prior[name]) for name in ("factor", "strength", "spread", "noise")}
        believed = Prior(**vectors, worth=float(prior["worth"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{beside} is no card of a forecaster: it has no {error}{remedy(path)}") from None
    if digest != described:
        raise InputError(f"{path} is not the file that {beside} describes: its SHA-256 is another{remedy(path)}")
    model = LayerForecaster(config["horizons"], config["d_model"], config["seed"], config["with_state"])
    model.load_state_dict(load_file(path))
    model.gains = {of: {int(every): row for every, row in rows.items()} for of, rows in card.get("gains", {}).items()}
    return model.eval().requires_grad_(False), believed, card


def default_forecaster() -> LayerForecaster:
    """Return the published forecaster for NowcastOptimizer, wherever the process was started; standard error says which it is.

    It is the one that was learned for outputs: what it proposes is judged by a loss.
    """
    model, _, card = load_released(PROJECT / OUTPUTS)
    learned_from = card["learned_from"]
    print(f"forecasts by {OUTPUTS}, learned from {learned_from['runs']} runs", file=sys.stderr)
    return model
