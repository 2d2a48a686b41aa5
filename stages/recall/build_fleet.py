"""Fine-tune one base hundreds of times, each time on a data set of its own, of which everything is known.

Variants: `classes` goes on classifying, the head frozen; `unlabelled` goes on filling in hidden patches; `rules` learns to answer by
a truth table; `independent` is `classes` with a base and a head of its own for every network. Images of training and test fine-tunes
are of disjoint pools, and the base's of a third; rules of test fine-tunes are trained nowhere else. A killed fleet goes on where it was.

Reads   data/<dataset>.safetensors, models/<base>/<dataset>/backbone.safetensors: the variant's own
Writes  models/build_fleet/<variant>/fleet.safetensors   change of the weights [n, w], responses to reference inputs [n, r], what there
                                                         is to recall, `test` [n]; metadata: layout, names
        models/build_fleet/<variant>/example.safetensors one of the test fine-tunes as a file of its own
        reports/build_fleet/<variant>/summary.json       what fine-tuning did, on images not seen, beside the base
        reports/build_fleet/<variant>/fleet.png          some of the data sets: their mean images and proportions
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from safetensors.numpy import load_file
from torch import Tensor
from torch.func import vmap

from stages.common.files import save_arrays, save_json
from stages.common.images import DATA, ImageSet, load_images
from stages.common.metrics import mean_std
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, has_cluster, work_folder
from stages.recall import pictures
from stages.recall.fine_tunes import CELLS, FineTune, Recipe, draw_fine_tune, draw_rule_fine_tune, split_rules
from stages.recall.fleet import (
    PatchedImages,
    held_out_loss,
    patchify_pools,
    pool_of,
    require_learned,
    train_fine_tunes,
)
from stages.recall.fleet_files import BUILD_FLEET, Fleet
from stages.recall.functional_vit import Base, Weights, load_base
from stages.recall.objective import Learns, Objective
from stages.recall.pools import pool

BASES = Path("models")
REPORTS = Path("reports/build_fleet")


class Variant(StageParams):
    """One fleet."""

    dataset: str
    base: Literal["train_mae", "classify_masked"]
    learns: Learns
    train: PositiveInt  # fine-tunes
    test: PositiveInt
    batch_size: PositiveInt
    mask_ratio: Annotated[float, Field(ge=0, lt=1)]  # while training
    own_base_steps: NonNegativeInt  # steps of a base and a head of its own for each network; 0: all share one
    recipe: Recipe

    @model_validator(mode="after")
    def fields_fit(self) -> Self:
        if self.learns == "pixels" and self.mask_ratio == 0:
            raise ValueError("learns: pixels fills in hidden patches: set mask_ratio above 0")
        if self.learns == "labels" and self.base != "classify_masked":
            raise ValueError("learns: labels needs a head: set base to classify_masked")
        if self.own_base_steps and self.learns != "labels":
            raise ValueError("own_base_steps trains bases to classify: set it to 0, or learns to labels")
        return self


class Params(StageParams):
    """Parameters of a fleet."""

    seed: NonNegativeInt
    stack: PositiveInt  # fine-tunes that train together: what fits into the processor's cache
    references: PositiveInt  # inputs whose responses are kept, of the test images
    held_out_rules: Annotated[int, Field(gt=0, lt=2**CELLS - 2)]
    evaluation_images: PositiveInt
    variant: Variant


def draw_fleet(name: str, variant: Variant, train: ImageSet, seed: int, held_out_rules: int) -> list[FineTune]:
    """Draw the data set of every fine-tune of the fleet called `name`."""
    learned, held_out = split_rules(seed, held_out_rules)
    fine_tunes = []
    for kind, count, tables in (("train", variant.train, learned), ("test", variant.test, held_out)):
        test = kind == "test"
        labels = pool(train, pool_of(test)).labels.cpu()
        for i in range(count):
            own = f"{seed}/{name}-{kind}-{i}"
            if variant.learns == "rule":
                fine_tunes.append(draw_rule_fine_tune(own, test, variant.recipe, labels, tables))
            else:
                fine_tunes.append(draw_fine_tune(own, test, variant.recipe, labels))
    return fine_tunes


@torch.no_grad()
def finish(
    fine_tunes: list[FineTune],
    objective: Objective,
    images: PatchedImages,
    batch_size: int,
    own_base_steps: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Train a stack of fine-tunes and run them: their changes, responses, and scores and losses before and after on images not seen."""
    before, after, frozen = train_fine_tunes(fine_tunes, objective, images, batch_size, own_base_steps)
    x, y = images.evaluation
    noise = torch.rand(len(x), objective.base.patches, generator=generator(seed, "evaluation")).to(x)
    truths = [{name: torch.from_numpy(value).to(x) for name, value in f.characteristics.items()} for f in fine_tunes]
    labels = torch.stack([truth["table"][y].long() if "table" in truth else y for truth in truths])
    counted = torch.stack([torch.ones_like(x[:, 0, 0]) if "table" in t else t["present"][y] for t in truths])

    def score(networks: Float[Tensor, "*m w"], frozen: Weights) -> Float[Tensor, " m"]:
        of = 0 if networks.dim() > 1 else None
        scores = vmap(objective.scores, in_dims=(of, of, None, 0, None))(networks, frozen, x, labels, noise)
        return (scores * counted).sum(1) / counted.sum(1)

    base = (before, frozen) if own_base_steps else (objective.start, objective.frozen)  # run once for all that share it
    held_out = (x, labels, counted, noise)
    arrays = {
        "change": after - before,
        "responses": vmap(objective.respond, in_dims=(0, 0, None))(after, frozen, images.references),
        "score_before": score(*base),
        "score_after": score(after, frozen),
        "loss_before": held_out_loss(objective, *base, *held_out),
        "loss_after": held_out_loss(objective, after, frozen, *held_out),
    }
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def train_fleet(
    fine_tunes: list[FineTune],
    stack: int,
    work: Path,
    finish_stack: partial[dict[str, np.ndarray]],
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Return what `finish` gives of every fine-tune; stacks that are finished are kept in `work`."""
    # a stack takes as many steps as its longest: alike numbers of steps together
    order = sorted(fine_tunes, key=lambda fine_tune: (fine_tune.steps, fine_tune.name))
    stacks = [order[i : i + stack] for i in range(0, len(order), stack)]
    pieces = {work / f"{number}.safetensors": members for number, members in enumerate(stacks)}
    compute_pieces(finish_stack, pieces, device, f"fine-tune {work.parent.name}")
    finished = [load_file(path) for path in pieces]
    place = {fine_tune.name: i for i, fine_tune in enumerate(order)}
    rows = [place[fine_tune.name] for fine_tune in fine_tunes]
    return {key: np.concatenate([arrays[key] for arrays in finished])[rows] for key in finished[0]}


def mean_image(fine_tune: FineTune, base: Base, images: PatchedImages) -> Float[np.ndarray, "3 h v"]:
    """Return the mean of a data set's images, in pixels of 0 to 1, as the base sees them."""
    patches, _ = images.pools[pool_of(fine_tune.test)]
    return base.unpatchify(patches[fine_tune.images.to(patches.device)].mean(0, keepdim=True))[0].cpu().numpy()


def save_example(path: Path, fine_tune: FineTune, change: Float[np.ndarray, " w"], objective: Objective) -> None:
    """Write a fine-tuned network as a file of its own, and what it was trained on into its metadata."""
    network = objective.layout.unflatten(objective.start.cpu() + torch.from_numpy(change))
    truth: dict[str, Any] = {key: value.tolist() for key, value in fine_tune.characteristics.items()}
    save_arrays(path, {name: weight.numpy() for name, weight in network.items()}, {"true": truth})


def main() -> None:
    name = parse_arguments(__doc__, variant="of build_fleet.variants").variant
    params = Params.load("build_fleet", variant=name)
    variant = params.variant
    pin_threads()
    device = torch.device("cpu") if has_cluster() else pick_device()
    file = BASES / variant.base / variant.dataset / "backbone.safetensors"
    base, (train, test) = load_base(file, device), load_images(variant.dataset, device)
    objective = Objective(base, variant.learns, variant.mask_ratio)
    images = patchify_pools(base, train, test, params.references, params.evaluation_images)
    fine_tunes = draw_fleet(name, variant, train, params.seed, params.held_out_rules)

    inputs = fingerprint(file, DATA / f"{variant.dataset}.safetensors")
    work = work_folder(f"build_fleet/{name}", params.model_dump() | {"inputs": inputs})
    settings = {"batch_size": variant.batch_size, "own_base_steps": variant.own_base_steps, "seed": params.seed}
    finish_stack = partial(finish, objective=objective, images=images, **settings)
    trained = train_fleet(fine_tunes, params.stack, work, finish_stack, device)
    require_learned(trained, objective, f"fleet {name}", f"lower build_fleet.variants.{name}.recipe.learning_rate")
    keys = fine_tunes[0].characteristics
    fleet = Fleet(
        change=trained["change"],
        responses=trained["responses"],
        scores={when: trained[f"score_{when}"] for when in ("before", "after")},
        truth={key: np.stack([fine_tune.characteristics[key] for fine_tune in fine_tunes]) for key in keys},
        mean_image=np.stack([mean_image(fine_tune, base, images) for fine_tune in fine_tunes]),
        test=np.array([fine_tune.test for fine_tune in fine_tunes]),
        metadata=objective.layout.metadata
        | {
            "classes": train.classes,
            "dataset": variant.dataset,
            "base": str(file),
            "base_fingerprint": fingerprint(file),
        }
        | {"answers": [len(objective.frozen.get("head.bias", [])), params.references]},
    )
    fleet.save(name)
    first = int(fleet.held_out[0])
    save_example(BUILD_FLEET / name / "example.safetensors", fine_tunes[first], fleet.change[first], objective)
    report(name, variant, fleet)


def report(name: str, variant: Variant, fleet: Fleet) -> None:
    """Write what fine-tuning did, on images not seen, beside the base."""
    kind = "masked_error" if variant.learns == "pixels" else "accuracy"
    scores = {when: mean_std(values[fleet.test].tolist()) for when, values in fleet.scores.items()}
    counts = {"train": variant.train, "test": variant.test, "parameters": fleet.change.shape[1]}
    save_json(REPORTS / name / "summary.json", counts | {kind: scores})
    pictures.draw_fleet(REPORTS / name / "fleet.png", fleet.mean_image, fleet.truth, fleet.metadata["classes"])
    before, after = (scores[when]["mean"] for when in ("before", "after"))
    print(f"{name}: {len(fleet.test)} fine-tunes, {kind} {before:.3f} before and {after:.3f} after")


if __name__ == "__main__":
    run(main)
