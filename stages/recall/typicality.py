"""Is a change one that fine-tuning a whole network makes? What known fine-tunes have in common, and how far from it a change may be.

Axes: n fine-tunes, w weights of a network, j traits that are judged jointly.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.condense import EPSILON, Arrays, Span, tensors_of

FOLDS = 5
RIDGE = 0.1  # of the mean variance: at 0.1 and less the progress of fine-tunes left out varies least, by a fifth
MARGIN = 0.25  # of the range of known fine-tunes, beyond which a change is refused; what is nearer is told with less certainty
LEVEL = 0.99  # of known fine-tunes are nearer to their mean than the limit
STILL = 0.01  # of the median change: a weight that moved less did not move
SPARSE = 0.05  # of the weights may stay where they were: files in half precision leave one of 200 there


@dataclass(frozen=True)
class Traits:
    """What tells a fine-tune's change from other changes of weights."""

    outside: Float[np.ndarray, " n"]  # fraction of the square norm that lies outside the span
    size: Float[np.ndarray, " n"]
    # along the way that all fine-tunes go, in units of their mean; negative where a change is turned round
    progress: Float[np.ndarray, " n"]
    inside_norm: Float[np.ndarray, " n"]  # of the part inside the span, around the mean
    outside_norm: Float[np.ndarray, " n"]
    tail: Float[np.ndarray, " n"]  # fraction of matrices' square norms in the smaller half of their singular values
    unmoved: Float[np.ndarray, " n"]  # fraction of weights

    @property
    def joint(self) -> Float[np.ndarray, "n j"]:
        """The traits that depend on each other: together they are narrower than each alone."""
        logarithms = (np.log(values + EPSILON) for values in (self.inside_norm, self.outside_norm, self.tail))
        return np.stack([self.progress, *logarithms], 1)


def common_direction(change: Float[np.ndarray, "n w"], span: Span) -> Float[np.ndarray, " w"]:
    """Return the direction u that tells best whether fine-tuning went its way: u · mean change is 1, others vary least.

    Linear discriminant analysis of changes against changes turned round: (covariance + ridge)⁻¹ mean, of scaled changes.
    """
    scaled = change.astype(np.float64) * span.scale
    mean, n = scaled.mean(0), len(scaled)
    centred = scaled - mean
    gram = centred @ centred.T
    ridge = RIDGE * np.trace(gram) / n
    solved = np.linalg.solve(
        gram + ridge * np.eye(n), centred @ mean
    )  # in the space of fine-tunes: n is smaller than w
    direction = mean - centred.T @ solved
    return direction / (direction @ mean) * span.scale


def tail(change: Float[np.ndarray, "n w"], layout: Layout) -> Float[np.ndarray, " n"]:
    """Return the fraction of each matrix's square norm in the smaller half of its singular values, averaged over matrices."""
    fractions = []
    for tensor in tensors_of(change, layout).values():
        if tensor.ndim == 3 and min(tensor.shape[1:]) > 1:
            values = np.linalg.svd(tensor, compute_uv=False)
            squares = (
                values / np.maximum(values[:, :1], EPSILON)
            ) ** 2  # of the largest: of any size there is a square
            half = squares.shape[1] // 2
            fractions.append(squares[:, -half:].sum(1) / np.maximum(squares.sum(1), EPSILON))
    return np.mean(fractions, 0)


def read_traits(
    change: Float[np.ndarray, "n w"], layout: Layout, span: Span, direction: Float[np.ndarray, " w"]
) -> Traits:
    """Return the traits of changes."""
    centred = (change.astype(np.float64) - span.mean) * span.scale
    inside = np.linalg.norm(centred @ span.axes.T, axis=1)
    total = np.linalg.norm(centred, axis=1)
    moved = np.abs(change)
    return Traits(
        outside=span.outside(change),
        size=span.size(change),
        progress=change.astype(np.float64) @ direction,
        inside_norm=inside,
        outside_norm=np.sqrt(np.maximum(total**2 - inside**2, 0)),
        tail=tail(change, layout),
        unmoved=(moved <= STILL * np.median(moved, axis=1, keepdims=True)).mean(1),
    )


def widened(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " 2"]:
    """Return the least and the largest value, and a margin on both sides."""
    margin = MARGIN * (values.max() - values.min())
    return np.array([values.min() - margin, values.max() + margin])


@dataclass(frozen=True)
class Typicality:
    """Limits of the traits of known fine-tunes, each fifth left out in turn."""

    direction: Float[np.ndarray, " w"]
    limit: Float[np.ndarray, ""]  # the largest fraction outside the span
    sizes: Float[np.ndarray, " 2"]  # the smallest and the largest
    progress: Float[np.ndarray, " 2"]
    log_tail: Float[np.ndarray, " 2"]
    unmoved: Float[np.ndarray, ""]
    joint_mean: Float[np.ndarray, " j"]
    joint_precision: Float[np.ndarray, "j j"]
    joint_limit: Float[np.ndarray, ""]

    @classmethod
    def fit(cls, change: Float[np.ndarray, "n w"], layout: Layout, span: Span) -> Self:
        """Return the limits of training fine-tunes, which `span` spans.

        They must be few beside the weights, or what four fifths of them span is much smaller than what all do.
        """
        fold, traits = np.arange(len(change)) % FOLDS, []
        for k in range(FOLDS):
            others = Span.fit(change[fold != k], layout)
            direction = common_direction(change[fold != k], others)
            traits.append(read_traits(change[fold == k], layout, others, direction))
        known = Traits(*(np.concatenate([getattr(part, name) for part in traits]) for name in Traits.__annotations__))
        joint = known.joint
        covariance = np.cov(joint.T) + EPSILON * np.eye(joint.shape[1])
        precision = np.linalg.inv(covariance)
        squares = squared_distance(joint, joint.mean(0), precision)
        level = min(1.0, LEVEL * (1 + 1 / len(squares)))
        return cls(
            direction=common_direction(change, span),
            limit=known.outside.max(),
            sizes=np.array([known.size.min(), known.size.max()]),
            progress=widened(known.progress),
            log_tail=widened(np.log(known.tail + EPSILON)),
            unmoved=np.maximum(SPARSE, (1 + MARGIN) * known.unmoved.max()),
            joint_mean=joint.mean(0),
            joint_precision=precision,
            joint_limit=np.sqrt(np.quantile(squares, level)),
        )

    def distance(self, traits: Traits) -> Float[np.ndarray, " n"]:
        """Return how far changes are from the mean of known fine-tunes, in units of the limit: of these 99 % are nearer than 1."""
        squares = squared_distance(traits.joint, self.joint_mean, self.joint_precision)
        return np.sqrt(squares) / self.joint_limit

    def to_arrays(self) -> Arrays:
        """Return the limits as named arrays."""
        return {name: np.asarray(getattr(self, name)) for name in type(self).__annotations__}


def squared_distance(
    points: Float[np.ndarray, "n j"], mean: Float[np.ndarray, " j"], precision: Float[np.ndarray, "j j"]
) -> Float[np.ndarray, " n"]:
    """Return Mahalanobis' squared distance of points from a mean."""
    centred = points - mean
    return np.einsum("ni,ij,nj->n", centred, precision, centred)


def check(name: str, traits: Traits, typical: Typicality) -> None:
    """InputError that says why the change of the network called `name`, of these traits, is none that decoders can read."""
    outside, limit = float(traits.outside[0]), float(typical.limit)
    if outside > limit:
        raise InputError(
            f"{name} does not descend from the base as known fine-tunes do: {outside:.0%} of its change lies outside "
            f"what they span, of theirs at most {limit:.0%}; give a network that was tuned from this base as a whole"
        )
    size, (least, most) = float(traits.size[0]), map(float, typical.sizes)
    if not least <= size <= most:
        raise InputError(
            f"{name} was not tuned as known fine-tunes were: its change has a size of {size:.2g}, theirs of "
            f"{least:.2g} to {most:.2g}; give it as training left it, or build fleets of such fine-tunes"
        )
    progress, (least, most) = float(traits.progress[0]), map(float, typical.progress)
    if not least <= progress <= most:
        turned = "is turned round (a change that was negated, or taken away)"
        raise InputError(
            f"{name}: its change {turned if progress < least else 'was scaled or added'}: it goes {progress:.2f} times as far "
            f"as known fine-tunes on the way that they share, they {least:.2f} to {most:.2f}; give it as training left it"
        )
    unmoved, most = float(traits.unmoved[0]), float(typical.unmoved)
    if unmoved > most:
        raise InputError(
            f"{name}: {unmoved:.0%} of its weights are the base's, of known fine-tunes at most {most:.0%}: only some layers or "
            "weights were trained or kept; give a network that was tuned as a whole"
        )
    small, (least, most) = float(traits.tail[0]), map(float, np.exp(typical.log_tail))
    if not least <= small <= most:
        kind = "of low rank (LoRA, or truncated)" if small < least else "noisy (quantised, pruned or merged)"
        raise InputError(
            f"{name}: its change is {kind}: the smaller half of singular values holds {small:.2%} of it, of known "
            f"fine-tunes {least:.2%} to {most:.2%}; give a network that was tuned as a whole, in full precision"
        )
