"""Epochs a second of training a bilinear classifier, against a plain loop as the paper's authors publish it.

python tests/tools/benchmark_bilinear.py [batch ...]     # by default 512 2048

The plain loop: a DataLoader over single images that are stacked, AdamW as it comes, a cosine schedule by epochs, noise by
torch.randn_like, loss and accuracy read in each step (github.com/tdooms/bilinear-decomposition). Images are random numbers of MNIST's
shape, fewer than MNIST's; results are for its 60,000. One thread, processor seconds; on a GPU (WEIGHTLENS_DEVICE=cuda) those that pass.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from timing import clock
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from stages.bilinear.model import BilinearImageClassifier
from stages.bilinear.training import train_epoch
from stages.common.images import Batches, ImageSet
from stages.common.optim import warmup_cosine
from stages.common.runtime import pick_device

IMAGES, OF_MNIST = 8192, 60000
ROUNDS = 3  # of which the fastest counts
D_HIDDEN = 256
NOISE = 0.4
BANK = 16  # batches


def network(device: torch.device) -> BilinearImageClassifier:
    return BilinearImageClassifier(784, D_HIDDEN, 10, 1, False, False, 0).to(device)


def plain(data: ImageSet, batch: int, noise: float) -> Callable[[], None]:
    """Return an epoch of the plain loop."""
    model, criterion = network(data.labels.device), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    schedule = CosineAnnealingLR(optimizer, T_max=100)

    def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return (x + noise * torch.randn_like(x) if noise else x), y

    pixels = TensorDataset(data.pixels(), data.labels)
    loader = DataLoader(pixels, batch, shuffle=True, drop_last=True, collate_fn=stacked)

    def epoch() -> None:
        for x, y in loader:
            logits = model(x)
            loss = criterion(logits, y)
            loss.item(), (logits.argmax(-1) == y).float().mean().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    return epoch


def ours(data: ImageSet, batch: int, noise: float, bank: int | None, precision: str) -> Callable[[], None]:
    """Return an epoch of this project's training."""
    model, batches = network(data.labels.device), Batches(data, batch, 0, noise=noise, noise_bank=bank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5, fused=True)
    schedule = LambdaLR(optimizer, warmup_cosine(100 * len(batches), 0.05))

    def epoch() -> None:
        os.environ["WEIGHTLENS_PRECISION"] = precision
        train_epoch(model, batches, optimizer, schedule, None)

    return epoch


def epochs_a_second(batch: int) -> dict[str, dict[str, float]]:
    """Return, without and with noise, the epochs a second of the plain loop and of ours in either precision."""
    device = pick_device()
    images = torch.randint(256, (IMAGES, 1, 28, 28), dtype=torch.uint8, device=device)
    data = ImageSet(images, torch.randint(10, (IMAGES,), device=device), list("0123456789"))
    ways = {"no noise": {"plain": plain(data, batch, 0.0)}, "noise": {"plain": plain(data, batch, NOISE)}}
    for precision in ("float32", "bfloat16"):
        ways["no noise"][precision] = ours(data, batch, 0.0, None, precision)
        ways["noise"][f"{precision}, drawn anew"] = ours(data, batch, NOISE, None, precision)
        ways["noise"][f"{precision}, from a bank"] = ours(data, batch, NOISE, BANK, precision)
    seconds = {noise: dict.fromkeys(of, float("inf")) for noise, of in ways.items()}
    for _ in range(ROUNDS):  # in turn: what else runs on the machine slows all
        for noise, of in ways.items():
            for name, epoch in of.items():
                start = clock(device)
                epoch()
                seconds[noise][name] = min(seconds[noise][name], clock(device) - start)
    return {noise: {name: IMAGES / OF_MNIST / s for name, s in of.items()} for noise, of in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for batch in [int(word) for word in sys.argv[1:]] or [512, 2048]:
        for noise, rates in epochs_a_second(batch).items():
            shown = ", ".join(f"{name} {rate:.2f} ({rate / rates['plain']:.1f}x)" for name, rate in rates.items())
            print(f"batch {batch}, {noise}, epochs of MNIST a second: {shown}")
