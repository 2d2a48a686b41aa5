"""Processor seconds for training networks in a stack, against torch.optim on one after the other: the same networks.

python tests/benchmark_zoo.py [side ...]     # of images, by default 8 16 28
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.weightnet.networks import build_network, zoo_program
from stages.weightnet.program import Program
from stages.weightnet.training import Recipe, Run, draw_all, draw_run, train_stack, unflatten

STACKS = {8: 32, 16: 8, 28: 4}
STEPS = 30
ROUNDS = 5  # of which the fastest counts
RECIPE = Recipe(
    learning_rate=(1e-3, 1e-2),
    sgd_factor=3.0,
    weight_decay=(1e-8, 1e-2),
    init_scale=(0.5, 2.0),
    train_fraction=(0.5, 1.0),
    label_noise=(0.0, 0.6),
    dropout=(0.0, 0.5),
    steps=(STEPS, STEPS),
    batch_size=64,
)


def train_alone(
    kind: str,
    shape: tuple[int, int, int],
    run: Run,
    program: Program,
    images: Tensor,
    labels: Tensor,
    tuned: bool = False,
) -> nn.Module:
    """Train one network as PyTorch's users do, in the images' precision; shape: channels, classes, pixels of a side.

    tuned: as those do who know what is fast on processors: channels last, fused optimisers.
    """
    draws = draw_all(run, program, labels)
    model = build_network(kind, *shape).to(images.dtype)
    model.load_state_dict({k: v[0] for k, v in unflatten(draws.weights[None].to(images.dtype), program).items()})
    if tuned:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    options = {"lr": run.learning_rate, "weight_decay": run.weight_decay, "fused": tuned}
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    optimizer = sgd(model.parameters(), momentum=0.9, **options) if run.sgd else adam(model.parameters(), **options)
    model.eval()
    for batch in draws.batches:
        optimizer.zero_grad()
        cross_entropy(model(images[draws.images[batch]]), draws.labels[batch]).backward()
        optimizer.step()
    return model


def seconds_a_step(side: int) -> dict[str, float]:
    """Return processor seconds for a step of one network, on images of `side` pixels a side, of every way to train."""
    images, labels = torch.randn(1000, 1, side, side), torch.randint(10, (1000,))
    program, _ = zoo_program("cnn3", 1, 10, side)
    runs = [replace(draw_run(f"cnn3-{i}", 0, RECIPE), dropout=0.0, tanh=False) for i in range(STACKS[side])]
    few = runs[:4]

    def alone(tuned: bool) -> None:
        for run in few:
            train_alone("cnn3", (1, 10, side), run, program, images, labels, tuned)

    ways = {
        "stacked": (lambda: train_stack(program, runs, images, labels), len(runs)),
        "alone": (lambda: alone(False), len(few)),
        "tuned": (lambda: alone(True), len(few)),
    }
    train_stack(program, [replace(run, steps=2) for run in runs], images, labels)
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):  # in turn: what else runs on the machine slows all
        for name, (train, networks) in ways.items():
            start = time.process_time()
            train()
            seconds[name] = min(seconds[name], (time.process_time() - start) / (STEPS * networks))
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    for side in [int(word) for word in sys.argv[1:]] or list(STACKS):
        stacked, alone, tuned = seconds_a_step(side).values()
        print(
            f"{side} pixels: {1 / stacked:.0f} steps a second stacked, {1 / alone:.0f} alone: {alone / stacked:.1f}x;"
            f" {1 / tuned:.0f} alone with channels last and fused optimisers: {tuned / stacked:.1f}x"
        )
