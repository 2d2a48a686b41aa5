"""A base of one's own: a vision transformer by timm's name and a file of weights, or a folder as save_pretrained writes it.

What is read must compute what this project computes: it is run beside timm's model, and refused if their tokens differ.

Axes: n images, t tokens, d dimensions of a token.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.common.checkpoints import State, load_weights
from stages.common.containers import listed, shown
from stages.common.randomness import generator
from stages.common.stage import InputError
from stages.recall.functional_vit import FIXED, Base, encode

CONFIG = "config.json"
BESIDE = (
    "head.",
    "fc_norm.",
    "classifier.",
    "pooler.",
    "decoder.",
    "mask_token",
    "head_dist.",
)  # what is not the encoder's
TOLERANCE = 1e-3  # of the tokens' largest entry: what single precision may differ by
HUGGING_FACE = {  # names of transformers' ViT and DINOv2, and timm's
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": FIXED,
    r"embeddings\.patch_embeddings\.projection\.(.+)": r"patch_embed.proj.\1",
    r"(?:encoder\.)?layers?\.(\d+)\.attention\.output\.dense\.(.+)": r"blocks.\1.attn.proj.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.attention\.o_proj\.(.+)": r"blocks.\1.attn.proj.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(.+)": r"blocks.\1.mlp.fc1.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(.+)": r"blocks.\1.mlp.fc2.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_before|norm1)\.(.+)": r"blocks.\1.norm1.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_after|norm2)\.(.+)": r"blocks.\1.norm2.\2",
    r"(?:encoder\.)?layers?\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"layernorm\.(.+)": r"norm.\1",
}
PART = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.(.+)")
PARTS = ("q", "k", "v")  # of qkv, in timm's order


def read_own_base(model: str | None, source: str, image_size: int) -> Base:
    """Return the encoder of a network at this size of images, without a head; InputError if it is none that can be computed here.

    `source` is a file of weights of timm's `model`, or without `model` a folder as save_pretrained writes it, whose config.json says what
    it is: a network of timm, or a ViT or DINOv2 of transformers. Positions are resampled to the images' size as timm does it.
    """
    if model is not None:
        return read_timm(model, source, image_size, {})
    path = Path(source) / CONFIG
    if not path.is_file():
        raise InputError(
            f"{source} has no {CONFIG}: give a folder of save_pretrained, or timm's name of the network as `model`"
        )
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is no JSON object: give a folder as save_pretrained writes it") from None
    if "architecture" in config:
        return read_timm(str(config["architecture"]), source, image_size, config.get("pretrained_cfg") or {})
    if config.get("model_type") in ("vit", "dinov2"):
        return read_transformers(config, source, image_size)
    kind = shown(str(config.get("model_type", "nothing")))
    raise InputError(f"{path}: expected timm's architecture, or model_type vit or dinov2, got {kind}")


def read_timm(model: str, source: str, image_size: int, known: Mapping[str, Any]) -> Base:
    """Return a network of timm with these weights; `known` may say how it normalises images."""
    import timm  # takes seconds
    from timm.models.vision_transformer import VisionTransformer

    if model not in timm.list_models():
        raise InputError(f"timm has no model {shown(model)}: see timm.list_models('vit*')")
    with torch.device("meta"):
        drawn = timm.create_model(model, num_classes=0)
    if not isinstance(drawn, VisionTransformer) or drawn.cls_token is None:
        raise InputError(
            f"timm's {model} is no vision transformer with a class token: expected a plain vit_* or deit_* of timm"
        )
    own = drawn.pretrained_cfg | dict(known)
    patch = int(drawn.patch_embed.patch_size[0])
    check_size(image_size, patch)
    found, _ = load_weights(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn.state_dict().items()}
    if place := next((name for name in found if name.endswith(FIXED) and "decoder" not in name), None):
        shapes[FIXED] = tuple(found[place].shape)
    weights, _ = load_weights(source, shapes, BESIDE, torch.float32, f"timm's {model}")
    state = resampled({name: weights[name] for name in shapes}, image_size // patch)
    base = Base(state, {}, drawn.blocks[0].attn.num_heads, patch, image_size, tuple(own["mean"]), tuple(own["std"]))
    check_computed(base, timm.create_model(model, num_classes=0, img_size=image_size), model)
    return base


def check_size(image_size: int, patch: int) -> None:
    """InputError if images are not cut into at least four whole patches."""
    if image_size % patch or image_size < 2 * patch:
        raise InputError(
            f"image_size: expected a multiple of the patches' {patch} pixels, at least {2 * patch}, got {image_size}"
        )


def resampled(state: State, side: int) -> State:
    """Return weights whose positions are those of side x side patches; InputError if the file's are not of a square of patches."""
    from timm.layers import resample_abs_pos_embed

    positions = state[FIXED]
    before = math.isqrt(positions.shape[1] - 1)
    if before**2 != positions.shape[1] - 1:
        raise InputError(
            f"{FIXED}: expected a class token and a square of patches, got {positions.shape[1]} positions (register tokens?)"
        )
    if before == side:
        return state
    return state | {FIXED: resample_abs_pos_embed(positions, [side, side], [before, before], num_prefix_tokens=1)}


@torch.no_grad()
def check_computed(base: Base, vit: torch.nn.Module, model: str) -> None:
    """InputError if a network of timm does not compute what is computed here."""
    try:
        vit.load_state_dict(dict(base.encoder))
        pixels = torch.randn(2, 3, base.image_size, base.image_size, generator=generator(0, "pixels"))
        expected = vit.eval().forward_features(pixels)
        s = base.patch_size
        patches = pixels.unfold(2, s, s).unfold(3, s, s).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        got = encode(base.encoder, patches, base.heads)
        agree = got.shape == expected.shape and float((got - expected).abs().max()) <= TOLERANCE * float(
            expected.abs().max()
        )
    except (RuntimeError, KeyError, IndexError):
        agree = False
    if not agree:
        raise InputError(
            f"timm's {model} computes what is not known here: expected a plain ViT (class token, LayerScale or none, GELU)"
        )


def read_transformers(config: Mapping[str, Any], source: str, image_size: int) -> Base:
    """Return a ViT or DINOv2 of transformers under timm's names."""
    try:
        patch, heads, depth = (int(config[key]) for key in ("patch_size", "num_attention_heads", "num_hidden_layers"))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{source}/{CONFIG}: expected numbers patch_size, num_attention_heads and num_hidden_layers"
        ) from None
    if config.get("hidden_act", "gelu") != "gelu" or config.get("use_swiglu_ffn"):
        raise InputError(f"{source}/{CONFIG}: expected a perceptron with hidden_act gelu, got another")
    check_size(image_size, patch)
    found, _ = load_weights(source, dtype=torch.float32)
    state = resampled(to_timm(found, source, depth), image_size // patch)
    processor = Path(source) / "preprocessor_config.json"
    known = json.loads(processor.read_text(encoding="utf-8")) if processor.is_file() else {}
    mean, std = (tuple(known.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
    return Base(state, {}, heads, patch, image_size, mean, std)


def to_timm(found: State, source: str, depth: int) -> State:
    """Return weights of transformers under timm's names, queries, keys and values in one; InputError if any is strange or missing."""
    state: State = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    strange = []
    for key, tensor in found.items():
        name = key.removeprefix("vit.").removeprefix("dinov2.")
        if match := PART.fullmatch(name):
            parts.setdefault((match[1], match[3]), {})[match[2][0]] = tensor
        elif new := timm_name(name):
            state[new] = tensor
        elif not name.startswith(BESIDE) and "mask_token" not in name:
            strange.append(key)
    for (layer, what), of in parts.items():
        if set(of) != set(PARTS):
            raise InputError(f"{source}: layer {layer} lacks query, key or value ({what})")
        state[f"blocks.{layer}.attn.qkv.{what}"] = torch.cat([of[part] for part in PARTS])
    missing = [
        name for name in (FIXED, "cls_token", "norm.weight", f"blocks.{depth - 1}.attn.qkv.weight") if name not in state
    ]
    if strange or missing:
        what = f"does not know {listed(strange)}" if strange else f"misses what is {missing[0]} in timm"
        raise InputError(f"{source}: the table of transformers' names {what}: expected a plain ViT or DINOv2")
    return state


def timm_name(name: str) -> str | None:
    """Return timm's name of a weight of transformers; None if it is not known."""
    for pattern, new in HUGGING_FACE.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return None


def placed(key: str) -> tuple[str, int | None] | None:
    """Return where a weight of transformers, however it is prefixed, lies here: the matrix, and which third of it; None if nowhere."""
    name = key[match.start() :] if (match := re.search(r"(?:encoder\.)?layers?\.\d+\.", key)) else key
    if part := PART.fullmatch(name):
        return f"blocks.{part[1]}.attn.qkv.{part[3]}", PARTS.index(part[2][0])
    new = timm_name(name)
    return None if new is None else (new, None)


def with_head(base: Base, head: Mapping[str, Tensor]) -> Base:
    """Return a base behind a head."""
    return replace(base, decoder={**base.decoder, **head})
