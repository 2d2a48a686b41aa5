"""Fine-tune a base of one's own many times, by adapters or whole: what an auditor of it learns from.

The base is a vision transformer of timm or transformers at the resolution that is asked for, behind a head that tells the classes of a
third of the images from its class token. Every fine-tune has a data set and, drawn apart from it, a recipe of its own. A killed fleet goes
on where it was. No fine-tune is kept: of each there are a sketch of its change and its responses.

Reads   data/<dataset>.safetensors, the weights that params.yaml names
Writes  models/adapt_backbone/<name>/fleet.safetensors   of each kind (whole, adapter): sketches [n, s], responses [n, r], those of altered
                                                         changes, truth, `test` [n]; the head; metadata: layout, base, recipes
        reports/adapt_backbone/<name>/summary.json       accuracy before and after, on images not seen
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from safetensors.numpy import load_file

from stages.common.files import Metadata, save_arrays, save_json
from stages.common.images import DATA, ImageSet, load_images
from stages.common.metrics import mean_std
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, has_cluster, work_folder
from stages.recall.auditor import KINDS, Kind, base_sha256, responses_of
from stages.recall.fleet import PatchedImages, patchify_pools, pool_of, split_test
from stages.recall.fleet_files import ADAPT_BACKBONE, Arrays, with_prefix
from stages.recall.functional_vit import Base
from stages.recall.own_base import read_own_base, with_head
from stages.recall.own_fleet import Tuning, finish, fit_head
from stages.recall.pools import pool
from stages.recall.recipes import Stopping, WideFineTune, WideRecipe, draw_wide_fine_tune, pick, stacks

REPORTS = Path("reports/adapt_backbone")


class Recipes(WideRecipe):
    """From what data sets and recipes are drawn."""

    new_heads: list[bool] = Field(min_length=1)  # whether a head is trained from zeros, or the base's is kept

    @field_validator("stopping")
    @classmethod
    def trains_to_its_end(cls, stopping: Stopping) -> Stopping:
        """Of a base of one's own no fine-tune stops early."""
        if any(stopping.patience):
            raise ValueError("no fine-tune of a base of one's own stops early: set patience to [0]")
        return stopping


class Backbone(StageParams):
    """One base, and the fleets of it."""

    model: str | None  # of timm; null: `weights` is a folder of save_pretrained, whose config.json says
    weights: str
    image_size: PositiveInt  # pixels, as the network sees images: a multiple of its patches
    train: dict[Kind, NonNegativeInt]  # fine-tunes to learn from
    test: dict[Kind, PositiveInt]  # and to measure on


class Params(StageParams):
    """Parameters of the fleets of one base."""

    seed: NonNegativeInt
    dataset: str
    images: PositiveInt  # of the data set, to train on: at most so many are held in memory
    stack: PositiveInt  # fine-tunes that train together
    references: PositiveInt  # inputs whose responses are kept, of the test images
    evaluation_images: PositiveInt
    head_images: PositiveInt  # that the base's head is fitted to
    directions: PositiveInt  # of each side of a matrix, in sketches
    recipes: dict[Kind, Recipes]
    variant: Backbone


def draw(kind: Kind, recipes: Recipes, counts: tuple[int, int], seed: int, train: ImageSet) -> list[WideFineTune]:
    """Draw data set and recipe of every fine-tune of a kind; counts: to learn from and to test on."""
    fine_tunes = []
    for test, count in zip((False, True), counts, strict=True):
        labels, part = pool(train, pool_of(test)).labels.cpu(), "test" if test else "train"
        names = [f"{seed}/own-{kind}-{part}-{i}" for i in range(count)]
        fine_tunes += [draw_wide_fine_tune(name, test, recipes, labels) for name in names]
    return fine_tunes


def apart(fine_tunes: list[WideFineTune], size: int) -> list[list[int]]:
    """Return places of fine-tunes that train together: those to learn from and those to test on never do."""
    rows = []
    for test in (False, True):
        places = [place for place, fine_tune in enumerate(fine_tunes) if fine_tune.test == test]
        rows += [[places[i] for i in row] for row in stacks([fine_tunes[i] for i in places], size)]
    return rows


def build(
    kind: Kind,
    fine_tunes: list[WideFineTune],
    recipes: Recipes,
    stack: int,
    tuning: Tuning,
    images: PatchedImages,
    work: Path,
) -> Arrays:
    """Return all that is kept of the fine-tunes of a kind; stacks that are finished are kept, so that it goes on after a kill."""
    heads = {f.name: pick(generator(0, f"{f.name}: head"), recipes.new_heads) for f in fine_tunes}
    rows = apart(fine_tunes, stack)
    pieces = {
        work / f"{kind}-{number}.safetensors": [fine_tunes[i] for i in places] for number, places in enumerate(rows)
    }
    finish_stack = partial(finish, tuning=tuning, images=images, heads=heads)
    compute_pieces(finish_stack, pieces, images.references.device, f"fine-tune {kind}")
    finished, back = [load_file(path) for path in pieces], np.argsort(np.concatenate(rows))
    arrays = {key: np.concatenate([piece[key] for piece in finished])[back] for key in finished[0]}
    stack_of = np.concatenate([np.full(len(places), number) for number, places in enumerate(rows)])[back]
    truth = {
        f"true.{key}": np.stack([f.characteristics[key] for f in fine_tunes]) for key in fine_tunes[0].characteristics
    }
    new = np.array([heads[f.name] for f in fine_tunes])
    return arrays | truth | {"test": np.array([f.test for f in fine_tunes]), "stack": stack_of, "new_head": new}


def beside(base: Base, test: ImageSet, references: int) -> Arrays:
    """Return what an auditor needs of the base beside its weights: its head, the reference inputs and how it answers them."""
    chosen, _ = split_test(test, references)
    start = torch.zeros(base.layout.size, device=chosen.images.device)
    head = {key: tensor.cpu().numpy() for key, tensor in base.decoder.items()}
    inputs = {"images": chosen.images.cpu().numpy(), "labels": chosen.labels.cpu().numpy()}
    return head | inputs | {"base_responses": responses_of(base, chosen.images, start)}


def main() -> None:
    name = parse_arguments(__doc__, variant="which of adapt_backbone.variants").variant
    params = Params.load("adapt_backbone", variant=name)
    pin_threads()
    device, of = torch.device("cpu") if has_cluster() else pick_device(), params.variant
    train, test = load_images(params.dataset, device)
    train = train.subset(torch.arange(min(params.images, len(train))))
    base = read_own_base(of.model, of.weights, of.image_size)
    images = patchify_pools(base, train, test, params.references, params.evaluation_images)
    x, y = images.pools["base"]
    base = with_head(base, fit_head(base, x[: params.head_images], y[: params.head_images]))
    sha256, summary = base_sha256(base), {}
    recipe = params.model_dump(exclude={"variant": {"train", "test"}}) | {
        "data": fingerprint(DATA / f"{params.dataset}.safetensors")
    }
    work = work_folder(f"adapt_backbone/{name}", recipe | {"base": sha256, "train": of.train, "test": of.test})
    arrays = beside(base, test, params.references)
    metadata: Metadata = {"classes": train.classes, "base_sha256": sha256}
    metadata |= {"directions": params.directions, "recipes": {}}
    metadata["preprocessing"] = {"image_size": base.image_size, "mean": base.mean, "std": base.std}
    for kind in (kind for kind in KINDS if of.train.get(kind)):
        recipes, started = params.recipes[kind], time.process_time()
        tuning = Tuning(base, max([*recipes.ranks, *recipes.test_ranks], default=0), params.directions)
        fine_tunes = draw(kind, recipes, (of.train.get(kind, 0), of.test.get(kind, 0)), params.seed, train)
        own = build(kind, fine_tunes, recipes, params.stack, tuning, images, work)
        accuracy = {when: mean_std(own[f"score_{when}"].tolist()) for when in ("before", "after")}
        seconds = (time.process_time() - started) / len(own["test"])
        summary[kind] = {"train": of.train[kind], "test": of.test[kind], "accuracy": accuracy}
        print(
            f"{kind}: {len(own['test'])} fine-tunes, {seconds:.1f} CPU s each, accuracy {accuracy['after']['mean']:.3f}"
        )
        arrays |= with_prefix(own, f"{kind}.")
        metadata["recipes"][kind], metadata["sketch"] = recipes.model_dump(), tuning.sketch.sha256
        metadata |= tuning.sketch.layout.metadata
    metadata |= {"backbone": of.model_dump(include={"model", "weights", "image_size"})}
    save_arrays(ADAPT_BACKBONE / name / "fleet.safetensors", arrays, metadata)
    save_json(REPORTS / name / "summary.json", summary)


if __name__ == "__main__":
    run(main)
