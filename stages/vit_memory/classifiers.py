"""Classifiers on frozen features.

Axes: n examples, m patterns of a memory, q queries, c classes, d features, f random features.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from stages.vit_memory.hopfield import associate

SMALLEST_STD = 1e-3  # of a feature: one that never changes is left at 0
LBFGS_STEPS = 40  # at most: enough to the end, since the loss is convex and the weights decay
SMALLEST_PROBABILITY = 1e-12  # of a class of which nothing is retrieved


def linear_probe(
    x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], queries: Float[Tensor, "q d"], classes: int, decay: float
) -> Float[Tensor, "q c"]:
    """Return the logits of softmax regression on standardised features, fitted to the end by L-BFGS: a strong baseline."""
    mean, std = x.mean(0), x.std(0) + SMALLEST_STD
    x, queries = (x - mean) / std, (queries - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (queries @ weight.T + bias).detach()


def class_means(x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "c d"]:
    """Return the mean of each class; 0 of an empty one."""
    members = one_hot(labels, classes).T.to(x)
    return members @ x / members.sum(1, keepdim=True).clamp(min=1)


def centred_cosines(means: Float[Tensor, "c d"], queries: Float[Tensor, "q d"]) -> Float[Tensor, "q c"]:
    """Return the cosine of each query to each class mean, the mean of the means being the origin."""
    centre = means.mean(0)
    return normalize(queries - centre, dim=1) @ normalize(means - centre, dim=1).T


class Whitening:
    """Coordinates in which base classes, learned from before, have unit covariance within: what varies in a class counts less.

    `shrinkage` (0 to 1) mixes that covariance with a multiple of the identity that has its trace.
    """

    def __init__(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], shrinkage: float = 0.2) -> None:
        means = class_means(x, labels, int(labels.max()) + 1)
        within = (x - means[labels]).double()
        covariance = within.T @ within / len(x)
        d = len(covariance)
        covariance = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * torch.eye(d).to(covariance)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean, self.map = x.mean(0), (vectors * values.rsqrt() @ vectors.T).to(x.dtype)

    def __call__(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return (x - self.mean) @ self.map


def memory_log_probabilities(
    keys: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    queries: Float[Tensor, "q d"],
    classes: int,
    beta: float,
) -> Float[Tensor, "q c"]:
    """Return the log of the attention that each class's patterns get; keys and queries are centred and normalised."""
    centre = keys.mean(0)
    attention = associate(normalize(keys - centre, dim=1), normalize(queries - centre, dim=1), beta)
    return (attention @ one_hot(labels, classes).to(attention)).clamp(min=SMALLEST_PROBABILITY).log()


class RanPAC:
    """Ridge regression on random features (McDonnell et al. 2023, arXiv:2307.02251): sums that any order of tasks makes alike."""

    def __init__(
        self, dim: int, features: int, classes: int, random: torch.Generator, device: torch.device | str = "cpu"
    ) -> None:
        self.projection = (torch.randn(dim, features, generator=random) / dim**0.5).to(device)
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.targets = torch.zeros(features, classes, dtype=torch.float64, device=device)

    def expand(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Return the random features."""
        return (x @ self.projection).relu()

    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add examples."""
        h = self.expand(x)
        self.gram += (h.T @ h).double()
        self.targets += (h.T @ one_hot(labels, self.targets.shape[1]).to(h)).double()

    def scores(self, queries: Float[Tensor, "q d"], ridge: float) -> Float[Tensor, "q c"]:
        """Return the regression's outputs."""
        weights = torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram)).to(self.gram), self.targets)
        return self.expand(queries) @ weights.to(queries)
