"""Adapters on disk, as peft's save_pretrained writes them: a folder of adapter_config.json and adapter_model.safetensors (or .bin)."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy
from torch import Tensor

from stages.common.checkpoints import load_weights
from stages.common.containers import listed, shown
from stages.common.files import atomic_path, save_json
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.adapters import Canonical, canonical
from stages.recall.own_base import placed

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # peft's, before the names of modules
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
UNREAD = {  # what would change the meaning of the factors: its value in a plain config
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "megatron_config": None,
    "layer_replication": None,
}
# ways to draw the first factors after which the base is another
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Scaling:
    """By what products of factors are multiplied: alpha over rank, or over its root (rsLoRA); patterns are of single modules."""

    rank: int
    alpha: float
    rooted: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    @classmethod
    def of(cls, config: dict[str, Any], path: Path) -> "Scaling":
        """Return what a config says; InputError if it says nothing that can be reckoned with."""
        try:
            patterns = [dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")]
            return cls(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")), *patterns)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{shown(path)}: expected numbers r and lora_alpha, and patterns of them, as peft writes"
            ) from None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return int(matched(self.ranks, module, self.rank))

    def scale(self, module: str) -> float:
        """Return the factor of a module's product."""
        rank = self.rank_of(module)
        return float(matched(self.alphas, module, self.alpha)) / (rank**0.5 if self.rooted else rank)


def matched(pattern: dict[str, Any], module: str, default: float) -> float:
    """Return the value of the first pattern that is the end of a module's name, as peft matches it."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return float(value)
    return default


def adapter_folder(path: Path) -> Path | None:
    """Return the folder of the adapter that a path names, by itself or by one of its files; None if it names none."""
    folder = path.parent if path.name in (CONFIG, *FILES) else path
    return folder if (folder / CONFIG).is_file() else None


def load_adapter(folder: Path, layout: Layout) -> tuple[dict[str, Canonical], list[str]]:
    """Return the change of each adapted matrix of a network of this layout in canonical form, and notes on what was left out.

    InputError if it is no LoRA adapter, or one of another network.
    """
    config_path, path = folder / CONFIG, next((folder / name for name in FILES if (folder / name).is_file()), None)
    if not config_path.is_file() or path is None:
        raise InputError(
            f"{shown(folder)} is no adapter: expected a folder with {CONFIG} and {FILES[0]} (or .bin), as peft saves it"
        )
    scaling = Scaling.of(load_config(config_path), config_path)
    weights, notes = load_weights(path)
    factors: dict[str, dict[str, np.ndarray]] = {}
    beside = []
    for key, tensor in weights.items():
        match = KEY.fullmatch(key)
        if match:
            factors.setdefault(match["module"].removeprefix(PREFIX), {})[match["factor"]] = tensor.double().numpy()
        elif ".lora_" in key:
            raise InputError(
                f"{shown(path)}: {shown(key)} is no factor of plain LoRA: merge the adapter and give --checkpoint"
            )
        else:
            beside.append(key)
    if not factors:
        raise InputError(
            f"{shown(path)} has no lora_A and lora_B: expected names like {PREFIX}blocks.0.attn.qkv.lora_A.weight"
        )
    if beside:
        notes.append(f"not read: {listed(beside)}, which is saved beside the adapter")
    forms = [place(path, module, pair, scaling, layout) for module, pair in factors.items()]
    adapters = {name: form for name, form in summed(forms).items() if len(form.s)}
    if not adapters:
        raise InputError(
            f"{shown(path)} changes nothing: its factors B are zeros, as before training; give it after training"
        )
    return adapters, notes


def load_beside(folder: Path) -> dict[str, Tensor]:
    """Return what is saved beside the factors of an adapter that `load_adapter` reads, under its names."""
    weights, _ = load_weights(next(folder / name for name in FILES if (folder / name).is_file()))
    return {key: tensor for key, tensor in weights.items() if ".lora_" not in key}


def load_config(path: Path) -> dict[str, Any]:
    """Return a config; InputError if it is of no adapter that can be read from its factors alone."""
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{shown(path)} is no config of peft: expected a JSON object") from None
    kind = str(config.get("peft_type", "nothing"))
    if kind.upper() != "LORA":
        raise InputError(
            f"{shown(path)}: peft_type: expected LORA, got {shown(kind)}: merge the adapter and give --checkpoint"
        )
    for key, plain in UNREAD.items():
        if config.get(key, plain) not in (plain, None):
            raise InputError(
                f"{shown(path)}: {key}: expected {plain}, got {shown(config[key])}: merge the adapter and give --checkpoint"
            )
    if (drawn := str(config.get("init_lora_weights")).lower()).startswith(MOVES_THE_BASE):
        raise InputError(
            f"{shown(path)}: init_lora_weights: {shown(drawn)} takes its first factors out of the base, so they are no change of it: merge "
            "the adapter and give --checkpoint"
        )
    return config


def place(
    path: Path, module: str, pair: dict[str, np.ndarray], scaling: Scaling, layout: Layout
) -> tuple[str, Canonical]:
    """Return which matrix of the network a pair of factors changes, and how; InputError if none of these shapes."""
    key, part = f"{module}.weight", None
    names = [name for name in layout.shapes if key == name or key.endswith(f".{name}")]
    if not names and (found := placed(key)) is not None and found[0] in layout.shapes:
        names, part = [found[0]], found[1]
    if not names:
        raise InputError(
            f"{shown(path)}: the base has no module {shown(module)}: give an adapter of this base, under its names"
        )
    (name,) = names
    if missing := {"A", "B"} - pair.keys():
        raise InputError(f"{shown(path)}: {shown(module)} has no lora_{min(missing)}: save both factors")
    a, b = pair["A"].reshape(len(pair["A"]), -1), pair["B"].reshape(len(pair["B"]), -1)
    rank, shape = scaling.rank_of(module), layout.shapes[name]
    outputs, inputs = shape[0] if part is None else shape[0] // 3, int(np.prod(shape[1:]))
    if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
        raise InputError(
            f"{shown(path)}: {shown(module)}: expected lora_A {(rank, inputs)} and lora_B {(outputs, rank)}, got {a.shape} and {b.shape}"
        )
    if part is not None:  # of queries, keys and values, which are one matrix here
        b = np.pad(b, ((part * outputs, (2 - part) * outputs), (0, 0)))
    return name, canonical(b, a, scaling.scale(module))


def summed(forms: list[tuple[str, Canonical]]) -> dict[str, Canonical]:
    """Return the change of each matrix: the sum of its changes, if its queries, keys and values have one each."""
    of: dict[str, list[Canonical]] = {}
    for name, form in forms:
        of.setdefault(name, []).append(form)
    return {
        name: several[0]
        if len(several) == 1
        else canonical(np.hstack([f.u * f.s for f in several]), np.hstack([f.v for f in several]).T)
        for name, several in of.items()
    }


def save_adapter(folder: Path, adapters: dict[str, Canonical]) -> None:
    """Write an adapter as peft does: its factors share the singular values, its scale is 1."""
    rank = max(len(form.s) for form in adapters.values())
    factors = {}
    for name, form in adapters.items():
        key, root = f"{PREFIX}{name.removesuffix('.weight')}", np.sqrt(form.s)
        a, b = np.zeros((rank, len(form.v)), np.float32), np.zeros((len(form.u), rank), np.float32)
        a[: len(root)], b[:, : len(root)] = (form.v * root).T, form.u * root
        factors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    modules = sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in adapters})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
    }
    config |= {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": modules, "fan_in_fan_out": False}
    save_json(folder / CONFIG, config)
    with atomic_path(folder / FILES[0]) as temporary:
        temporary.write_bytes(safetensors_numpy.save(factors, metadata={"format": "pt"}))
