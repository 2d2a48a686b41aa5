"""Any network of timm as a frozen source of features, with weights from a file.

Axes: n images, k kinds of features, d features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.checkpoints import load_weights
from stages.common.runtime import autocast
from stages.common.stage import InputError, one_line

# A block of a transformer or a stage of a CNN, as timm counts them, -1 being the last; or what timm's own head reads.
Layer = int | Literal["head"]


@dataclass(frozen=True)
class Network(Backbone):
    """A network of timm, `vit` of any class, of which one layer's features are read."""

    layer: Layer = "head"

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "n c h w"], batch_size: int = 50) -> Float[Tensor, "n k d"]:
        """Return, in float32, the layer's mean over places, behind the class token if the network has one; or what its head reads."""
        self.vit.eval()
        return torch.cat([self._read(batch) for batch in images.split(batch_size)])

    def _read(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n k d"]:
        x = self.prepare(images).contiguous(memory_format=torch.channels_last)  # CNNs are twice as fast
        options = {"indices": [self.layer], "norm": True, "intermediates_only": True, "stop_early": True}
        with autocast(images.device):
            if self.layer == "head":
                return self.vit.forward_head(self.vit.forward_features(x), pre_logits=True).float().flatten(1)[:, None]
            if not has_class_token(self.vit):
                (places,) = self.vit.forward_intermediates(x, **options)
                return places.float().mean((2, 3))[:, None]
            ((places, prefix),) = self.vit.forward_intermediates(x, return_prefix_tokens=True, **options)
            return torch.stack([prefix[:, 0].float(), places.float().mean((2, 3))], 1)


def has_class_token(network: nn.Module) -> bool:
    """Whether this is a ViT that memories and prompts can be put into, too."""
    return isinstance(network, VisionTransformer) and network.cls_token is not None


def build_network(name: str) -> nn.Module:
    """Return timm's network without a head, with random weights; InputError if timm has none such."""
    if name not in timm.list_models():
        raise InputError(f"timm has no model {name!r}: timm.list_models() says which it has")
    return timm.create_model(name, num_classes=0)


def load_published(network: nn.Module, path: Path, name: str) -> None:
    """Give timm's network the weights of a file; InputError names the tensors that do not fit. A classifier in it is left out."""
    state = network.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()}
    heads = network.pretrained_cfg.get("classifier") or ()
    beside = [f"{head}." for head in ([heads] if isinstance(heads, str) else heads)]
    weights, _ = load_weights(path, expected, beside, torch.float32, f"timm's {name!r}")
    network.load_state_dict(state | {key: weights[key] for key in expected})


def fit_size(network: nn.Module, config: BackboneConfig) -> None:
    """Make the network read images of the config's size: a transformer's places are interpolated. InputError if it cannot."""
    size = config.image_size
    try:
        if hasattr(network, "set_input_size"):
            network.set_input_size(img_size=size)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"timm's {config.name!r} reads no images of {size} pixels: {one_line(error)[:200]}") from None


def check_layer(network: nn.Module, layer: Layer, name: str) -> None:
    """InputError unless the network has such a layer."""
    depth = len(network.feature_info) if hasattr(network, "forward_intermediates") else 0
    if layer != "head" and not -depth <= layer < depth:
        choices = f"'head' or {-depth} to {depth - 1}" if depth else "'head'"
        raise InputError(f"extract_features.networks: layers of {name!r}: expected {choices}, got {layer}")
