"""Seconds for training networks in a stack, against torch.optim on one after the other, and against torch.func.vmap.

python tests/tools/benchmark_zoo.py [side ...]     # of images, by default 8 16 28
Processor seconds, or on a GPU (WEIGHTLENS_DEVICE=cuda) those that pass.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from timing import clock
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from stages.common.runtime import pick_device
from stages.weightnet.tracing.program import Program
from stages.weightnet.zoo.architectures import build_network, zoo_program
from stages.weightnet.zoo.runs import Recipe, Run, draw_all, draw_run
from stages.weightnet.zoo.training import train_stack

STACKS = {8: 32, 16: 8, 28: 4}
STEPS = 30
ROUNDS = 5  # of which the fastest counts
RECIPE = Recipe(
    activations=["tanh", "relu"],
    optimizers=["sgd", "adam"],
    momenta=[0.9],
    schedules=["constant"],
    inits=["he"],
    shifts=[0],
    least_epochs=[0],
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
    model: nn.Module, run: Run, program: Program, images: Tensor, labels: Tensor, tuned: bool = False
) -> nn.Module:
    """Train one network as PyTorch's users do, in the images' precision; dropout is left out.

    tuned: as those do who know what is fast on processors: channels last, fused optimisers.
    """
    draws = draw_all(run, program, labels)
    shown = draws.labels.to(images.device)
    model = model.to(images)
    weights = {k: v[0] for k, v in program.layout.unflatten(draws.weights[None].to(images.dtype)).items()}
    model.load_state_dict(model.state_dict() | weights)  # batch norms also count their batches
    if tuned:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    options = {"lr": run.learning_rate, "weight_decay": run.weight_decay, "fused": tuned}
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    optimizer = sgd(model.parameters(), momentum=0.9, **options) if run.sgd else adam(model.parameters(), **options)
    for layer in model.modules():
        layer.training = not isinstance(layer, nn.Dropout)
    for batch in draws.batches:
        optimizer.zero_grad()
        cross_entropy(model(images[draws.images[batch]]), shown[batch]).backward()
        optimizer.step()
    return model


def train_vmapped(kind: str, runs: list[Run], program: Program, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Train a stack by vmap over plain gradient steps: less to do than train_stack's optimisers, so no worse for vmap."""
    device = images.device
    draws = [draw_all(run, program, labels.cpu()) for run in runs]
    stacked = program.layout.unflatten(torch.stack([draw.weights for draw in draws]).to(device))
    model = build_network(kind, images.shape[1], 10, images.shape[2]).to(device).eval()

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x,)), y)

    gradients = vmap(grad(loss))
    rate = torch.tensor([run.learning_rate for run in runs], device=device)
    for step in range(STEPS):
        index = torch.stack([draw.images[draw.batches[step]] for draw in draws]).to(device)
        seen = torch.stack([draw.labels[draw.batches[step]] for draw in draws]).to(device)
        slopes = gradients(stacked, images[index], seen)
        stacked = {k: w - rate.view(-1, *[1] * (w.dim() - 1)) * slopes[k] for k, w in stacked.items()}
    return stacked


def seconds_a_step(side: int) -> dict[str, float]:
    """Return seconds, by `clock`, for a step of one network, on images of `side` pixels a side, of every way to train."""
    device = pick_device()
    images, labels = torch.randn(1000, 1, side, side, device=device), torch.randint(10, (1000,), device=device)
    program, _ = zoo_program("cnn3", 1, 10, side)
    runs = [replace(draw_run(f"cnn3-{i}", 0, RECIPE), dropout=0.0, tanh=False) for i in range(STACKS[side])]
    few = runs[:4]

    def alone(tuned: bool) -> None:
        for run in few:
            train_alone(build_network("cnn3", 1, 10, side), run, program, images, labels, tuned)

    ways = {
        "stacked": (lambda: train_stack(program, runs, images, labels), len(runs)),
        "alone": (lambda: alone(False), len(few)),
        "tuned": (lambda: alone(True), len(few)),
        "vmapped": (lambda: train_vmapped("cnn3", runs, program, images, labels), len(runs)),
    }
    train_stack(program, [replace(run, steps=2) for run in runs], images, labels)
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):  # in turn: what else runs on the machine slows all
        for name, (train, networks) in ways.items():
            start = clock(device)
            train()
            seconds[name] = min(seconds[name], (clock(device) - start) / (STEPS * networks))
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    for side in [int(word) for word in sys.argv[1:]] or list(STACKS):
        stacked, alone, tuned, vmapped = seconds_a_step(side).values()
        print(
            f"{side} pixels: {1 / stacked:.0f} steps a second stacked, {1 / alone:.0f} alone: {alone / stacked:.1f}x;"
            f" {1 / tuned:.0f} alone with channels last and fused optimisers: {tuned / stacked:.1f}x;"
            f" {1 / vmapped:.0f} by vmap: {vmapped / stacked:.1f}x"
        )
