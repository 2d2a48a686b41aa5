"""Pretrain a vision transformer on drawn glyphs, as a masked autoencoder and a classifier at once; or record a published one.

It is trained on images of no data set; how glyphs vary was chosen on training images of MNIST and digits. A killed run goes on
from its last state in .work/. To release what was trained, copy it to models/released/ by hand.

Reads   nothing
Writes  models/pretrain_backbone/<variant>/backbone.safetensors   weights in float16 (of a published model: name and SHA-256)
        reports/pretrain_backbone/<variant>/history.csv           losses while training
        reports/pretrain_backbone/<variant>/summary.json          accuracy on unseen classes of glyphs; random weights, pixels
        reports/pretrain_backbone/<variant>/drawings.png          glyphs, and what the autoencoder makes of hidden patches
"""

# Axes: n images, h and w pixels, d features.

import shutil
from pathlib import Path
from typing import Annotated, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from stages.common.backbone import Backbone, BackboneConfig, build_vit, load_backbone, published_config, save_backbone
from stages.common.checkpoints import save_torch
from stages.common.drawings import Glyphs
from stages.common.files import Rows, save_csv, save_json
from stages.common.mae import MaskedAutoencoder
from stages.common.metrics import accuracy
from stages.common.optim import require_convergence, set_learning_rate, warmup_times_cosine
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import work_folder
from stages.vit_memory import pictures
from stages.vit_memory.muon import Muon

MODELS = Path("models/pretrain_backbone")
REPORTS = Path("reports/pretrain_backbone")

LOG_EVERY = 50  # steps
SAVE_EVERY = 200  # steps: 15 s of work, at most, are lost when a run is killed
WARMUP_FRACTION = 0.05  # of the steps
SCALE = 16.0  # of cosines, as logits: at 1 even a perfect match of 1 in 500 classes would hardly lower the loss
EVALUATION = (100, 5, 10)  # unseen classes, drawings of each to learn from, and to be tested on


class Shape(StageParams):
    """A ViT's size."""

    patch_size: PositiveInt  # pixels
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt


class BackboneParams(StageParams):
    """Which ViT."""

    name: str  # a timm model; or, published, a Hugging Face repository of a ViT-MAE
    pretrained: bool  # true: published weights, nothing is trained
    image_size: PositiveInt  # pixels
    shape: Shape | None  # null: the named model's own

    @model_validator(mode="after")
    def published_weights_have_a_shape(self) -> Self:
        if self.pretrained and self.shape is not None:
            raise ValueError("pretrained: true has the published model's shape: set shape to null")
        if "/" in self.name and not self.pretrained:
            raise ValueError(f"{self.name!r} names published weights: set pretrained to true")
        return self

    def config(self) -> BackboneConfig:
        """Return what the ViT is built by."""
        if self.pretrained:
            return published_config(self.name, self.image_size)
        return BackboneConfig(self.name, False, self.image_size, self.shape and self.shape.model_dump())


class Params(StageParams):
    """Parameters of the backbone and of its training."""

    seed: NonNegativeInt
    variant: BackboneParams
    classes: PositiveInt  # of glyphs
    steps: PositiveInt
    batch_size: PositiveInt
    masked_images: PositiveInt  # of a batch, the ones that are reconstructed as well
    learning_rate: PositiveFloat
    matrix_learning_rate: PositiveFloat  # of the blocks' matrices, which Muon trains
    weight_decay: NonNegativeFloat
    mask_ratio: Annotated[float, Field(gt=0, lt=1)]  # of the patches
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]

    def training(self) -> dict[str, float]:
        """Return the settings of `pretrain`."""
        return self.model_dump(exclude={"variant"})


def optimizers_of(
    parameters: list[nn.Parameter], autoencoder: MaskedAutoencoder, rates: tuple[float, float], decay: float
) -> tuple[Muon, AdamW]:
    """Return Muon for the matrices of an autoencoder's blocks and AdamW for all other parameters; rates: of the two."""
    matrices = {p for name, p in autoencoder.named_parameters() if "block" in name and p.ndim == 2}
    of_matrices, rest = [p for p in parameters if p in matrices], [p for p in parameters if p not in matrices]
    return Muon(of_matrices, rates[0], decay), AdamW(rest, rates[1], weight_decay=decay, fused=True)


def resume(
    path: Path, parts: list[nn.Module | Optimizer], random: torch.Generator, device: torch.device
) -> tuple[int, Rows]:
    """Give parts and generator the state that was saved, and return the steps done and the history; of none, 0 and nothing."""
    if not path.is_file():
        return 0, []
    state = torch.load(path, map_location=device, weights_only=True)
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    random.set_state(state["random"].cpu())
    return state["step"], state["history"]


def pretrain(
    student: Backbone,
    glyphs: Glyphs,
    work: Path,
    device: torch.device,
    *,
    seed: int,
    classes: int,
    steps: int,
    batch_size: int,
    masked_images: int,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    mask_ratio: float,
    label_smoothing: float,
) -> tuple[MaskedAutoencoder, Rows]:
    """Train `student.vit` in place, on new drawings in every step; return it as an autoencoder, and the history.

    Goes on from work/state.pt if it is there.
    """
    torch.manual_seed(seed)
    autoencoder = MaskedAutoencoder(student.vit).to(device)
    prototypes = nn.Parameter(0.02 * torch.randn(classes, student.vit.embed_dim, device=device))
    model = nn.ParameterDict({"classes": prototypes}), autoencoder
    parameters, rates = [p for part in model for p in part.parameters()], (matrix_learning_rate, learning_rate)
    optimizers = optimizers_of(parameters, autoencoder, rates, weight_decay)
    schedules = [warmup_times_cosine(rate, steps, WARMUP_FRACTION) for rate in rates]
    random = generator(seed, "pretraining")
    first, history = resume(work / "state.pt", [*model, *optimizers], random, device)
    student.vit.train()
    for step in tqdm(range(first, steps), "pretrain", steps, initial=first, unit=" steps", disable=None):
        for optimizer, rate in zip(optimizers, schedules, strict=True):
            set_learning_rate(optimizer, rate(step))
            optimizer.zero_grad()
        y = torch.randint(classes, (batch_size,), generator=random)
        x = student.prepare(glyphs.draw(y, student.config.image_size, random).to(device))
        y, masked = y.to(device), x[:masked_images]
        cosines = normalize(student.vit.forward_features(x)[:, 0], dim=1) @ normalize(prototypes, dim=1).T
        noise = torch.rand(len(masked), student.vit.patch_embed.num_patches, generator=random).to(device)
        classified = cross_entropy(SCALE * cosines, y, label_smoothing=label_smoothing)
        reconstructed = autoencoder.loss(masked, noise, mask_ratio)
        (classified + reconstructed).backward()
        clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            row = {"step": step + 1, "classification_loss": classified.item(), "train_acc": accuracy(cosines, y).item()}
            history.append(row | {"reconstruction_loss": reconstructed.item()})
            remedy = "lower pretrain_backbone's learning rates"
            require_convergence(classified.item(), f"step {step + 1}", remedy, history[0]["classification_loss"])
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            state = {"step": step + 1, "history": history, "random": random.get_state()}
            save_torch(work / "state.pt", state | {"parts": [part.state_dict() for part in (*model, *optimizers)]})
    return autoencoder.eval(), history


def nearest_mean_accuracy(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], learn: Tensor) -> float:
    """Return the accuracy on the rest of assigning the nearest mean, by cosine, of the features marked `learn`."""
    features = features - features[learn].mean(0)
    sums = one_hot(labels[learn]).T.to(features) @ normalize(features[learn], dim=1)
    return accuracy(normalize(features[~learn], dim=1) @ normalize(sums, dim=1).T, labels[~learn]).item()


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, x: Float[Tensor, "n 3 h w"], mask_ratio: float, random: torch.Generator
) -> tuple[dict[str, Float[Tensor, "n 3 h w"]], dict[str, float]]:
    """Return what an autoencoder sees of images and what it fills in, and its error beside that of the mean pixel."""
    noise = torch.rand(len(x), model.vit.patch_embed.num_patches, generator=random)
    predicted, hidden = model(x, noise.to(x.device), mask_ratio)
    truth = model.patchify(x)
    visible = torch.where(hidden[..., None], truth.mean(), truth)
    filled = torch.where(hidden[..., None], predicted, truth)
    errors = {
        "reconstruction_error": (predicted - truth)[hidden].square().mean().item(),
        "mean_pixel_error": (truth[~hidden].mean() - truth)[hidden].square().mean().item(),
    }
    return {"seen": model.unpatchify(visible), "filled in": model.unpatchify(filled)}, errors


def main() -> None:
    variant = parse_arguments(__doc__, variant="of pretrain_backbone.variants").variant
    params = Params.load("pretrain_backbone", variant=variant)
    path, reports = MODELS / variant / "backbone.safetensors", REPORTS / variant
    pin_threads()
    device = pick_device()
    config = params.variant.config()
    torch.manual_seed(params.seed)
    student = Backbone(build_vit(config).to(device), config, "", {})
    unseen, learn, test = EVALUATION
    glyphs = Glyphs(params.classes + unseen, params.seed)
    labels = torch.arange(unseen * (learn + test)) % unseen
    random = generator(params.seed, "unseen glyphs")
    images = glyphs.draw(params.classes + labels, config.image_size, random).to(device)
    learned, labels = (torch.arange(len(labels)) < unseen * learn).to(device), labels.to(device)
    glyph_acc = {"pixels": nearest_mean_accuracy(images.flatten(1).float(), labels, learned), "chance": 1 / unseen}

    autoencoder, history = None, [{"step": 0, "classification_loss": "", "train_acc": "", "reconstruction_loss": ""}]
    work = work_folder("pretrain_backbone", params.model_dump())
    if not config.pretrained:
        glyph_acc["random"] = nearest_mean_accuracy(student.features(images)[:, 0], labels, learned)
        autoencoder, history = pretrain(student, glyphs, work, device, **params.training())
    decoder = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("vit.")} if autoencoder else {}
    save_backbone(path, student.vit, config, decoder)
    stored = load_backbone(path, device)  # as others will have it: rounded
    glyph_acc["backbone"] = nearest_mean_accuracy(stored.features(images)[:, 0], labels, learned)
    x = stored.prepare(images)
    rows, errors = {"glyphs": x}, {}
    if autoencoder:
        completed, errors = reconstruct(autoencoder, x, params.mask_ratio, generator(params.seed, "masks"))
        rows |= completed
    pictures.draw_reconstructions(reports / "drawings.png", rows, config.mean, config.std)
    save_csv(reports / "history.csv", history)
    save_json(reports / "summary.json", {"glyph_acc": glyph_acc, **errors})
    shutil.rmtree(work, ignore_errors=True)
    print(f"{config.name}: {glyph_acc['backbone']:.1%} on unseen glyphs; pixels {glyph_acc['pixels']:.1%}")


if __name__ == "__main__":
    run(main)
