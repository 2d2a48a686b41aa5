"""Train many small networks at once, each with hyper-parameters, images, labels and random numbers of its own.

Networks of one architecture are one stack: a grouped convolution runs them all, and vectors hold their learning rates, weight
decays and so on. What a run draws depends on its name alone, so the result is that of training it alone, up to rounding.
"""

import ctypes
import sys
from functools import cache

import torch
from jaxtyping import Float, Int
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


def train_stack(
    program: Program,
    runs: list[Run],
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, "r 3 p"]:
    """Return the weights of all runs before training, after half of the steps and after all, in the dtype of `images`.

    Adam, AdamW and SGD are those of torch.optim (Adam: beta 0.9 and 0.999, epsilon 1e-8).
    """
    keep_memory()
    device, dtype = images.device, images.dtype
    order = sorted(range(len(runs)), key=lambda i: -runs[i].steps)  # runs that end early leave at the end of the stack
    runs = [runs[i] for i in order]
    draws = [draw_all(run, program, labels) for run in runs]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    tanh = torch.tensor([run.tanh for run in runs], device=device)
    sgd = torch.tensor([run.sgd for run in runs], device=device)[:, None]
    adamw = torch.tensor([run.adamw for run in runs], device=device)[:, None]
    decay, memory = (
        column([run.weight_decay for run in runs]),
        column([run.momentum if run.sgd else 0.9 for run in runs]),
    )
    rates = pad_sequence([learning_rates(run) for run in runs], batch_first=True).to(device, dtype)
    moved = any(run.shift for run in runs)
    weights = torch.stack([draw.weights for draw in draws]).to(device, dtype)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    keep_rate = 1 - column([run.dropout for run in runs])[..., None]
    dropped = program.numbers_of("dropout") if any(run.dropout for run in runs) else []
    result = weights.new_empty(len(runs), len(SNAPSHOTS), program.layout.size)
    result[:, 0] = weights
    seen_images = [draw.images[draw.batches] for draw in draws]
    seen_labels = [draw.labels[draw.batches] for draw in draws]
    batch = runs[0].batch_size
    alive = len(runs)
    for step in range(1, runs[0].steps + 1):
        while runs[alive - 1].steps < step:
            alive -= 1
        if alive < len(weights):
            weights, first, second = (t[:alive].clone() for t in (weights, first, second))
            tanh, sgd, adamw, decay, memory = (t[:alive] for t in (tanh, sgd, adamw, decay, memory))
        index = torch.stack([batches[step - 1] for batches in seen_images[:alive]]).to(device)
        seen = torch.stack([batches[step - 1] for batches in seen_labels[:alive]]).to(device)
        masks = []
        for place, f in enumerate(dropped):
            ones = torch.ones(batch, f, dtype=torch.bool)
            mask = torch.stack([draw.kept[place][step - 1] if draw.kept else ones for draw in draws[:alive]])
            masks.append(mask.to(device) / keep_rate[:alive])
        shown = images[index]
        if moved:
            still = torch.zeros(batch, 2, dtype=torch.long)
            moves = torch.stack([draw.moves[step - 1] if len(draw.moves) else still for draw in draws[:alive]])
            shown = shift(shown, moves.to(device))
        weights.requires_grad_()
        running: Weights = {}
        logits = run_stack(program, program.layout.unflatten(weights), shown, tanh, masks, running)
        loss = cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / batch
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            rate, decayed = rates[:alive, step - 1, None], decay * weights
            gradient += torch.where(adamw, 0, decayed)
            first.mul_(memory).add_(gradient)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            adam = first * (0.1 / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights = weights.detach() - rate * (torch.where(sgd, first, adam) + torch.where(adamw, decayed, 0))
            own = program.layout.unflatten(weights)
            for name, statistic in running.items():  # these are not learned
                own[name].copy_(statistic)
        for i in range(alive):
            for j, at in enumerate((runs[i].steps // 2, runs[i].steps), 1):
                if step == at:
                    result[i, j] = weights[i]
    back = torch.empty(len(runs), dtype=torch.long)
    back[order] = torch.arange(len(runs))
    return result[back]
