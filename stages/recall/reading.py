"""A short reading of a fine-tune, whatever its recipe: the direction of its change, its sizes and shapes, and its answers.

Directions and sizes are read apart, tensor by tensor: a rate ten times as high makes a change larger, its direction stays. All that a
reader has fitted are a few directions of each matrix, means and scales: it fits into some hundred kilobytes.

Axes: n fine-tunes, w weights of a network, r responses, c classes, i reference inputs, d of a token, f columns.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from stages.common.metrics import QUANTILES
from stages.common.vectors import Layout
from stages.recall.condense import EPSILON, sureness, tensors_of

Arrays = dict[str, np.ndarray]

FLOOR = 1e-4  # of a matrix's norm: smaller singular values are not told apart
CENTRED = ("direction",)  # descriptions whose columns share a unit

READS = {  # what a decoder reads
    "direction": ("direction",),
    "answers": ("answers", "answer_change", "token_change"),
    "direction_and_answers": ("direction", "answers", "answer_change"),
    "magnitudes": ("sizes", "spectra", "quantiles"),
    "all": ("direction", "answers", "answer_change", "token_change", "sizes", "spectra", "quantiles"),
}


def read_columns(descriptions: Arrays, source: str) -> Float[np.ndarray, "n f"]:
    """Return what a decoder of this source reads."""
    return np.concatenate([descriptions[name] for name in READS[source]], 1).astype(np.float64)


def within(sizes: Arrays, source: str, whole: str) -> Float[np.ndarray, " f"]:
    """Return 1 of each column of one source that another one reads, too, and 0 of all others; `sizes`: an array of each description."""
    return np.concatenate([np.full(len(sizes[name]), float(name in READS[source])) for name in READS[whole]])


def unit_rows(x: Float[np.ndarray, "n ..."]) -> tuple[Float[np.ndarray, "n ..."], Float[np.ndarray, " n"]]:
    """Return each row over its norm, zeros where it is zero, and the norms."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    return (flat / np.where(norms > 0, norms, 1.0)[:, None]).reshape(x.shape), norms


@dataclass(frozen=True)
class References:
    """Inputs that every network answers, and how their base does."""

    labels: Int[np.ndarray, " i"]
    responses: Float[np.ndarray, " r"]  # of the base: logits of all inputs, then mean tokens
    classes: int

    def by_class(
        self, responses: Float[np.ndarray, "n r"]
    ) -> tuple[Float[np.ndarray, "n c c"], Float[np.ndarray, "n c d"]]:
        """Return logits and tokens averaged over the inputs of each class."""
        members = (np.arange(self.classes)[:, None] == self.labels).astype(np.float64)
        members /= members.sum(1, keepdims=True)
        n, inputs, ends = len(responses), len(self.labels), len(self.labels) * self.classes
        logits, tokens = responses[:, :ends], responses[:, ends:]
        return (
            np.einsum("ai,nic->nac", members, logits.reshape(n, inputs, -1)),
            np.einsum("ai,nid->nad", members, tokens.reshape(n, inputs, -1)),
        )

    def describe(self, responses: Float[np.ndarray, "n r"]) -> Arrays:
        """Return how networks answer, and in which directions their answers and tokens moved from the base's."""
        n, inputs = len(responses), len(self.labels)
        logits, _ = self.by_class(responses)
        moved = self.by_class(responses - self.responses)
        each = responses[:, : inputs * self.classes].reshape(n, inputs, self.classes).astype(np.float64)
        each = each - each.max(2, keepdims=True)
        chances = (each - np.log(np.exp(each).sum(2, keepdims=True))).mean(1)
        parts = [logits.reshape(n, -1), sureness(responses, self.classes, inputs), chances]
        names = ("answer_change", "token_change")
        return {"answers": np.concatenate(parts, 1)} | {
            name: unit_rows(part.reshape(n, -1))[0] for name, part in zip(names, moved, strict=True)
        }


@dataclass(frozen=True)
class Reader:
    """What describes fine-tunes of one kind, whole networks or adapters, as those that were learned from are described."""

    layout: Layout
    references: References
    tensors: tuple[str, ...]  # that any of those moved
    left: Arrays  # of each matrix: directions [rows, rank] in which unit changes vary most
    right: Arrays  # [columns, rank]
    means: Arrays  # of each description
    scales: Arrays

    @classmethod
    def fit(
        cls,
        change: Float[np.ndarray, "n w"],
        responses: Float[np.ndarray, "n r"],
        layout: Layout,
        references: References,
        rank: int,
    ) -> Self:
        """Return the reader of training fine-tunes; `rank` directions on each side of a matrix are kept, between which it is read."""
        left, right, moving = {}, {}, []
        for name, tensor in tensors_of(change, layout).items():
            unit, norms = unit_rows(tensor)
            if not norms.any():
                continue
            moving.append(name)
            if tensor.ndim == 3:
                moved = unit[norms > 0]
                moved = moved - moved.mean(0)
                rows, columns = np.einsum("nij,nkj->ik", moved, moved), np.einsum("nij,nik->jk", moved, moved)
                left[name] = np.linalg.eigh(rows)[1][:, : -rank - 1 : -1]
                right[name] = np.linalg.eigh(columns)[1][:, : -rank - 1 : -1]
        unfinished = cls(layout, references, tuple(moving), left, right, {}, {})
        means, scales = {}, {}
        for name, values in unfinished.describe(change, responses).items():
            means[name] = values.mean(0)
            deviation = values.std(0) + EPSILON if name not in CENTRED else np.ones(values.shape[1])
            varying = values.std(0) > EPSILON
            standard = (values - means[name]) / deviation * varying
            scales[name] = varying / (deviation * max(np.sqrt((standard**2).sum(1).mean()), EPSILON))
        return cls(layout, references, tuple(moving), left, right, means, scales)

    def describe(self, change: Float[np.ndarray, "n w"], responses: Float[np.ndarray, "n r"]) -> Arrays:
        """Return descriptions that have yet to be centred and scaled."""
        cores, sizes, spectra, quantiles = [], [], [], []
        total = np.maximum(np.linalg.norm(change.astype(np.float64), axis=1), EPSILON)
        tensors = tensors_of(change, self.layout)
        for name in self.tensors:
            unit, norms = unit_rows(tensors[name])
            moved, n = norms > 0, len(unit)
            flat = unit.reshape(n, -1)
            cores.append((self.left[name].T @ unit @ self.right[name] if name in self.left else unit).reshape(n, -1))
            sizes += [np.log(np.where(moved, norms, total) / total), moved.astype(np.float64)]
            quantiles.append(np.quantile(flat, QUANTILES, axis=1).T * flat.shape[1] ** 0.5)
            if name in self.left:
                values = np.linalg.svd(unit, compute_uv=False)
                spectra.append(np.log(np.where(moved[:, None], values, 1.0) + FLOOR))
        return {
            "direction": np.concatenate(cores, 1),
            "sizes": np.stack([np.log(total), *sizes], 1),
            "spectra": np.concatenate(spectra, 1),
            "quantiles": np.concatenate(quantiles, 1),
        } | self.references.describe(responses)

    def read(self, change: Float[np.ndarray, "n w"], responses: Float[np.ndarray, "n r"]) -> Arrays:
        """Return every description [n, f], centred, and of mean square norm 1 over the fine-tunes it was fitted on."""
        described = self.describe(change, responses)
        return {name: (values - self.means[name]) * self.scales[name] for name, values in described.items()}

    def to_arrays(self) -> Arrays:
        """Return what was fitted as named arrays, in single precision."""
        kinds = {"left": self.left, "right": self.right, "mean": self.means, "scale": self.scales}
        return {f"{kind}.{name}": a.astype(np.float32) for kind, named in kinds.items() for name, a in named.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays, tensors: list[str], layout: Layout, references: References) -> Self:
        """Return the reader that `to_arrays` gave."""
        named: dict[str, Arrays] = {"left": {}, "right": {}, "mean": {}, "scale": {}}
        for name, array in arrays.items():
            kind, _, key = name.partition(".")
            named[kind][key] = array.astype(np.float64)
        return cls(layout, references, tuple(tensors), named["left"], named["right"], named["mean"], named["scale"])
