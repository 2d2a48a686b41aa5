"""Train one bilinear classifier and keep its best and its latest checkpoint.

A run's `config` is a plain dictionary, kept in its checkpoints:
    dataset     name, validation_fraction, split_seed
    model       d_hidden, n_layer, bias, residual (d_input and d_output are the data set's)
    train       epochs, batch_size, learning_rate, weight_decay, warmup_fraction, shift, input_noise; and where they are wanted
                gradient_clip (largest norm of a gradient), noise_bank and mirror (see stages.common.images.Batches)
    seed        of initial weights and batches
    run_dir     where the checkpoints and metrics go
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from stages.bilinear.model import BilinearImageClassifier, Config, build_image_classifier
from stages.common.checkpoints import Checkpoint, load_torch, save_torch
from stages.common.files import Rows, Summary, save_csv, save_json
from stages.common.images import Batches, load_images, split_validation
from stages.common.optim import require_convergence, warmup_cosine
from stages.common.randomness import set_seed
from stages.common.runtime import autocast, pick_device, resolve_device

# The public names of the system's original interface: users import them from here, wherever the project keeps them.
__all__ = [
    "DatasetBundle",
    "build_image_dataloaders",
    "evaluate",
    "load_checkpoint",
    "load_model",
    "resolve_device",
    "set_seed",
    "train_image_experiment",
    "warmup_cosine",
]

IMAGES_AT_ONCE = 4096  # where nothing is trained: more would only take memory
REMEDY = "lower train_bilinear.learning_rate or gradient_clip, or raise warmup_fraction"
CHECKPOINT_KEYS = {"model_state_dict", "config", "epoch", "metrics"}


@dataclass(frozen=True)
class DatasetBundle:
    """The batches of one data set: shuffled and augmented for training, in order for validation and test."""

    train_loader: Batches
    val_loader: Batches
    test_loader: Batches
    input_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int


def build_image_dataloaders(dataset_cfg: Config, train_cfg: Config, seed: int = 0) -> DatasetBundle:
    """Return the batches of `dataset_cfg["name"]`, any data set of fetch_data; `seed` draws the training batches."""
    train, test = load_images(dataset_cfg["name"], pick_device())
    train, validation = split_validation(train, dataset_cfg["validation_fraction"], dataset_cfg["split_seed"])
    return DatasetBundle(
        train_loader=Batches(
            train,
            train_cfg["batch_size"],
            seed,
            train_cfg["shift"],
            train_cfg["input_noise"],
            train_cfg.get("noise_bank"),
            train_cfg.get("mirror", False),
        ),
        val_loader=Batches(validation, IMAGES_AT_ONCE),
        test_loader=Batches(test, IMAGES_AT_ONCE),
        input_shape=tuple(test.images.shape[1:]),
        num_classes=len(test.classes),
    )


@dataclass(frozen=True)
class TrainedRun:
    """What a run leaves behind: its checkpoints (see `load_checkpoint`), a row of metrics for each epoch, and its results."""

    best: Checkpoint
    latest: Checkpoint
    history: Rows
    summary: Summary

    def write(self, run_dir: Path) -> dict[str, Path]:
        """Write best.pt, latest.pt, metrics.csv and summary.json into `run_dir`, and return their paths by name."""
        paths = {
            "run_dir": run_dir,
            "metrics_path": run_dir / "metrics.csv",
            "summary_path": run_dir / "summary.json",
            "best_checkpoint_path": run_dir / "best.pt",
            "latest_checkpoint_path": run_dir / "latest.pt",
        }
        save_torch(paths["best_checkpoint_path"], self.best)
        save_torch(paths["latest_checkpoint_path"], self.latest)
        save_csv(paths["metrics_path"], self.history)
        save_json(paths["summary_path"], self.summary)
        return paths


def train_image_experiment(config: Config) -> dict[str, Path]:
    """Train by `config` (see the module) and write into its `run_dir`.

    Returns {"run_dir", "metrics_path", "summary_path", "best_checkpoint_path", "latest_checkpoint_path"}.
    """
    return train_run(config).write(Path(config["run_dir"]))


def train_run(config: Config) -> TrainedRun:
    """Train by `config`; validation chooses the best epoch, and the test set is read once, for that one.

    InputError as soon as it diverges.
    """
    recipe, device = config["train"], pick_device()
    data = build_image_dataloaders(config["dataset"], recipe, config["seed"])
    config = config | {
        "model": config["model"] | {"d_input": math.prod(data.input_shape), "d_output": data.num_classes}
    }
    model = build_image_classifier(config["model"], config["seed"]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["learning_rate"], weight_decay=recipe["weight_decay"], fused=True
    )
    schedule = LambdaLR(optimizer, warmup_cosine(recipe["epochs"] * len(data.train_loader), recipe["warmup_fraction"]))
    criterion = nn.CrossEntropyLoss()
    history: Rows = []
    best: Checkpoint = {}

    for epoch in range(1, recipe["epochs"] + 1):
        train_loss, train_acc = train_epoch(model, data.train_loader, optimizer, schedule, recipe.get("gradient_clip"))
        val_loss, val_acc = evaluate(model, data.val_loader, criterion, device)
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_acc": train_acc,
            "val_loss": val_loss,
            "val_acc": val_acc,
            "lr": schedule.get_last_lr()[0],
        }
        where = f"{config['run_dir']}, epoch {epoch}"
        require_convergence(metrics["train_loss"], where, REMEDY, math.log(data.num_classes))
        require_convergence(val_loss, where, REMEDY)  # of a few images it may be large
        history.append(metrics)
        latest = {"model_state_dict": _copy(model), "config": config, "epoch": epoch, "metrics": metrics}
        if not best or (val_acc, -val_loss) > (best["metrics"]["val_acc"], -best["metrics"]["val_loss"]):
            best = latest

    model.load_state_dict(best["model_state_dict"])
    test_loss, test_acc = evaluate(model, data.test_loader, criterion, device)
    return TrainedRun(best, latest, history, {"best": best["metrics"], "test_loss": test_loss, "test_acc": test_acc})


def train_epoch(
    model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, schedule: LambdaLR, clip: float | None
) -> tuple[float, float]:
    """Take a step for each batch; return the mean loss and accuracy (0 to 1) of the batches as they were learned from.

    clip: the largest norm of a step's gradient; None: any.
    """
    device = batches.labels.device
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    for images, labels in batches:
        with autocast(device):
            logits = model(images)
        loss = cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach()
        correct += (logits.argmax(1) == labels).float().mean()
    return loss_sum.item() / len(batches), correct.item() / len(batches)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> tuple[float, float]:
    """Return (mean loss, accuracy in 0 to 1) over all batches of `loader`; `criterion` averages over a batch.

    ValueError if there is none.
    """
    was_training = model.training
    model.eval()
    loss = correct = n = 0.0
    for images, labels in loader:
        labels = labels.to(device)
        logits = model(images.to(device))
        loss += criterion(logits, labels).item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        n += len(labels)
    model.train(was_training)
    if n == 0:
        raise ValueError("loader: expected at least one batch, got none: it is empty, or a generator that is used up")
    return loss / n, correct / n


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Return a checkpoint: model_state_dict, config, epoch, metrics. Nothing but tensors and plain values is unpickled.

    InputError if the file is missing, damaged, or no such checkpoint.
    """
    return load_torch(Path(path), CHECKPOINT_KEYS, map_location)


def load_model(path: str | Path) -> tuple[BilinearImageClassifier, Config]:
    """Return the classifier of a checkpoint on the picked device, and the checkpoint's config."""
    checkpoint = load_checkpoint(path)
    model = build_image_classifier(checkpoint["config"]["model"], checkpoint["config"]["seed"])
    model.load_state_dict(checkpoint["model_state_dict"])
    return model.to(pick_device()).eval().requires_grad_(False), checkpoint["config"]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
