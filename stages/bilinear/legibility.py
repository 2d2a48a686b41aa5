"""What makes eigenvectors few and readable, as numbers with baselines.

Axes: c classes, k eigenvectors, h height, w width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(eigenvalues: Float[Tensor, "c k"]) -> Float[Tensor, " c"]:
    """Return how many eigenvectors share a class's form: the exponential of the entropy of |eigenvalue| / sum, 1 to k.

    Roy and Vetterli 2007, "The effective rank". Equal eigenvalues have k, a single one 1.
    """
    shares = eigenvalues.abs() / eigenvalues.abs().sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp()


def smoothness(images: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Return 1 - R / R0: R is the mean square difference of pixels that touch over the mean square pixel, and R0 = 2 that of white noise.

    1 for an image of one value, 0 on average for independent pixels of mean 0, below 0 for a chequerboard. The sign and the scale of an
    image do not matter. People read strokes in smooth eigenvectors and nothing in noise; it says nothing about what is read.
    """
    down, right = images.diff(dim=-2).square(), images.diff(dim=-1).square()
    touching = down.sum((-2, -1)) + right.sum((-2, -1))
    h, w = images.shape[-2:]
    touching = touching / ((h - 1) * w + h * (w - 1))
    return 1 - touching / (2 * images.square().mean((-2, -1)))
