"""Build forecasters of every kind from what their files say of them."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.common.checkpoints import Checkpoint, load_torch
from stages.common.stage import InputError
from stages.forecast.diffusion import DiffusionForecaster
from stages.forecast.jump import JumpForecaster
from stages.forecast.pca import CoefficientForecaster
from stages.forecast.shared import MLPForecaster, RidgeForecaster, TransformerForecaster


def build_forecaster(config: dict[str, Any], pca: dict[str, Tensor] | None = None) -> nn.Module:
    """Return an untrained forecaster. config: kind, horizons, with_state, with_context, n_layers, d_model, seed.

    pca: mean [p] and basis [k, p], for kind `pca_transformer` alone.
    """
    reads = [config[key] for key in ("horizons", "with_state", "with_context")]
    match config["kind"]:
        case "transformer":
            return TransformerForecaster(*reads, config["d_model"], config["seed"])
        case "jump":
            return JumpForecaster(TransformerForecaster(*reads, config["d_model"], config["seed"]))
        case "mlp":
            return MLPForecaster(*reads, config["d_model"], config["seed"])
        case "diffusion":
            return DiffusionForecaster(*reads, config["d_model"], config["seed"])
        case "ridge":
            return RidgeForecaster(*reads, config["n_layers"])
        case "pca_transformer":
            return CoefficientForecaster(
                pca["mean"], pca["basis"], config["horizons"], config["d_model"], config["seed"]
            )
        case kind:
            raise ValueError(f"expected a known kind of forecaster, got {kind!r}")


def load_forecaster(path: Path, kind: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """Return a trained forecaster and its config; InputError if the file is missing, damaged, or not of `kind`."""
    saved = load_torch(path, {"config", "state_dict"})
    config, state = saved["config"], saved["state_dict"]
    if kind is not None and config["kind"] != kind:
        raise InputError(f"{path}: expected a forecaster of kind {kind}, got {config['kind']}")
    model = build_forecaster(config, state)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), config
