"""Run the frozen backbone once over a data set, and over glyphs of classes that it has never seen.

Reads   data/<dataset>.safetensors, and the backbone that params.yaml names
Writes  models/extract_features/<dataset>/backbone.safetensors   a copy, for the stages that train through it
        models/extract_features/<dataset>/features.safetensors   float32 [n, 2, d], class token and mean of patch tokens, of
            `train`, `test`, `glyphs`, and by random weights of `random_train`, `random_test`; int64 `*_labels` [n] of the first
            three; uint8 `glyphs_images`
"""

import copy
import shutil
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveInt

from stages.common.backbone import Backbone, load_backbone
from stages.common.drawings import Glyphs
from stages.common.files import atomic_path, require, save_arrays
from stages.common.images import load_images
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.vit_memory.features import first

MODELS = Path("models/extract_features")

DRAWN_AT_ONCE = 500  # glyphs: more leave the processor's cache


class GlyphParams(StageParams):
    """Drawings of classes that nothing was trained on."""

    first_class: NonNegativeInt
    classes: PositiveInt
    images: PositiveInt


class Params(StageParams):
    """Parameters of one data set's features."""

    seed: NonNegativeInt
    backbone: Path  # a file of pretrain_backbone, or a released one
    train_images: PositiveInt  # the first, at most
    test_images: PositiveInt  # likewise
    glyphs: GlyphParams


def with_random_weights(backbone: Backbone, seed: int) -> Backbone:
    """Return a backbone of the same shape that has learnt nothing."""
    torch.manual_seed(seed)
    vit = copy.deepcopy(backbone.vit)
    for module in vit.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    vit.init_weights()
    return Backbone(vit, backbone.config, "", {})


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("extract_features", dataset)
    pin_threads()
    device = pick_device()
    backbone = load_backbone(require(params.backbone), device)
    train, test = load_images(dataset, device)
    train, test = first(train, params.train_images), first(test, params.test_images)
    labels = torch.arange(params.glyphs.images) % params.glyphs.classes
    glyphs = Glyphs(params.glyphs.first_class + params.glyphs.classes, params.seed)
    random = generator(params.seed, "glyph features")
    size = backbone.config.image_size
    drawings = torch.cat(
        [glyphs.draw(params.glyphs.first_class + y, size, random) for y in labels.split(DRAWN_AT_ONCE)]
    )
    untrained = with_random_weights(backbone, params.seed)
    jobs = {
        "train": (backbone, train.images),
        "random_train": (untrained, train.images),
        "test": (backbone, test.images),
        "random_test": (untrained, test.images),
        "glyphs": (backbone, drawings.to(device)),
    }

    features = parallel_map(lambda job: job[0].features(job[1]), list(jobs.values()), device, f"features of {dataset}")
    arrays = {name: array.cpu().numpy() for name, array in zip(jobs, features, strict=True)}
    arrays |= {"train_labels": train.labels.cpu().numpy(), "test_labels": test.labels.cpu().numpy()}
    arrays |= {"glyphs_labels": labels.numpy(), "glyphs_images": drawings.numpy()}
    metadata = {"classes": train.classes, "backbone": backbone.config.name, "sha256": backbone.sha256}
    with atomic_path(MODELS / dataset / "backbone.safetensors") as path:
        shutil.copyfile(params.backbone, path)
    save_arrays(MODELS / dataset / "features.safetensors", arrays, metadata)
    print(f"{dataset}: features of {len(train)} training and {len(test)} test images, and of {len(labels)} glyphs")


if __name__ == "__main__":
    run(main)
