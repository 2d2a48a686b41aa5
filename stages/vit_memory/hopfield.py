"""Associative memory: modern Hopfield retrieval, and stores of patterns that it retrieves from.

Retrieval is one attention step over stored patterns (Ramsauer et al. 2020, arXiv:2008.02217, eq. 3); its energy never rises
(their theorem 1). Stores are written by explicit calls alone, and forget a class exactly.

Axes: m stored patterns or slots, n queries, d features, c classes; `*` any axes before.
"""

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from stages.vit_memory.checks import (
    check_choice,
    check_counts,
    check_fraction,
    check_label,
    check_labels,
    check_positive,
)

ClassMode = Literal["class_prototype", "metric"]
Mode = Literal["associative", "class_prototype", "metric"]


def associate(
    patterns: Float[Tensor, "m d"],
    queries: Float[Tensor, "*n d"],
    beta: float,
    filled: Bool[Tensor, " m"] | None = None,
) -> Float[Tensor, "*n m"]:
    """Return softmax(beta X q): how much of each pattern is retrieved. Rows sum to 1 over `filled` patterns; 0 if there are none."""
    scores = beta * queries @ patterns.mT
    if filled is None:
        return scores.softmax(-1)
    return scores.masked_fill(~filled, torch.finfo(scores.dtype).min).softmax(-1) * filled


def retrieve(
    patterns: Float[Tensor, "m d"], queries: Float[Tensor, "*n d"], beta: float, steps: int = 1
) -> Float[Tensor, "*n d"]:
    """Return the state after `steps` updates q <- X^T softmax(beta X q)."""
    for _ in range(steps):
        queries = associate(patterns, queries, beta) @ patterns
    return queries


def energy(patterns: Float[Tensor, "m d"], state: Float[Tensor, "*n d"], beta: float) -> Float[Tensor, "*n"]:
    """Return the energy of Ramsauer et al., eq. 2: at least 0, and never raised by an update."""
    largest = patterns.norm(dim=1).max()
    lse = torch.logsumexp(beta * state @ patterns.mT, -1) / beta
    return -lse + 0.5 * state.square().sum(-1) + math.log(len(patterns)) / beta + 0.5 * largest**2


def hebbian_retrieve(
    patterns: Float[Tensor, "m d"], queries: Float[Tensor, "*n d"], steps: int
) -> Float[Tensor, "*n d"]:
    """Return the state of a classical Hopfield network of bipolar patterns: sums of outer products, synchronous sign updates."""
    weights = (patterns.mT @ patterns / patterns.shape[1]).fill_diagonal_(0)
    for _ in range(steps):
        queries = torch.where(queries @ weights >= 0, 1.0, -1.0)
    return queries


def unit(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return keys of vectors: normalised over features, then of length 1, so that beta means the same at any width."""
    return normalize(layer_norm(x, x.shape[-1:]), dim=-1)


class SlotMemory(nn.Module):
    """Patterns in a fixed number of slots, each with a label (-1: none).

    A pattern takes a free slot if its cosine to every key of its label is below `novelty`; else it moves the nearest of them by
    `rate`, a Hebbian step. In a full memory a novel pattern takes the slot that was written least often.
    """

    def __init__(self, dim: int, size: int, beta: float = 16.0, novelty: float = 0.95, rate: float = 0.1) -> None:
        super().__init__()
        check_counts(size=size)
        check_positive(beta=beta)
        check_fraction(rate=rate)
        self.beta, self.novelty, self.rate = beta, novelty, rate
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("values", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("writes", torch.zeros(size, dtype=torch.long))  # 0: the slot is empty

    @torch.no_grad()
    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"] | None = None) -> None:
        """Store vectors one after the other."""
        labels = torch.full((len(x),), -1) if labels is None else labels
        if labels.is_floating_point() or len(labels) != len(x):
            raise ValueError(f"labels: expected {len(x)} integers, got {len(labels)} of {labels.dtype}")
        for value, key, label in zip(x, unit(x), labels.tolist(), strict=True):
            same_label = (self.writes > 0) & (self.labels == label)
            cosine = torch.where(same_label, self.keys @ key, -2.0)
            slot = int(cosine.argmax())
            if cosine[slot] < self.novelty:
                slot = int(self.writes.argmin())  # a free one, if there is one
                self.keys[slot], self.values[slot], self.labels[slot], self.writes[slot] = key, value, label, 1
            else:
                self.keys[slot] = normalize((1 - self.rate) * self.keys[slot] + self.rate * key, dim=0)
                self.values[slot] += self.rate * (value - self.values[slot])
                self.writes[slot] += 1

    @torch.no_grad()
    def forget(self, label: int) -> None:
        """Empty the slots of a label. As long as the memory never was full, this is as if it had never been written."""
        gone = self.labels == label
        for buffer, empty in ((self.keys, 0.0), (self.values, 0.0), (self.writes, 0), (self.labels, -1)):
            buffer[gone] = empty

    def attend(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """Return how much of each slot is retrieved for each vector; empty slots get nothing."""
        return associate(self.keys, unit(x), self.beta, self.writes > 0)

    def read(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return the values retrieved for each vector; 0 from an empty memory."""
        return self.attend(x) @ self.values


class ClassMemory(nn.Module):
    """One pattern a class: its mean, from sums that any order of writes makes alike, up to rounding.

    `class_prototype` compares by cosine of `unit` keys. `metric` keeps second moments as well and compares in the coordinates in
    which classes have unit covariance: its retrieval is exactly the posterior of linear discriminant analysis, classes being
    equally likely. `shrinkage` mixes the covariance with a multiple of the identity that has its trace (0 to 1).
    """

    def __init__(self, dim: int, num_classes: int, mode: ClassMode, beta: float = 16.0, shrinkage: float = 0.1) -> None:
        super().__init__()
        check_choice("mode", mode, ClassMode)
        check_counts(num_classes=num_classes)
        check_positive(beta=beta)
        check_fraction(shrinkage=shrinkage)
        self.metric, self.beta, self.shrinkage = mode == "metric", beta, shrinkage
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(num_classes, dim, dtype=torch.float64))
        moments = num_classes if self.metric else 0
        self.register_buffer("moments", torch.zeros(moments, dim, dim, dtype=torch.float64))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the sums as `function` does, but leave them in float64: counts in bfloat16 would end at 256."""

        def move(sums: Tensor) -> Tensor:
            moved = function(sums)
            return moved if moved.dtype == sums.dtype else sums.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add vectors to their classes."""
        check_labels(labels, len(x), len(self.counts))
        x = x.double() if self.metric else unit(x.double())
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.sums.index_add_(0, labels, x)
        for label in labels.unique().tolist() if self.metric else []:
            of_class = x[labels == label]
            self.moments[label] += of_class.T @ of_class

    @torch.no_grad()
    def forget(self, label: int) -> None:
        """Remove a class: nothing of it is left, bit for bit, since classes share no sums."""
        check_label(label, len(self.counts))
        for buffer in (self.counts, self.sums, self.moments[: len(self.counts) if self.metric else 0]):
            if len(buffer):
                buffer[label] = 0

    def means(self) -> Float[Tensor, "c d"]:
        """Return the mean of each class, 0 of an empty one, in float64."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def covariance(self) -> Float[Tensor, "d d"]:
        """Return the shrunk covariance within classes, in float64."""
        means, total = self.means(), self.counts.sum().clamp(min=1)
        within = (self.moments.sum(0) - (means * self.counts[:, None]).mT @ means) / total
        d = len(within)
        identity = torch.eye(d, dtype=within.dtype, device=within.device)
        floor = torch.finfo(within.dtype).tiny  # an empty memory's can be inverted as well
        return (1 - self.shrinkage) * within + (self.shrinkage * within.trace() / d + floor) * identity

    def logits(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Return what `attend` takes the softmax of; -inf for empty classes."""
        means = self.means()
        if self.metric:  # -|q - k|^2 / 2 of whitened queries and keys, without the query's own length
            keys = torch.linalg.solve(self.covariance(), means.mT).mT
            scores = x.double() @ keys.mT - 0.5 * (keys * means).sum(1)
        else:
            scores = self.beta * unit(x.double()) @ normalize(means, dim=1).mT
        return scores.masked_fill(self.counts == 0, -math.inf).to(x.dtype)

    def attend(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Return how much of each class is retrieved for each vector; 0 from an empty memory."""
        filled = self.counts > 0
        scores = self.logits(x)
        return scores.masked_fill(~filled, torch.finfo(scores.dtype).min).softmax(-1) * filled

    def read(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return the class means retrieved for each vector; 0 from an empty memory."""
        return self.attend(x) @ self.means().to(x.dtype)
