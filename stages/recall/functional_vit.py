"""A vision transformer as a function of its weights, so that torch.func can differentiate and run many at once.

It computes what timm's ViT and `MaskedAutoencoder` of common/mae compute, and its weights have their names. Beside a matrix W there
may be factors of a low-rank change, `<module>.A` and `<module>.B`: then W + B A is used, and never formed.

Axes: n images, t tokens, d dimensions of a token, p patches, k of them visible, q pixels of a patch (three channels),
w weights that are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from stages.common.files import load_metadata
from stages.common.stage import InputError
from stages.common.vectors import Layout

Weights = Mapping[str, Tensor]

HEAD = ("head.weight", "head.bias")  # of a classifier, kept beside the decoder's weights
FIXED = "pos_embed"  # sines and cosines: not trained


@dataclass(frozen=True)
class Base:
    """The network that all fine-tunes descend from."""

    encoder: Weights
    decoder: Weights  # of the masked autoencoder, and the head if it was trained to classify
    heads: int
    patch_size: int  # pixels
    image_size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def trained(self) -> Weights:
        """The weights that fine-tuning changes: the encoder's, but for its fixed positions."""
        return {name: weight for name, weight in self.encoder.items() if name != FIXED}

    @cached_property
    def layout(self) -> Layout:
        """How these are cut out of one vector."""
        return Layout.of(self.trained)

    @cached_property
    def start(self) -> Float[Tensor, " w"]:
        """These as one vector, where fine-tuning starts."""
        return self.layout.flatten(self.trained)

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def patchify(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n p q"]:
        """Return the normalised pixels of each patch, channels first, patches row by row."""
        size, s = (self.image_size, self.image_size), self.patch_size
        x = images.float() / 255
        if x.shape[-2:] != size:
            x = interpolate(x, size, mode="bilinear", antialias=x.shape[-1] > size[0], align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        x = (x.expand(-1, 3, -1, -1) - mean) / std
        return x.unfold(2, s, s).unfold(3, s, s).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Float[Tensor, "n p q"]) -> Float[Tensor, "n 3 h w"]:
        """Return the images of which these are the patches, in pixels of 0 to 1."""
        s, side = self.patch_size, self.image_size // self.patch_size
        x = patches.view(-1, side, side, 3, s, s).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * s, side * s)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return x * std + mean


def load_base(path: Path, device: torch.device | str = "cpu") -> Base:
    """Read a network that `save_backbone` wrote with its weights; InputError if it is missing or damaged, or holds none."""
    config = load_metadata(path).get("config")
    if config is None:
        raise InputError(f"{path} is no base: expected a network that train_mae or classify_masked wrote")
    if config["shape"] is None:
        raise InputError(f"{path} holds the name of published weights, not weights")
    tensors = {name: tensor.float() for name, tensor in load_file(path, device=str(device)).items()}
    decoder = {
        name.removeprefix("decoder."): tensors.pop(name) for name in list(tensors) if name.startswith("decoder.")
    }
    shape = config["shape"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Base(tensors, decoder, shape["num_heads"], shape["patch_size"], config["image_size"], mean, std)


def _linear(w: Weights, name: str, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
    y = linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
    if f"{name}.A" in w:
        y = y + linear(linear(x, w[f"{name}.A"]), w[f"{name}.B"])
    return y


def _norm(w: Weights, name: str, x: Float[Tensor, "*n d"], epsilon: float = 1e-6) -> Float[Tensor, "*n d"]:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)


def attention(w: Weights, name: str, x: Float[Tensor, "n t d"], heads: int) -> Float[Tensor, "n t d"]:
    """Return multi-head self-attention. Written out: torch.func has no rule for the fused one on processors."""
    n, t, d = x.shape
    q, k, v = _linear(w, f"{name}.qkv", x).view(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * (d // heads) ** -0.5).softmax(-1)
    return _linear(w, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(n, t, d))


def _scaled(w: Weights, name: str, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return x times a LayerScale, if there is one (Touvron et al. 2021, arXiv:2103.17239)."""
    gamma = w.get(f"{name}.gamma")
    return x if gamma is None else x * gamma


def block(w: Weights, name: str, x: Float[Tensor, "n t d"], heads: int) -> Float[Tensor, "n t d"]:
    """Return one transformer block: attention and perceptron, each on normalised tokens, scaled if the network does, and added to them."""
    x = x + _scaled(w, f"{name}.ls1", attention(w, f"{name}.attn", _norm(w, f"{name}.norm1", x), heads))
    hidden = gelu(_linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x)))
    return x + _scaled(w, f"{name}.ls2", _linear(w, f"{name}.mlp.fc2", hidden))


def encode(
    w: Weights, patches: Float[Tensor, "n p q"], heads: int, visible: Int[Tensor, "n k"] | None = None
) -> Float[Tensor, "n t d"]:
    """Return the class token and the tokens of the patches that are `visible`, by default all."""
    positions = w[FIXED][0, 1:]
    if visible is not None:  # first of all: hidden patches cost nothing
        patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))
        positions = positions[visible]
    tokens = linear(patches, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"]) + positions
    cls = (w["cls_token"] + w[FIXED][:, :1]).expand(len(tokens), -1, -1)
    x = torch.cat([cls, tokens], 1)
    for layer in range(depth(w)):
        x = block(w, f"blocks.{layer}", x, heads)
    return _norm(w, "norm", x)


def depth(w: Weights) -> int:
    """Return the number of blocks."""
    return sum(name.endswith(".norm1.weight") and name.startswith("blocks.") for name in w)


def reconstruct(
    w: Weights, decoder: Weights, patches: Float[Tensor, "n p q"], heads: int, noise: Float[Tensor, "n p"], ratio: float
) -> tuple[Float[Tensor, "n p q"], Bool[Tensor, "n p"]]:
    """Return all patches' pixels as a masked autoencoder fills them in, and which were hidden: those of the largest noise."""
    order = noise.argsort(1)
    back, k = order.argsort(1), visible_count(order.shape[1], ratio)
    code = _linear(decoder, "embed", encode(w, patches, heads, order[:, :k]))
    n, d = len(code), code.shape[2]
    filled = torch.cat([code[:, 1:], decoder["mask_token"].expand(n, order.shape[1] - k, -1)], 1)
    filled = filled.gather(1, back[..., None].expand(-1, -1, d))
    decoded = block(decoder, "block", torch.cat([code[:, :1], filled], 1) + decoder["position"], heads)
    return _linear(decoder, "predict", _norm(decoder, "norm", decoded[:, 1:], 1e-5)), back >= k


def visible_count(patches: int, ratio: float) -> int:
    """Return how many patches are visible at a mask ratio."""
    return round(patches * (1 - ratio))


def visible_patches(noise: Float[Tensor, "n p"], ratio: float) -> Int[Tensor, "n k"]:
    """Return which patches are visible at a mask ratio: those of the smallest noise."""
    return noise.argsort(1)[:, : visible_count(noise.shape[1], ratio)]
