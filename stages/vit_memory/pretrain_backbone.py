"""Pretrain a vision transformer on drawn glyphs, as a masked autoencoder and a classifier at once; or record a published one.

It is trained on images of no data set; how glyphs vary was chosen on training images of MNIST and digits. A killed run goes on
from its last state in .work/. To release what was trained, copy it to models/released/ by hand.

Reads   nothing
Writes  models/pretrain_backbone/<variant>/backbone.safetensors   weights in float16 (of a published model: name and SHA-256)
        reports/pretrain_backbone/<variant>/history.csv           losses while training
        reports/pretrain_backbone/<variant>/summary.json          accuracy on unseen classes of glyphs; random weights, pixels
        reports/pretrain_backbone/<variant>/drawings.png          glyphs, and what the autoencoder makes of hidden patches
"""

import shutil
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from tqdm import tqdm

from stages.common.backbone import Backbone, BackboneConfig, build_vit, load_backbone, published_config, save_backbone
from stages.common.checkpoints import save_torch
from stages.common.drawings import Glyphs
from stages.common.figures import image_grid, save_figure, show_image
from stages.common.files import save_csv, save_json
from stages.common.mae import MaskedAutoencoder
from stages.common.metrics import accuracy
from stages.common.optim import set_learning_rate, warmup_times_cosine
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import work_folder
from stages.vit_memory.muon import Muon

MODELS = Path("models/pretrain_backbone")
REPORTS = Path("reports/pretrain_backbone")

LOG_EVERY = 50  # steps
SAVE_EVERY = 200  # steps, while training
WARMUP_FRACTION = 0.05  # of the steps
SCALE = 16.0  # of cosines, as logits
EVALUATION = (100, 5, 10)  # unseen classes, drawings of each to learn from, and to be tested on

Rows = list[dict[str, Any]]


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


def pretrain(
    student: Backbone, glyphs: Glyphs, params: Params, work: Path, device: torch.device
) -> tuple[MaskedAutoencoder, Rows]:
    """Train `student.vit` in place, on new drawings in every step; return it as an autoencoder, and the history.

    Goes on from work/state.pt if it is there.
    """
    torch.manual_seed(params.seed)
    autoencoder = MaskedAutoencoder(student.vit).to(device)
    classes = nn.Parameter(0.02 * torch.randn(params.classes, student.vit.embed_dim, device=device))
    model = nn.ParameterDict({"classes": classes}), autoencoder
    parameters = [p for part in model for p in part.parameters()]
    matrices = {p for name, p in autoencoder.named_parameters() if "block" in name and p.ndim == 2}
    rates = params.matrix_learning_rate, params.learning_rate
    of_matrices, rest = [p for p in parameters if p in matrices], [p for p in parameters if p not in matrices]
    decay = params.weight_decay
    optimizers = Muon(of_matrices, rates[0], decay), AdamW(rest, rates[1], weight_decay=decay, fused=True)
    schedules = [warmup_times_cosine(rate, params.steps, WARMUP_FRACTION) for rate in rates]
    random = generator(params.seed, "pretraining")
    first, history = 0, []
    if (work / "state.pt").is_file():
        state = torch.load(work / "state.pt", map_location=device, weights_only=True)
        for part, values in zip(model, state["model"], strict=True):
            part.load_state_dict(values)
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        random.set_state(state["random"].cpu())
        first, history = state["step"], state["history"]
    student.vit.train()
    steps = range(first, params.steps)
    for step in tqdm(steps, "pretrain", params.steps, initial=first, unit=" steps", disable=None):
        for optimizer, rate in zip(optimizers, schedules, strict=True):
            set_learning_rate(optimizer, rate(step))
            optimizer.zero_grad()
        y = torch.randint(params.classes, (params.batch_size,), generator=random)
        x = student.prepare(glyphs.draw(y, student.config.image_size, random).to(device))
        y, masked = y.to(device), x[: params.masked_images]
        cosines = normalize(student.vit.forward_features(x)[:, 0], dim=1) @ normalize(classes, dim=1).T
        noise = torch.rand(len(masked), student.vit.patch_embed.num_patches, generator=random).to(device)
        classified = cross_entropy(SCALE * cosines, y, label_smoothing=params.label_smoothing)
        reconstructed = autoencoder.loss(masked, noise, params.mask_ratio)
        (classified + reconstructed).backward()
        clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == params.steps:
            row = {"step": step + 1, "classification_loss": classified.item(), "train_acc": accuracy(cosines, y).item()}
            history.append(row | {"reconstruction_loss": reconstructed.item()})
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < params.steps:
            state = {"step": step + 1, "history": history, "random": random.get_state()}
            state |= {"model": [part.state_dict() for part in model]}
            state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            save_torch(work / "state.pt", state)
    return autoencoder.eval(), history


def nearest_mean_accuracy(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], learn: Tensor) -> float:
    """Return the accuracy on the rest of assigning the nearest mean, by cosine, of the features marked `learn`."""
    features = features - features[learn].mean(0)
    known = one_hot(labels[learn]).T.to(features) @ normalize(features[learn], dim=1)
    return accuracy(normalize(features[~learn], dim=1) @ normalize(known, dim=1).T, labels[~learn]).item()


@torch.no_grad()
def draw_reconstructions(
    path: Path, model: MaskedAutoencoder | None, x: Float[Tensor, "n 3 h w"], student: Backbone, params: Params
) -> dict[str, float]:
    """Draw glyphs and, if there is an autoencoder, what it sees and fills in; return its error beside that of the mean pixel."""
    figure, axes = image_grid(3 if model else 1, 10)
    shown = [(x, "glyphs")]
    errors = {}
    if model:
        noise = torch.rand(len(x), student.vit.patch_embed.num_patches, generator=generator(params.seed, "masks"))
        predicted, hidden = model(x, noise.to(x.device), params.mask_ratio)
        truth = model.patchify(x)
        seen = torch.where(hidden[..., None], truth.mean(), truth)
        filled = torch.where(hidden[..., None], predicted, truth)
        shown += [(model.unpatchify(seen), "seen"), (model.unpatchify(filled), "filled in")]
        errors["reconstruction_error"] = (predicted - truth)[hidden].square().mean().item()
        errors["mean_pixel_error"] = (truth[~hidden].mean() - truth)[hidden].square().mean().item()
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (student.config.mean, student.config.std))
    for row, (images, label) in zip(axes, shown, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images, strict=False):
            show_image(ax, (image * std + mean).cpu().numpy())
    save_figure(path, figure)
    return errors


def main() -> None:
    variant = parse_arguments(__doc__, variant="of pretrain_backbone.variants").variant
    params = Params.load("pretrain_backbone", variant=variant)
    path, reports = MODELS / variant / "backbone.safetensors", REPORTS / variant
    pin_threads()
    device = pick_device()
    asked = params.variant
    if asked.pretrained:
        config = published_config(asked.name, asked.image_size)
    else:
        shape = asked.shape and asked.shape.model_dump()
        config = BackboneConfig(asked.name, False, asked.image_size, shape)
    torch.manual_seed(params.seed)
    student = Backbone(build_vit(config).to(device), config, "", {})
    unseen, learn, test = EVALUATION
    glyphs = Glyphs(params.classes + unseen, params.seed)
    labels = torch.arange(unseen * (learn + test)) % unseen
    images = glyphs.draw(params.classes + labels, asked.image_size, generator(params.seed, "unseen glyphs")).to(device)
    known, labels = (torch.arange(len(labels)) < unseen * learn).to(device), labels.to(device)
    glyph_acc = {"pixels": nearest_mean_accuracy(images.flatten(1).float(), labels, known), "chance": 1 / unseen}

    autoencoder, history = None, [{"step": 0, "classification_loss": "", "train_acc": "", "reconstruction_loss": ""}]
    work = work_folder("pretrain_backbone", params.model_dump())
    if not asked.pretrained:
        glyph_acc["random"] = nearest_mean_accuracy(student.features(images)[:, 0], labels, known)
        autoencoder, history = pretrain(student, glyphs, params, work, device)
    decoder = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("vit.")} if autoencoder else {}
    save_backbone(path, student.vit, config, decoder)
    stored = load_backbone(path, device)  # as others will have it: rounded
    glyph_acc["backbone"] = nearest_mean_accuracy(stored.features(images)[:, 0], labels, known)
    errors = draw_reconstructions(reports / "drawings.png", autoencoder, stored.prepare(images), student, params)
    save_csv(reports / "history.csv", history)
    save_json(reports / "summary.json", {"glyph_acc": glyph_acc, **errors})
    shutil.rmtree(work, ignore_errors=True)
    print(f"{asked.name}: {glyph_acc['backbone']:.1%} on unseen glyphs; pixels {glyph_acc['pixels']:.1%}")


if __name__ == "__main__":
    run(main)
