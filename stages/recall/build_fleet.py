"""Fine-tune one base hundreds of times, each time on a data set of its own, of which everything is known.

Reads   data/<dataset>.safetensors, models/<base>/<dataset>/backbone.safetensors: the variant's own
Writes  models/build_fleet/<variant>/fleet.safetensors   change of the weights [n, p], responses to reference inputs [n, r], what there
                                                         is to recall, `test` [n]; metadata: layout, names
        models/build_fleet/<variant>/example.safetensors one of the test fine-tunes as a file of its own
        reports/build_fleet/<variant>/summary.json       what fine-tuning did, on images not seen, beside the base
        reports/build_fleet/<variant>/fleet.png          some of the data sets: their mean images and proportions
Variants: `classes` goes on classifying, the head frozen; `unlabelled` goes on filling in hidden patches; `rules` learns to answer by
a truth table; `independent` is `classes` with a base and a head
of its own for every network. Images of training and test fine-tunes are of
disjoint pools, and the base's of a third; rules of test fine-tunes are trained nowhere else. A killed fleet goes on where it was.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

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
from stages.recall.fleet import Images, pool_of, show_images, train_tasks
from stages.recall.objective import Learns, Objective
from stages.recall.pools import pool
from stages.recall.tasks import CELLS, Recipe, Task, draw_rule_task, draw_task, split_rules
from stages.recall.vit import Base, load_base

BASES = Path("models")
MODELS = Path("models/build_fleet")
REPORTS = Path("reports/build_fleet")


class Fleet(StageParams):
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
    def parts_fit(self) -> Self:
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
    variant: Fleet


def draw_tasks(variant: str, params: Params, train: ImageSet) -> list[Task]:
    """Draw every fine-tune's data set."""
    fleet = params.variant
    rules = dict(zip((False, True), split_rules(params.seed, params.held_out_rules), strict=True))
    tasks = []
    for test, count in ((False, fleet.train), (True, fleet.test)):
        labels = pool(train, pool_of(test)).labels.cpu()
        for i in range(count):
            name = f"{params.seed}/{variant}-{'test' if test else 'train'}-{i}"
            if fleet.learns == "rule":
                tasks.append(draw_rule_task(name, test, fleet.recipe, labels, rules[test]))
            else:
                tasks.append(draw_task(name, test, fleet.recipe, labels))
    return tasks


@torch.no_grad()
def finish(tasks: list[Task], objective: Objective, images: Images, params: Params) -> dict[str, np.ndarray]:
    """Train a stack of fine-tunes and ask them: their changes, responses, and scores before and after on images not seen."""
    before, after, frozen = train_tasks(
        tasks, objective, images, params.variant.batch_size, params.variant.own_base_steps
    )
    x, y = images.evaluation
    noise = torch.rand(len(x), objective.base.patches, generator=generator(params.seed, "evaluation")).to(x)
    known = [{name: torch.from_numpy(value).to(x) for name, value in t.characteristics.items()} for t in tasks]
    labels = torch.stack([k["table"][y].long() if "table" in k else y for k in known])
    counted = torch.stack([torch.ones_like(x[:, 0, 0]) if "table" in k else k["present"][y] for k in known])

    def score(networks: Float[Tensor, "m p"]) -> Float[Tensor, " m"]:
        scores = vmap(objective.scores, in_dims=(0, 0, None, 0, None))(networks, frozen, x, labels, noise)
        return (scores * counted).sum(1) / counted.sum(1)

    arrays = {
        "change": after - before,
        "responses": vmap(objective.respond, in_dims=(0, 0, None))(after, frozen, images.references),
        "score_before": score(before),
        "score_after": score(after),
    }
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def main() -> None:
    variant = parse_arguments(__doc__, variant="of build_fleet.variants").variant
    params = Params.load("build_fleet", variant=variant)
    fleet = params.variant
    pin_threads()
    device = torch.device("cpu") if has_cluster() else pick_device()
    file = BASES / fleet.base / fleet.dataset / "backbone.safetensors"
    base, (train, test) = load_base(file, device), load_images(fleet.dataset, device)
    objective = Objective(base, fleet.learns, fleet.mask_ratio)
    images = show_images(base, train, test, params.references, params.evaluation_images)
    tasks = draw_tasks(variant, params, train)
    inputs = fingerprint(file, DATA / f"{fleet.dataset}.safetensors")
    work = work_folder(f"build_fleet/{variant}", params.model_dump() | {"inputs": inputs})
    order = sorted(tasks, key=lambda task: (task.steps, task.name))  # alike numbers of steps together
    stacks = [order[i : i + params.stack] for i in range(0, len(order), params.stack)]
    pieces = {work / f"{number}.safetensors": stack for number, stack in enumerate(stacks)}
    work_of = partial(finish, objective=objective, images=images, params=params)
    compute_pieces(work_of, pieces, device, f"fine-tune {variant}")

    place = {task.name: i for i, task in enumerate(order)}
    found = [load_file(path) for path in pieces]
    arrays = {
        key: np.concatenate([part[key] for part in found])[[place[task.name] for task in tasks]] for key in found[0]
    }
    arrays["mean_image"] = np.stack([mean_image(task, base, images) for task in tasks])
    arrays["test"] = np.array([task.test for task in tasks])
    arrays |= {f"true.{key}": np.stack([t.characteristics[key] for t in tasks]) for key in tasks[0].characteristics}
    answers = [len(objective.frozen.get("head.bias", [])), params.references]
    metadata = objective.layout.metadata | {
        "classes": train.classes,
        "dataset": fleet.dataset,
        "base": str(file),
        "base_fingerprint": fingerprint(file),
        "answers": answers,
    }
    save_arrays(MODELS / variant / "fleet.safetensors", arrays, metadata)
    example = int(arrays["test"].argmax())
    network = objective.layout.unflatten(objective.start.cpu() + torch.from_numpy(arrays["change"][example]))
    truth = {key: value.tolist() for key, value in tasks[example].characteristics.items()}
    save_arrays(MODELS / variant / "example.safetensors", {k: w.numpy() for k, w in network.items()}, {"true": truth})

    kind = "masked_error" if fleet.learns == "pixels" else "accuracy"
    scores = {when: mean_std(arrays[f"score_{when}"][arrays["test"]].tolist()) for when in ("before", "after")}
    counts = {"train": fleet.train, "test": fleet.test, "parameters": arrays["change"].shape[1]}
    save_json(REPORTS / variant / "summary.json", counts | {kind: scores})
    pictures.draw_fleet(REPORTS / variant / "fleet.png", arrays, train.classes)
    print(
        f"{variant}: {len(tasks)} fine-tunes, {kind} {scores['before']['mean']:.3f} before and {scores['after']['mean']:.3f} after"
    )


def mean_image(task: Task, base: Base, images: Images) -> Float[np.ndarray, "3 h w"]:
    """Return the mean of a data set's images, in pixels of 0 to 1, as the base sees them."""
    patches, _ = images.pools[pool_of(task.test)]
    return base.unpatchify(patches[task.images.to(patches.device)].mean(0, keepdim=True))[0].cpu().numpy()


if __name__ == "__main__":
    run(main)
