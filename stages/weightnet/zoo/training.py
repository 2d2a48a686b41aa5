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

from stages.weightnet.tracing.program import Program, Weights, run_stack
from stages.weightnet.zoo.runs import SNAPSHOTS, Run, draw_all


@cache
def keep_memory() -> None:
    """Let the process keep what it frees, where its C library is glibc.

    Else large arrays go back to the system and are faulted in again at every step, a tenth of the time of small networks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def train_stack(
    program: Program,
    runs: list[Run],
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, "r 3 p"]:
    """Return the weights of all runs before training, after half of the steps and after all, in the dtype of `images`.

    Adam and SGD are those of torch.optim (Adam: beta 0.9 and 0.999, epsilon 1e-8; SGD: momentum 0.9).
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
    rate, decay = column([run.learning_rate for run in runs]), column([run.weight_decay for run in runs])
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
            tanh, sgd, rate, decay = tanh[:alive], sgd[:alive], rate[:alive], decay[:alive]
        index = torch.stack([batches[step - 1] for batches in seen_images[:alive]]).to(device)
        seen = torch.stack([batches[step - 1] for batches in seen_labels[:alive]]).to(device)
        masks = []
        for place, f in enumerate(dropped):
            ones = torch.ones(batch, f, dtype=torch.bool)
            mask = torch.stack([draw.kept[place][step - 1] if draw.kept else ones for draw in draws[:alive]])
            masks.append(mask.to(device) / keep_rate[:alive])
        weights.requires_grad_()
        running: Weights = {}
        logits = run_stack(program, program.layout.unflatten(weights), images[index], tanh, masks, running)
        loss = cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / batch
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            gradient += decay * weights
            first.mul_(0.9).add_(gradient)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            adam = first * (0.1 / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights = weights.detach() - rate * torch.where(sgd, first, adam)
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
