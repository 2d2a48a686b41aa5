"""Train LeNet-5 runs of several regimes, and keep snapshots of their weights and of the optimiser's state.

Reads   data/<dataset>.safetensors
Writes  models/train_lenet/<dataset>/<run>.safetensors   weights float32 [t, p], state float16 [t, p] (m / sqrt(v) of Adam,
                                                         the momentum of SGD); metadata: layout, run, snapshot_every
        models/train_lenet/<dataset>/runs.json           the recipe, and which runs are to train, validate and test forecasters
        reports/train_lenet/<dataset>/history.csv        a row for each run and snapshot
        reports/train_lenet/<dataset>/summary.json       test accuracy at the end, by regime

Finished runs wait in .work/train_lenet/ until all are, so that a stage that was killed goes on where it was.

Axes: t snapshots, p weights.
"""

import math
import shutil
from pathlib import Path
from typing import Annotated, Self

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from stages.common.files import Rows, load_metadata, save_arrays, save_csv, save_json
from stages.common.metrics import accuracy, mean_std
from stages.common.optim import require_convergence, set_learning_rate
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.common.work import fingerprint, work_folder
from stages.forecast.lenet import LeNet, lenet_logits
from stages.forecast.regimes import Regime, build_optimizer, optimizer_direction
from stages.forecast.runs import LeNetData, load_lenet_data, regime_of

MODELS = Path("models/train_lenet")
REPORTS = Path("reports/train_lenet")

RunName = Annotated[str, Field(pattern=r"^\w+-\d+$")]  # <regime>-<seed>


class Runs(StageParams):
    """Which runs a forecaster learns from, is chosen on, and is tested on."""

    train: Annotated[list[RunName], Field(min_length=1)]
    validation: Annotated[list[RunName], Field(min_length=1)]
    test: Annotated[list[RunName], Field(min_length=1)]

    @model_validator(mode="after")
    def disjoint(self) -> Self:
        names = [*self.train, *self.validation, *self.test]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"runs named twice: {', '.join(twice)}")
        return self


class Params(StageParams):
    """Parameters of one data set's runs."""

    image_size: Annotated[int, Field(ge=16)]  # pixels, to which images are resized
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the training images, kept for nowcasting
    split_seed: NonNegativeInt
    steps: PositiveInt
    batch_size: PositiveInt
    snapshot_every: PositiveInt  # steps
    evaluation_images: PositiveInt  # test images at each snapshot
    regimes: dict[str, Regime]
    runs: Runs

    @model_validator(mode="after")
    def known_regimes(self) -> Self:
        names = [*self.runs.train, *self.runs.validation, *self.runs.test]
        if unknown := sorted({regime_of(name) for name in names} - set(self.regimes)):
            raise ValueError(f"runs of unknown regimes: {', '.join(unknown)}")
        return self


def train_lenet(
    data: LeNetData, name: str, regime: Regime, steps: int, batch_size: int, snapshot_every: int
) -> tuple[LeNet, Float[Tensor, "t p"], Float[Tensor, "t p"], Rows]:
    """Return the trained network, the snapshots of weights and state, and a history row for each; `name` is <regime>-<seed>."""
    (images, labels), (test_images, test_labels) = data.train, data.test
    seed = int(name.rpartition("-")[2])
    model = LeNet(images.shape[-1], len(data.classes), seed).to(images.device, memory_format=torch.channels_last)
    optimizer, schedule = build_optimizer(model.parameters(), regime, steps)
    random = generator(seed, f"batches of {regime_of(name)}", images.device)
    weights, states, history = [], [], []
    losses = torch.zeros((), device=images.device)
    for step in range(steps + 1):
        if step % snapshot_every == 0:
            weights.append(parameters_to_vector(p.contiguous() for p in model.parameters()).detach().cpu())
            states.append(optimizer_direction(optimizer).half().cpu())
            logits = lenet_logits(model, test_images)
            row = {"run": name, "step": step, "train_loss": losses.item() / snapshot_every}
            row |= {
                "test_loss": cross_entropy(logits, test_labels).item(),
                "test_acc": accuracy(logits, test_labels).item(),
            }
            remedy = f"lower train_lenet.regimes.{regime_of(name)}.learning_rate"
            require_convergence(row["test_loss"], f"{name}, step {step}", remedy, math.log(len(data.classes)))
            history.append(row)
            losses.zero_()
        if step == steps:
            break
        set_learning_rate(optimizer, regime.learning_rate * schedule(step))
        batch = torch.randint(len(images), (batch_size,), generator=random, device=images.device)
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()
    return model, torch.stack(weights), torch.stack(states), history


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("train_lenet", dataset)
    pin_threads()
    device = pick_device()
    data = load_lenet_data(dataset, params.model_dump(), device, params.evaluation_images)
    recipe = params.model_dump(exclude={"runs"}) | {"images": fingerprint(Path(f"data/{dataset}.safetensors"))}
    work = work_folder(f"train_lenet/{dataset}", recipe)
    names = [*params.runs.train, *params.runs.validation, *params.runs.test]

    def finish(name: str) -> None:
        regime = params.regimes[regime_of(name)]
        model, weights, states, history = train_lenet(
            data, name, regime, params.steps, params.batch_size, params.snapshot_every
        )
        layout = Layout.of(dict(model.named_parameters()))
        metadata = layout.metadata | {"run": name, "snapshot_every": params.snapshot_every, "history": history}
        arrays = {"weights": weights.numpy(), "state": states.numpy()}
        save_arrays(work / f"{name}.safetensors", arrays, metadata)

    missing = [name for name in names if not (work / f"{name}.safetensors").is_file()]
    parallel_map(finish, missing, device, f"train LeNet on {dataset}", len(names) - len(missing))

    (MODELS / dataset).mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(work / f"{name}.safetensors", MODELS / dataset / f"{name}.safetensors")
    save_json(MODELS / dataset / "runs.json", params.model_dump(exclude={"evaluation_images", "regimes"}))
    histories = {name: load_metadata(MODELS / dataset / f"{name}.safetensors")["history"] for name in names}
    save_csv(REPORTS / dataset / "history.csv", [row for history in histories.values() for row in history])
    final: dict[str, list[float]] = {}
    for name, history in histories.items():
        final.setdefault(regime_of(name), []).append(history[-1]["test_acc"])
    final = {regime: mean_std(values) for regime, values in final.items()}
    save_json(REPORTS / dataset / "summary.json", {"final_test_acc": final})
    shutil.rmtree(work)
    print(f"{dataset}: {len(names)} runs, " + ", ".join(f"{k} {v['mean']:.1%}" for k, v in final.items()))


if __name__ == "__main__":
    run(main)
