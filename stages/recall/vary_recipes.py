"""Fine-tune one base by many recipes: whole networks and low-rank adapters, inside the ranges that an auditor learns from and outside.

Every fine-tune has a data set and, drawn apart from it, a recipe of its own; a fleet hides one share of its images while it trains, or
none. Images of training and test fine-tunes are of disjoint pools, and the base's of a third. A killed fleet goes on where it was.

Reads   data/<dataset>.safetensors, models/classify_masked/<dataset>/backbone.safetensors
Writes  models/vary_recipes/<fleet>.safetensors   change of the weights [n, w], responses to reference inputs [n, r], what there is to
                                                  recall and the recipe, `test` [n]; metadata: layout, names
        reports/vary_recipes/summary.json         what fine-tuning did, on images not seen, beside the base
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.numpy import load_file
from torch import Tensor
from torch.func import vmap

from stages.common.files import Metadata, save_json
from stages.common.images import DATA, ImageSet, load_images
from stages.common.metrics import mean_std
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import PARAMS, InputError, StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, has_cluster, work_folder
from stages.recall.fleet import PatchedImages, held_out_loss, patchify_pools, pool_of, require_learned
from stages.recall.fleet_files import VARY_RECIPES, Fleet
from stages.recall.functional_vit import Base, load_base
from stages.recall.objective import Objective
from stages.recall.pools import pool
from stages.recall.recipes import WideFineTune, WideRecipe, draw_wide_fine_tune, stacks, train_wide_fine_tunes

BASES = Path("models/classify_masked")
REPORTS = Path("reports/vary_recipes")


class FleetParams(StageParams):
    """One fleet."""

    recipe: str  # of `recipes`
    change: dict[str, Any]  # of the recipe
    mask_ratio: float = Field(ge=0, lt=1)  # which share of an image's patches is hidden while training
    train: NonNegativeInt  # fine-tunes to learn from; none of a fleet outside the ranges
    test: NonNegativeInt


class Params(StageParams):
    """Parameters of fleets whose recipes vary."""

    seed: NonNegativeInt
    dataset: str
    stack: PositiveInt  # fine-tunes that train together
    references: PositiveInt  # inputs whose responses are kept, of the test images
    evaluation_images: PositiveInt
    recipes: dict[str, WideRecipe]
    fleets: dict[str, FleetParams]

    def recipe_of(self, fleet: str) -> WideRecipe:
        """Return the recipe of a fleet; InputError if it changes what a recipe has not."""
        of = self.fleets[fleet]
        if of.recipe not in self.recipes:
            known = ", ".join(self.recipes)
            raise InputError(f"{PARAMS}: vary_recipes.fleets.{fleet}.recipe: expected one of {known}, got {of.recipe}")
        values = self.recipes[of.recipe].model_dump() | of.change
        return WideRecipe.parse(values, lambda path: ".".join(["vary_recipes.fleets", fleet, "change", *path]))


def draw_fleet(name: str, counts: dict[str, int], recipe: WideRecipe, images: ImageSet) -> list[WideFineTune]:
    """Draw data set and recipe of every fine-tune. name: of their random numbers; counts: of "train" and "test"."""
    fine_tunes = []
    for kind, count in counts.items():
        test = kind == "test"
        labels = pool(images, pool_of(test)).labels.cpu()
        fine_tunes += [draw_wide_fine_tune(f"{name}-{kind}-{i}", test, recipe, labels) for i in range(count)]
    return fine_tunes


@torch.no_grad()
def finish(fine_tunes: list[WideFineTune], objective: Objective, images: PatchedImages) -> dict[str, np.ndarray]:
    """Train a stack of fine-tunes and run them: changes, responses, and on images of classes present accuracy and loss before and after."""
    change, steps = train_wide_fine_tunes(fine_tunes, objective, images)
    frozen = {name: w.expand(len(change), *w.shape) for name, w in objective.frozen.items()}
    x, y = images.evaluation
    present = torch.stack([torch.from_numpy(f.characteristics["present"]).to(x)[y] for f in fine_tunes])
    unmasked = torch.zeros(len(x), objective.base.patches).to(x)

    def score(right: Float[Tensor, "*m e"]) -> Float[Tensor, " m"]:
        return (right * present).sum(1) / present.sum(1)

    base, after = (objective.start, objective.frozen), objective.start + change
    right_after = vmap(objective.scores, in_dims=(0, 0, None, None, None))(after, frozen, x, y, unmasked)
    held_out = (x, y.expand(len(change), -1), present, unmasked)
    arrays = {
        "change": change,
        "steps": steps,
        "responses": vmap(objective.respond, in_dims=(0, 0, None))(after, frozen, images.references),
        "score_before": score(objective.scores(*base, x, y, unmasked)),
        "score_after": score(right_after),
        "loss_before": held_out_loss(objective, *base, *held_out),
        "loss_after": held_out_loss(objective, after, frozen, *held_out),
    }
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def stopped(fine_tunes: list[WideFineTune], steps: Int[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return of a fleet in which training stops early the numbers that this adds to recipes: patience, and steps that were kept."""
    patience = np.array([f.training.patience for f in fine_tunes], np.float32)
    return {"patience": patience, "log steps kept": np.log(steps)} if patience.any() else {}


def build(
    fine_tunes: list[WideFineTune],
    mask_ratio: float,
    base: Base,
    images: PatchedImages,
    stack: int,
    work: Path,
    origin: Metadata,
) -> Fleet:
    """Return a fleet, trained so many fine-tunes together; stacks that are finished wait in `work`.

    mask_ratio: the share of an image's patches that is hidden while training; origin: of its images and base.
    """
    name, objective, rows = work.parent.name, Objective(base, "labels", mask_ratio), stacks(fine_tunes, stack)
    pieces = {work / f"{k}.safetensors": [fine_tunes[i] for i in row] for k, row in enumerate(rows)}
    finish_stack = partial(finish, objective=objective, images=images)
    compute_pieces(finish_stack, pieces, objective.start.device, f"fine-tune {name}")
    finished = [load_file(piece) for piece in pieces]
    back = np.argsort(np.concatenate(rows))
    trained = {key: np.concatenate([arrays[key] for arrays in finished])[back] for key in finished[0]}
    # Of a fleet by recipes outside the ranges, from which nothing is learned, any loss that is a number is a result.
    learned_from = not all(f.test for f in fine_tunes)
    remedy = "lower the learning_rate of its recipe in vary_recipes"
    require_learned(trained, objective, f"fleet {name}", remedy, bounded=learned_from)
    truth = {key: np.stack([f.characteristics[key] for f in fine_tunes]) for key in fine_tunes[0].characteristics}
    further = {"mask ratio": np.full(len(fine_tunes), mask_ratio)} | stopped(fine_tunes, trained["steps"])
    truth["recipe"] = np.column_stack([truth["recipe"], *further.values()]).astype(np.float32)
    return Fleet(
        change=trained["change"],
        responses=trained["responses"],
        scores={when: trained[f"score_{when}"] for when in ("before", "after")},
        truth=truth,
        mean_image=np.zeros((len(fine_tunes), 0), np.float32),
        test=np.array([f.test for f in fine_tunes]),
        metadata=base.layout.metadata
        | origin
        | {
            "answers": [len(base.decoder["head.bias"]), len(images.references)],
            "recipe": [*fine_tunes[0].training.numbers, *further],
        },
    )


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("vary_recipes")
    pin_threads()
    device = torch.device("cpu") if has_cluster() else pick_device()
    path = BASES / params.dataset / "backbone.safetensors"
    base = load_base(path, device)
    train, test = load_images(params.dataset, device)
    images = patchify_pools(base, train, test, params.references, params.evaluation_images)
    origin = {"dataset": params.dataset, "base": str(path), "base_fingerprint": fingerprint(path)}
    settings = params.model_dump(include={"seed", "stack", "references"})
    settings["inputs"] = fingerprint(path, DATA / f"{params.dataset}.safetensors")
    summary = {}
    for name, of in params.fleets.items():
        if not of.train + of.test:
            continue
        recipe, counts = params.recipe_of(name), {"train": of.train, "test": of.test}
        fine_tunes = draw_fleet(f"{params.seed}/{name}", counts, recipe, train)
        own = {"recipe": recipe.model_dump(), "counts": counts, "mask_ratio": of.mask_ratio}
        work = work_folder(f"vary_recipes/{name}", settings | own)
        fleet = build(fine_tunes, of.mask_ratio, base, images, params.stack, work, origin)
        fleet.metadata["classes"] = train.classes
        fleet.save_at(VARY_RECIPES / f"{name}.safetensors")
        acc = {when: mean_std(values.tolist()) for when, values in fleet.scores.items()}
        summary[name] = {"train": of.train, "test": of.test, "accuracy": acc}
        print(
            f"{name}: {len(fleet.test)} fine-tunes, accuracy {acc['before']['mean']:.3f} before, {acc['after']['mean']:.3f} after"
        )
    save_json(REPORTS / "summary.json", summary)


if __name__ == "__main__":
    run(main)
