"""Vision transformers as backbones: timm's, trained here as masked autoencoders or read from published weights."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import timm
import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import interpolate

from stages.common.files import load_metadata, remedy, save_arrays
from stages.common.mae import MaskedAutoencoder, State, mae_to_timm, vit_of_mae
from stages.common.runtime import autocast
from stages.common.stage import InputError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class BackboneConfig:
    """What rebuilds a backbone. `name` is a timm model, or a Hugging Face repository of a ViT-MAE if it holds a slash."""

    name: str
    pretrained: bool  # published weights; else trained here, and stored beside this
    image_size: int  # pixels; images of other sizes are resized
    shape: dict[str, float] | None  # patch_size, embed_dim, depth, num_heads, mlp_ratio if not 4; None: the model's own
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)


def build_vit(config: BackboneConfig) -> VisionTransformer:
    """Return the ViT without a head, with random or published weights; InputError if those cannot be had: never random instead."""
    if "/" in config.name:
        return read_vit_mae(config.name, config.image_size)
    if config.name not in timm.list_models() and config.name not in timm.list_pretrained():
        raise InputError(f"timm has no model {config.name!r}")
    if config.pretrained and not timm.is_model_pretrained(config.name):
        raise InputError(f"timm has no weights for {config.name!r}")
    options = {"pretrained": config.pretrained, "img_size": config.image_size, "num_classes": 0}
    create = partial(timm.create_model, config.name, **options, **(config.shape or {}))
    vit = published(config.name, create) if config.pretrained else create()
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise InputError(f"timm's {config.name!r} is no vision transformer with a class token")
    return vit


def published(name: str, read: Callable[[], T]) -> T:
    """Return read(); InputError if it fails, as it does without a network."""
    try:
        return read()
    except Exception as error:  # of timm, the hub, the network and the file alike: told whole, and nothing goes on
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise InputError(f"the published weights of {name!r} cannot be read ({why}): connect, or set HF_HOME") from None


def published_config(name: str, image_size: int) -> BackboneConfig:
    """Return the config of a published model, with the normalisation that its weights expect."""
    imagenet = timm.data.constants.IMAGENET_DEFAULT_MEAN, timm.data.constants.IMAGENET_DEFAULT_STD
    known = timm.get_pretrained_cfg(name) if "/" not in name else None
    mean, std = (known.mean, known.std) if known else imagenet
    return BackboneConfig(name, True, image_size, None, tuple(mean), tuple(std))


def read_vit_mae(repository: str, image_size: int) -> VisionTransformer:
    """Return the encoder of a Hugging Face ViT-MAE as a timm ViT; InputError if its files cannot be had."""
    config, weights = (
        published(repository, partial(hf_hub_download, repository, file))
        for file in ("config.json", "model.safetensors")
    )
    config = json.loads(Path(config).read_text())
    if config["image_size"] != image_size:
        raise InputError(f"{repository!r} reads images of {config['image_size']} pixels, not {image_size}")
    vit = vit_of_mae(config)
    vit.load_state_dict(mae_to_timm(load_file(weights)))
    return vit


@dataclass(frozen=True)
class Backbone:
    """A ViT without a head, and what it needs to know of images. `decoder` is a masked autoencoder's, empty of published ones."""

    vit: VisionTransformer
    config: BackboneConfig
    sha256: str  # of the weights
    decoder: State

    def prepare(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 3 s s"]:
        """Return images as the ViT reads them: of its size, three channels, normalised."""
        size = (self.config.image_size, self.config.image_size)
        x = images.float() / 255
        if x.shape[-2:] != size:
            x = interpolate(x, size, mode="bilinear", antialias=x.shape[-1] > size[0], align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        return (x.expand(-1, 3, -1, -1) - mean) / std

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "n c h w"], batch_size: int = 250) -> Float[Tensor, "n 2 d"]:
        """Return, in float32, the class token and the mean of the patch tokens after the last norm."""
        self.vit.eval()
        out = []
        for batch in images.split(batch_size):
            with autocast(images.device):
                tokens = self.vit.forward_features(self.prepare(batch)).float()
            out.append(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
        return torch.cat(out)


def as_autoencoder(backbone: Backbone) -> MaskedAutoencoder:
    """Return a backbone trained here as the masked autoencoder that it was trained as, around the same ViT."""
    autoencoder = MaskedAutoencoder(backbone.vit)
    encoder = {f"vit.{name}": tensor for name, tensor in backbone.vit.state_dict().items()}
    autoencoder.load_state_dict(encoder | backbone.decoder)
    return autoencoder.to(backbone.vit.cls_token.device).eval()


def weights_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors and their names, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_backbone(path: Path, vit: VisionTransformer, config: BackboneConfig, decoder: State) -> None:
    """Write a backbone: weights trained here as float16; of published ones their name and SHA-256 alone."""
    state = {} if config.pretrained else {name: tensor.half() for name, tensor in vit.state_dict().items()}
    hashed = vit.state_dict() if config.pretrained else {name: tensor.float() for name, tensor in state.items()}
    metadata = {"config": asdict(config), "sha256": weights_sha256(hashed.items())}
    tensors = state | {f"decoder.{name}": tensor.half() for name, tensor in decoder.items()}
    save_arrays(path, {name: tensor.cpu().numpy() for name, tensor in tensors.items()}, metadata)


def load_backbone(path: Path, device: torch.device | str = "cpu") -> Backbone:
    """Read what `save_backbone` wrote; InputError if it is missing, damaged, or its published weights are others by now."""
    metadata = load_metadata(path)
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    decoder = {name.removeprefix("decoder."): state.pop(name) for name in list(state) if name.startswith("decoder.")}
    try:
        values = metadata["config"]
        config = BackboneConfig(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})
        vit = build_vit(config)
        if not config.pretrained:
            vit.load_state_dict(state)
    except InputError:
        raise
    except Exception:  # timm raises of anything where an option is odd
        again = remedy(path, "-f ") or ": make it again"
        raise InputError(f"{path} is damaged (its config and its weights do not agree){again}") from None
    if weights_sha256(vit.state_dict().items()) != metadata.get("sha256"):
        raise InputError(f"{path}: the weights of {config.name!r} are not those it was made with{remedy(path, '-f ')}")
    return Backbone(vit.eval().to(device), config, metadata["sha256"], decoder)
