"""Classifiers that others trained: which of a file's tensors are the embedding, the bilinear blocks and the head.

Read are the layout of this project, which is that of the paper's code (github.com/tdooms/bilinear-decomposition: embed, blocks with
one stacked weight, head), blocks with w_l and w_r or linear1 and linear2 apart, and linear_in, layers, linear_out in place of the
names. Weights lie in files that `stages.common.checkpoints` reads. What is no product of two linear maps is refused: norms, gates.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.bilinear.model import BilinearImageClassifier
from stages.bilinear.training import CHECKPOINT_KEYS, load_model
from stages.common.checkpoints import load_weights
from stages.common.containers import listed, read_file, shown
from stages.common.files import load_json
from stages.common.runtime import pick_device
from stages.common.stage import InputError

EXPECTED = "expected embed.weight, blocks.<i>.weight (or w_l and w_r) with or without bias, and head.weight"
PLACES = (  # of a tensor by its name, after any prefix
    ("embed", re.compile(r"(?:embed|linear_in)\.(weight|bias)")),
    ("head", re.compile(r"(?:head|linear_out)\.(weight|bias)")),
    ("both", re.compile(r"(?:blocks|layers)\.(\d+)\.(weight|bias)")),
    ("left", re.compile(r"(?:blocks|layers)\.(\d+)\.(?:w_l|linear1)(?:\.(weight|bias))?")),
    ("right", re.compile(r"(?:blocks|layers)\.(\d+)\.(?:w_r|linear2)(?:\.(weight|bias))?")),
)
PREFIX = re.compile(r"^(.*?)(?:embed|linear_in)\.weight$")
PLAIN = (None, False, "", "none", "None", "bilinear", "identity", 0)  # values of a norm or gate that is not there

Parts = dict[tuple[str, int, str], Tensor]  # kind, block, weight or bias


def load_classifier(source: str | Path, residual: bool | None = None) -> tuple[BilinearImageClassifier, list[str]]:
    """Return the classifier of a file, and notes on what was taken for granted; it is on the picked device.

    residual: h + B(h) instead of B(h), which weights do not tell; None: as the file's own config says, else no. InputError if the
    file is no bilinear classifier.
    """
    config, ours = _config(source)
    if ours and residual is None:
        return load_model(source)[0], []
    weights, notes = load_weights(source)
    parts = _parts(weights, str(source))
    if residual is None:
        residual = bool(config.get("residual", False))
        if "residual" not in config:
            notes.append("weights do not say whether blocks are residual: none is (--residual otherwise)")
    if not config:
        notes.append("weights do not tell norms without weights, or gates: there is none, by assumption")
    model = build(parts, residual, str(source))
    return model.to(pick_device()).eval().requires_grad_(False), notes


def build(parts: Parts, residual: bool, source: str) -> BilinearImageClassifier:
    """Return the classifier of the parts; InputError if their shapes do not fit together.

    A bias of the head becomes one more hidden unit, which is always 1: the products of two biases of 1 with no weights.
    """
    embed, head = parts["embed", 0, "weight"], parts["head", 0, "weight"]
    layers = 1 + max(block for _, block, _ in parts)
    blocks = [_block(parts, layer, source) for layer in range(layers)]
    d_hidden = len(embed)
    for layer, (weight, _) in enumerate(blocks):
        _expect(f"block {layer}", weight, (2 * d_hidden, d_hidden), source)
    _expect("the head", head, (len(head), d_hidden), source)
    has_bias = any(bias is not None for _, bias in blocks)
    stacked = [(w, w.new_zeros(2 * d_hidden) if b is None else b) for w, b in blocks]
    if (shift := parts.get(("head", 0, "bias"))) is not None and shift.any():
        embed = torch.cat([embed, embed.new_zeros(1, embed.shape[1])])
        head = torch.cat([head, shift[:, None]], 1)
        ones = [float(not residual or layer == 0) for layer in range(layers)]  # a residual 1 stays
        stacked = [_with_constant(w, b, one) for (w, b), one in zip(stacked, ones, strict=True)]
        has_bias, d_hidden = True, d_hidden + 1
    model = BilinearImageClassifier(embed.shape[1], d_hidden, len(head), layers, has_bias, residual, seed=0)
    state = {"embed.weight": embed, "head.weight": head}
    for layer, (weight, bias) in enumerate(stacked):
        state |= {f"blocks.{layer}.weight": weight} | ({f"blocks.{layer}.bias": bias} if has_bias else {})
    model.to(embed.dtype).load_state_dict(state)
    return model.float() if embed.dtype in (torch.float16, torch.bfloat16) else model


def _with_constant(
    weight: Float[Tensor, "h2 h"], bias: Float[Tensor, " h2"], one: float
) -> tuple[Float[Tensor, "_ _"], Float[Tensor, " _"]]:
    """Return a block with one more unit, whose output is `one`."""
    weights = [torch.nn.functional.pad(half, (0, 1, 0, 1)) for half in weight.chunk(2)]
    biases = [torch.nn.functional.pad(half, (0, 1), value=one) for half in bias.chunk(2)]
    return torch.cat(weights), torch.cat(biases)


def _block(parts: Parts, layer: int, source: str) -> tuple[Float[Tensor, "h2 h"], Float[Tensor, " h2"] | None]:
    """Return L above R, and their biases alike; InputError if the block lacks any."""

    def stacked(kind: str) -> Tensor | None:
        halves = [parts.get((side, layer, kind)) for side in ("left", "right")]
        if (both := parts.get(("both", layer, kind))) is not None:
            return both
        present = [half for half in halves if half is not None]
        if len(present) == 1 or (len(present) == 2 and present[0].shape != present[1].shape):
            raise InputError(
                f"{shown(source)}: block {layer} has two maps of which the {kind}s do not match: {EXPECTED}"
            )
        return torch.cat(present) if present else None

    weight, bias = stacked("weight"), stacked("bias")
    if weight is None:
        raise InputError(f"{shown(source)} has no weight of block {layer}: {EXPECTED}")
    return weight, bias


def _parts(weights: Mapping[str, Tensor], source: str) -> Parts:
    """Return the tensors by what they are; InputError if any is none of a bilinear classifier's."""
    found = [match[1] for match in map(PREFIX.match, weights) if match]
    if not found:
        raise InputError(f"{shown(source)} is no bilinear classifier: {EXPECTED}, got {listed(weights)}")
    prefix, parts, others = min(found, key=len), {}, []
    for name, tensor in weights.items():
        for kind, pattern in PLACES:
            if match := pattern.fullmatch(name.removeprefix(prefix)):
                groups = match.groups()
                block = int(groups[0]) if len(groups) == 2 else 0
                parts[kind, block, groups[-1] or "weight"] = tensor
                break
        else:
            others.append(name)
    if others or ("embed", 0, "bias") in parts:
        odd = others or ["a bias of the embedding"]
        raise InputError(
            f"{shown(source)} is more than products of linear maps ({listed(odd)}), so that its logits are no quadratic forms: {EXPECTED}"
        )
    if ("head", 0, "weight") not in parts or not any(kind in ("both", "left", "right") for kind, _, _ in parts):
        raise InputError(f"{shown(source)} is no bilinear classifier: {EXPECTED}, got {listed(weights)}")
    return parts


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{shown(source)}: {what}: expected {shape}, as the embedding is, got {tuple(tensor.shape)}")


def _config(source: str | Path) -> tuple[dict[str, Any], bool]:
    """Return what a file says of its network, in itself or in config.json beside it, and whether it is a checkpoint of this project.

    InputError if it says that there are norms or gates.
    """
    path = Path(source)
    config: dict[str, Any] = {}
    if path.is_file() and path.suffix != ".safetensors":
        value = read_file(path)
        if isinstance(value, Mapping) and value.keys() >= CHECKPOINT_KEYS:
            return {}, True
        inner = value.get("config") if isinstance(value, Mapping) else None
        config = dict(inner) if isinstance(inner, Mapping) else {}
    folder = path if path.is_dir() else path.parent
    if not config and (folder / "config.json").is_file():
        try:
            config = dict(load_json(folder / "config.json"))
        except (ValueError, TypeError):
            raise InputError(
                f"{shown(folder / 'config.json')} is no JSON object: download it again, or take it away"
            ) from None
    for key, value in config.items():
        if re.search(r"norm|gate|activation", str(key)) and value not in PLAIN:
            raise InputError(
                f"{shown(source)}: its config has {shown(key)}={shown(value)}: only networks without norms and gates are read"
            )
    return config, False
