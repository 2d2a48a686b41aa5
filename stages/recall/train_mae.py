"""Train a masked autoencoder on the base pool of a data set's training images; or take the encoder of a published one.

Hugging Face's ViTMAE is trained (He et al. 2021, arXiv:2111.06377) and written down under timm's names, so that every stage that
reads a backbone can read it. A killed run goes on from its last state in .work/.

Reads   data/<dataset>.safetensors
Writes  models/train_mae/<dataset>/backbone.safetensors   encoder and decoder, in float16 (of a published one: the encoder)
        reports/train_mae/<dataset>/history.csv           errors on hidden patches while training
        reports/train_mae/<dataset>/summary.json          the same on test images, beside guesses that need no network
        reports/train_mae/<dataset>/reconstructions.png   test images, what the autoencoder sees of them, what it fills in

Axes: n images, m validation images, p patches, q pixels of a patch, s pixels of a side, c channels.
"""

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from tqdm import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from stages.common.backbone import (
    Backbone,
    BackboneConfig,
    as_autoencoder,
    build_vit,
    load_backbone,
    published_config,
    save_backbone,
)
from stages.common.checkpoints import save_torch
from stages.common.files import Rows, save_csv, save_json
from stages.common.images import DATA, load_images, split_validation
from stages.common.mae import MaskedAutoencoder, mae_to_decoder, mae_to_timm, vit_of_mae
from stages.common.optim import require_convergence, set_learning_rate, warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import fingerprint, work_folder
from stages.recall import pictures
from stages.recall.pools import pool

MODELS = Path("models/train_mae")
REPORTS = Path("reports/train_mae")

BETAS = (0.9, 0.95)  # of AdamW: those of the paper
CLIP = 1.0  # of the gradient's norm
LEAST_SPREAD = 0.1  # of position embeddings over patches: sines and cosines on a grid of 4 x 4 have 0.36, zeros none
PLAIN_VIT = "vit_base_patch16_224"  # timm's: a ViT of any shape is one of its kind
TEMPERATURE = 10.0  # of position embeddings: on grids of 4 to 8 patches better than the 10,000 that are usual on 14
LOG_EVERY = 100  # steps
SAVE_EVERY = 500  # steps, while training
AT_ONCE = 500  # images, where nothing is trained


class Params(StageParams):
    """Parameters of the autoencoder and of its training."""

    seed: NonNegativeInt
    published: Annotated[str, Field(pattern="/")] | None  # a Hugging Face repository of a ViT-MAE; null: trained here
    image_size: PositiveInt  # pixels; images of other sizes are resized
    patch_size: PositiveInt  # pixels
    dim: Annotated[PositiveInt, Field(multiple_of=4)]  # a sine and a cosine of each coordinate
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveInt  # of the encoder
    mask_ratio: Annotated[float, Field(gt=0, lt=1)]  # of the patches
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegativeFloat

    @field_validator("patch_size")
    @classmethod
    def tiles_images(cls, patch_size: int, earlier: ValidationInfo) -> int:
        if (image_size := earlier.data.get("image_size", 0)) % patch_size:
            raise ValueError(f"patches of {patch_size} pixels do not tile images of {image_size}")
        return patch_size

    @field_validator("heads")
    @classmethod
    def divides_dim(cls, heads: int, earlier: ValidationInfo) -> int:
        if (dim := earlier.data.get("dim", 0)) % heads:
            raise ValueError(f"{heads} heads do not divide dim {dim}")
        return heads

    @field_validator("mask_ratio")
    @classmethod
    def hides_whole_patches(cls, mask_ratio: float, earlier: ValidationInfo) -> float:
        patches = (earlier.data.get("image_size", 0) // earlier.data.get("patch_size", 1)) ** 2
        seen = patches * (1 - mask_ratio)
        if patches and not 0 < int(seen) == round(seen) < patches:
            raise ValueError(f"of {patches} patches it leaves {seen:.2f} to be seen")
        return mask_ratio

    def training(self) -> dict[str, float]:
        """Return the settings of `train_mae`."""
        names = {"seed", "steps", "batch_size", "learning_rate", "warmup_fraction", "weight_decay"}
        return self.model_dump(include=names)

    def config(self) -> ViTMAEConfig:
        """Return the autoencoder's shape: a decoder of one block, as wide as the encoder."""
        return ViTMAEConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp_ratio * self.dim,
            decoder_hidden_size=self.dim,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=self.heads,
            decoder_intermediate_size=4 * self.dim,
            mask_ratio=self.mask_ratio,
            layer_norm_eps=1e-6,
        )


def build_mae(config: ViTMAEConfig, seed: int) -> ViTMAEForPreTraining:
    """Return an untrained autoencoder, whose decoder is that of `MaskedAutoencoder`.

    transformers 5 leaves tokens and position embeddings of a new model at zero, the latter frozen: then no patch would know
    its place. They are what the paper says instead: fixed sines and cosines.
    """
    d, side = config.hidden_size, config.image_size // config.patch_size
    torch.manual_seed(seed)
    model = ViTMAEForPreTraining(config)
    encoder, decoder = model.vit.embeddings, model.decoder
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    nn.init.xavier_uniform_(encoder.patch_embeddings.projection.weight.view(d, -1))
    nn.init.normal_(encoder.cls_token, std=0.02)
    nn.init.normal_(decoder.mask_token, std=0.02)
    with torch.no_grad():
        encoder.position_embeddings[0, 1:] = build_sincos2d_pos_embed([side, side], d, TEMPERATURE)
        decoder.decoder_pos_embed.copy_(encoder.position_embeddings)
    if min(position_spread(model)) < LEAST_SPREAD:
        raise RuntimeError(f"position embeddings do not tell patches apart: {position_spread(model)}")
    attention = decoder.decoder_layers[0].attention
    attention.q_proj.bias = attention.k_proj.bias = attention.v_proj.bias = None
    decoder.decoder_norm.eps = nn.LayerNorm(d).eps
    return model


def position_spread(model: ViTMAEForPreTraining) -> tuple[float, float]:
    """Return the standard deviation over patches of the position embeddings (root mean square over dimensions): encoder, decoder."""
    encoder, decoder = (
        embeddings[0, 1:].var(0, correction=0).mean().sqrt().item()
        for embeddings in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed)
    )
    return encoder, decoder


def train_mae(
    model: ViTMAEForPreTraining,
    train: Float[Tensor, "n 3 s s"],
    validation: Float[Tensor, "m 3 s s"],
    work: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_fraction: float,
    weight_decay: float,
) -> Rows:
    """Train `model` in place, with new masks in every step; return the history. Goes on from work/state.pt if it is there."""
    device, patches = train.device, model.vit.embeddings.patch_embeddings.num_patches
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, learning_rate, BETAS, weight_decay=weight_decay, fused=True)
    factor = warmup_cosine(steps, warmup_fraction)
    random = generator(seed, "training")
    first, history = 0, []
    if (work / "state.pt").is_file():
        state = torch.load(work / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        random.set_state(state["random"].cpu())
        first, history = state["step"], state["history"]
    model.train()
    for step in tqdm(range(first, steps), "train", steps, initial=first, unit=" steps", disable=None):
        set_learning_rate(optimizer, learning_rate * factor(step))
        rows = torch.randint(len(train), (batch_size,), generator=random).to(device)
        noise = torch.rand(batch_size, patches, generator=random).to(device)
        loss = model(pixel_values=train[rows], noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            val_error = validation_error(model, validation, seed)
            history.append({"step": step + 1, "train_error": loss.item(), "val_error": val_error})
            require_convergence(val_error, f"step {step + 1}", "lower train_mae.learning_rate", history[0]["val_error"])
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            state = {"step": step + 1, "history": history, "random": random.get_state()}
            save_torch(work / "state.pt", state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model.eval()
    return history


@torch.no_grad()
def validation_error(model: ViTMAEForPreTraining, x: Float[Tensor, "n 3 s s"], seed: int) -> float:
    """Return the mean squared error on hidden patches of images, with the same masks at every call."""
    patches = model.vit.embeddings.patch_embeddings.num_patches
    noise = torch.rand(len(x), patches, generator=generator(seed, "validation masks")).to(x.device)
    losses = [model(pixel_values=x[i], noise=noise[i]).loss * len(i) for i in torch.arange(len(x)).split(AT_ONCE)]
    return sum(losses).item() / len(x)


def shape_of(vit: VisionTransformer) -> dict[str, float]:
    """Return what makes timm's plain ViT this one."""
    block = vit.blocks[0]
    return {
        "patch_size": vit.patch_embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
    }


def normalisation(images: UInt8[Tensor, "n c h w"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of pixels in 0 to 1, of each of three channels."""
    pixels = images.expand(-1, 3, -1, -1).transpose(0, 1).flatten(1).double() / 255
    return tuple(round(m, 4) for m in pixels.mean(1).tolist()), tuple(round(s, 4) for s in pixels.std(1).tolist())


@torch.no_grad()
def masked_errors(
    model: MaskedAutoencoder,
    x: Float[Tensor, "n 3 s s"],
    noise: Float[Tensor, "n p"],
    mean_image: Float[Tensor, "1 3 s s"],
    mask_ratio: float,
) -> dict[str, float]:
    """Return mean squared errors on hidden patches: of the autoencoder, of a mean image, of the mean colour of visible patches."""
    errors: dict[str, list[Tensor]] = {"autoencoder": [], "mean_image": [], "visible_mean": []}
    for batch, numbers in zip(x.split(AT_ONCE), noise.split(AT_ONCE), strict=True):
        predicted, hidden = model(batch, numbers, mask_ratio)
        truth = model.patchify(batch)
        guesses = predicted, model.patchify(mean_image), visible_mean(truth, hidden)
        for of_batches, guess in zip(errors.values(), guesses, strict=True):
            of_batches.append((guess - truth).square().mean(2)[hidden].double())
    return {name: torch.cat(of_batches).mean().item() for name, of_batches in errors.items()}


def visible_mean(patches: Float[Tensor, "n p q"], hidden: Bool[Tensor, "n p"]) -> Float[Tensor, "n 1 q"]:
    """Return as a patch the mean colour of an image's patches that are not hidden; pixels of a patch are [3, s, s]."""
    visible = ~hidden[..., None]
    mean = (patches * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
    return mean.unflatten(2, (3, -1)).mean(3, keepdim=True).expand(-1, -1, -1, patches.shape[2] // 3).flatten(2)


@torch.no_grad()
def reconstructions(
    model: MaskedAutoencoder | None,
    x: Float[Tensor, "n 3 s s"],
    noise: Float[Tensor, "n p"],
    backbone: Backbone,
    mask_ratio: float,
) -> dict[str, Float[np.ndarray, "n 3 s s"]]:
    """Return images and, if there is an autoencoder, what it sees and fills in; what it does not see is of the mean colour."""
    rows = {"images": x}
    if model:
        predicted, hidden = model(x, noise, mask_ratio)
        patches, hidden = model.patchify(x), hidden[..., None]
        rows["seen"] = model.unpatchify(patches * ~hidden)
        rows["filled in"] = model.unpatchify(torch.where(hidden, predicted, patches))
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (backbone.config.mean, backbone.config.std))
    return {name: (images * std + mean).cpu().numpy() for name, images in rows.items()}


def as_others_read_it(
    path: Path, vit: VisionTransformer, config: BackboneConfig, decoder: dict[str, Tensor], device: torch.device
) -> tuple[Backbone, MaskedAutoencoder | None]:
    """Write an encoder and, if there is one, its decoder; return both as others will have them: rounded."""
    save_backbone(path, vit, config, decoder)
    stored = load_backbone(path, device)
    return stored, as_autoencoder(stored) if decoder else None


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="a data set of train_mae.datasets").dataset
    params = Params.load("train_mae", dataset)
    pin_threads()
    device = pick_device()
    images, test = load_images(dataset, device)
    train, validation = split_validation(pool(images, "base"), params.validation_fraction, params.seed)
    recipe = params.model_dump() | {"data": fingerprint(DATA / f"{dataset}.safetensors")}
    work = work_folder("train_mae", recipe)
    mae = None if params.published else build_mae(params.config(), params.seed).to(device)
    if mae:
        vit, (mean, std) = vit_of_mae(mae.config.to_dict()), normalisation(train.images)
    else:
        published = published_config(params.published, params.image_size)
        vit, mean, std = build_vit(published), published.mean, published.std
    config = BackboneConfig(PLAIN_VIT, False, params.image_size, shape_of(vit), mean, std)
    prepare = Backbone(vit, config, "", {}).prepare

    history, decoder = [{"step": 0, "train_error": "", "val_error": ""}], {}
    if mae:
        history = train_mae(mae, prepare(train.images), prepare(validation.images), work, **params.training())
        vit.load_state_dict(mae_to_timm(mae.state_dict()))
        decoder = mae_to_decoder(mae.state_dict(), params.patch_size)
    path = MODELS / dataset / "backbone.safetensors"
    stored, autoencoder = as_others_read_it(path, vit, config, decoder, device)
    noise = torch.rand(len(test), stored.vit.patch_embed.num_patches, generator=generator(params.seed, "test masks"))
    noise, summary = noise.to(device), {"parameters": sum(p.numel() for p in stored.vit.parameters())}
    if autoencoder:
        mean_image = prepare(train.images).mean(0, keepdim=True)
        errors = masked_errors(autoencoder, prepare(test.images), noise, mean_image, params.mask_ratio)
        summary["masked_error"] = errors
        print(f"{dataset}: hidden patches {errors['autoencoder']:.3f}; by the mean image {errors['mean_image']:.3f}")
    shown = torch.linspace(0, len(test) - 1, pictures.SHOWN).long()
    rows = reconstructions(autoencoder, prepare(test.images[shown]), noise[shown], stored, params.mask_ratio)
    pictures.draw_rows(REPORTS / dataset / "reconstructions.png", rows, fontsize=None)
    save_csv(REPORTS / dataset / "history.csv", history)
    save_json(REPORTS / dataset / "summary.json", summary)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run(main)
