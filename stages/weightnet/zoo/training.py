"""Train many small networks at once, each with hyper-parameters, images, labels and random numbers of its own.

Networks of one architecture are one stack: a grouped convolution runs them all, and vectors hold their learning rates, weight
decays and so on. What a run draws depends on its name alone, so the result is that of training it alone, up to rounding.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from stages.weightnet.tracing.program import Program, Weights, run_stack
from stages.weightnet.zoo.runs import SNAPSHOTS, Run, draw_all, learning_rates


@cache
def keep_memory() -> None:
    """Let the process keep what it frees, where its C library is glibc.

    Else large arrays go back to the system and are faulted in again at every step, a tenth of the time of small networks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def shift(images: Float[Tensor, "n b c h w"], moves: Int[Tensor, "n b 2"]) -> Float[Tensor, "n b c h w"]:
    """Return images moved by so many pixels down and right; what leaves them on one side comes in on the other."""
    n, b, _, h, w = images.shape
    rows, columns = (
        (torch.arange(size, device=moves.device) - by[..., None]) % size
        for size, by in zip((h, w), moves.unbind(2), strict=True)
    )
    network, image = torch.arange(n, device=moves.device)[:, None], torch.arange(b, device=moves.device)
    places = (network[..., None, None], image[:, None, None], slice(None), rows[..., None], columns[:, :, None])
    return images[places].movedim(4, 2)


class Optimizers:
    """SGD, Adam or AdamW of each network of a stack: those of torch.optim (Adam: beta 0.9 and 0.999, epsilon 1e-8)."""

    def __init__(self, runs: list[Run], weights: Float[Tensor, "n p"]) -> None:
        self.sgd = torch.tensor([[run.sgd] for run in runs], device=weights.device)
        self.adamw = torch.tensor([[run.adamw] for run in runs], device=weights.device)
        self.decay = weights.new_tensor([[run.weight_decay] for run in runs])
        self.memory = weights.new_tensor([[run.momentum if run.sgd else 0.9] for run in runs])
        self.rates = pad_sequence([learning_rates(run) for run in runs], batch_first=True).to(weights)
        self.first, self.second = torch.zeros_like(weights), torch.zeros_like(weights)

    def keep(self, count: int) -> None:
        """Forget all networks but the first so many."""
        self.first, self.second = self.first[:count].clone(), self.second[:count].clone()
        for name in ("sgd", "adamw", "decay", "memory", "rates"):
            setattr(self, name, getattr(self, name)[:count])

    def step(self, weights: Float[Tensor, "n p"], gradient: Float[Tensor, "n p"], t: int) -> Float[Tensor, "n p"]:
        """Return the weights after step number `t`, from 1 on; the gradient is overwritten."""
        decayed = self.decay * weights
        gradient += torch.where(self.adamw, 0, decayed)
        self.first.mul_(self.memory).add_(gradient)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        adam = self.first * (0.1 / (1 - 0.9**t)) / ((self.second / (1 - 0.999**t)).sqrt() + 1e-8)
        change = torch.where(self.sgd, self.first, adam) + torch.where(self.adamw, decayed, 0)
        return weights - self.rates[:, t - 1, None] * change


def of_step(step: int, draws: Sequence[Shaped[Tensor, "t ..."]]) -> Shaped[Tensor, "n ..."]:
    """Return what each of several runs has drawn for a step, from 1 on."""
    return torch.stack([draw[step - 1] for draw in draws])


def train_stack(
    program: Program,
    runs: list[Run],
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, "r 3 p"]:
    """Return the weights of all runs before training, after half of the steps and after all, in the dtype of `images`."""
    keep_memory()
    device = images.device
    order = sorted(range(len(runs)), key=lambda i: -runs[i].steps)  # runs that end early leave at the end of the stack
    runs = [runs[i] for i in order]
    draws = [draw_all(run, program, labels) for run in runs]
    seen_images = [draw.images[draw.batches] for draw in draws]
    seen_labels = [draw.labels[draw.batches] for draw in draws]
    dropped = list(zip(*(draw.kept for draw in draws), strict=True)) if any(run.dropout for run in runs) else []
    moves = [draw.moves for draw in draws] if any(run.shift for run in runs) else []

    weights = torch.stack([draw.weights for draw in draws]).to(images)
    keep_rate = 1 - weights.new_tensor([[[run.dropout]] for run in runs])
    tanh = torch.tensor([run.tanh for run in runs], device=device)
    optimizers, alive = Optimizers(runs, weights), len(runs)
    result = weights.new_empty(len(runs), len(SNAPSHOTS), program.layout.size)
    result[order, 0] = weights
    for step in range(1, runs[0].steps + 1):
        while runs[alive - 1].steps < step:
            alive -= 1
        if alive < len(weights):
            weights, keep_rate, tanh = weights[:alive].clone(), keep_rate[:alive], tanh[:alive]
            optimizers.keep(alive)
        seen = of_step(step, seen_labels[:alive]).to(device)
        shown = images[of_step(step, seen_images[:alive]).to(device)]
        if moves:
            shown = shift(shown, of_step(step, moves[:alive]).to(device))
        masks = [of_step(step, kept[:alive]).to(device) / keep_rate for kept in dropped]
        weights.requires_grad_()
        running: Weights = {}
        logits = run_stack(program, program.layout.unflatten(weights), shown, tanh, masks, running)
        loss = cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / runs[0].batch_size
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights = optimizers.step(weights.detach(), gradient, step)
            own = program.layout.unflatten(weights)
            for name, statistic in running.items():  # these are not learned
                own[name].copy_(statistic)
        for i, run in enumerate(runs[:alive]):
            for j, at in enumerate((run.steps // 2, run.steps), 1):
                if step == at:
                    result[order[i], j] = weights[i]
    return result
