"""Is a change one that training makes, by any recipe that was learned from? What honest fine-tunes have in common, and how far from it.

Axes: n fine-tunes, w weights of a network, r responses, f columns, s suspicions, j traits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import Ridge

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.condense import EPSILON, tensors_of
from stages.recall.reading import Arrays, Reader, read_columns, unit_rows, within

Respond = Callable[[Float[np.ndarray, "n w"]], Float[np.ndarray, "n r"]]
Alteration = Callable[[Float[np.ndarray, "n w"]], Float[np.ndarray, "n w"]]

FOLDS = 5
REST = 0.993  # of honest fine-tunes whose traits as a whole are let pass
LEAST, MOST = (
    0.001,
    0.006,
)  # of honest fine-tunes that a suspicion refuses: no more than it needs to catch CAUGHT of what is altered so
CAUGHT = 0.99
SUSPECTED = "all"  # what suspicions are read from
NOISE_FLOOR = 1e-6  # of a square norm: rounding
PENALTY = 1.0  # of suspicions: less is overfitted, since each change stands beside its own negative
LEAST_DEVIATION = 0.05  # of traits, which are logarithms: of adapters noise is rounding, and varies as good as not
SHRINKAGE = 1e-3  # added to the variances of standard traits
STILL = 0.01  # of a tensor's median change: a weight that moved less did not move
SPARSE = 0.05  # of the weights of tensors that moved may stay where they were: files in half precision leave one of 200 there
ZEROS = 0.01  # of a tensor's weights
ENOUGH = 512  # weights of a tensor, to tell a grid of values from chance
REPEATED = 4  # times that each value of a tensor occurs on average: what is trained has next to no value twice

SUSPICIONS = {  # what a change is that looks like an honest one altered so
    "negated": "is turned round (negated, or taken away)",
    "average_of_two": "is a mixture (the average of two fine-tunes)",
    "ties": "is a mixture (two fine-tunes merged by TIES)",
    "foreign": "is of another base (its neurons are in another order)",
}
TRAITS = {  # and what a change is that has too little or too much of it
    "size": ("hardly moves the base", "is larger than training makes it"),
    "descent": (
        "goes where training of this base does not go: it does not descend from it",
        "is of too few directions",
    ),
    "noise": ("is of low rank (truncated)", "is noisy (quantised, pruned or averaged)"),
    "evenness": ("has a few large entries among small ones (sparse or pruned)", "has entries that are too even"),
    "answers": ("moves the answers less than training does", "moves the answers more than training does"),
    "tokens": ("moves the tokens less than training does", "moves the tokens more than training does"),
}

Networks = tuple[
    Float[np.ndarray, "n w"], Float[np.ndarray, "n r"]
]  # changes of a base, and responses of base + change


@dataclass(frozen=True)
class Judgement:
    """How odd changes are: refused is what is beyond 1."""

    suspected: Float[np.ndarray, "n s"]  # of each alteration; 0 as honest ones are on average, 1 at the limit
    traits: Float[np.ndarray, "n j"]  # in standard deviations of honest ones; 0 where a change has no such trait
    far: Float[np.ndarray, " n"]  # of all traits, in units of the limit

    @property
    def distance(self) -> Float[np.ndarray, " n"]:
        """How odd a change is, in the respect in which it is oddest."""
        return np.maximum(self.far, self.suspected.max(1))


@dataclass(frozen=True)
class Honesty:
    """What tells honest changes from altered ones, and how far the traits of honest ones vary, each fifth left out in turn."""

    suspicions: Float[np.ndarray, "s f"]  # each scores 1 for honest changes and -1 for those altered so
    offsets: Float[np.ndarray, " s"]
    floors: Float[np.ndarray, " s"]
    mean: Float[np.ndarray, " j"]
    deviations: Float[np.ndarray, " j"]
    precision: Float[np.ndarray, "j j"]
    limit: Float[np.ndarray, ""]

    @classmethod
    def fit(
        cls,
        networks: Networks,
        altered: list[Networks],
        fold: Int[np.ndarray, " n"],
        reader: Reader,
        rank: int,
        told_by: Sequence[str],
        most: float | Sequence[float] = MOST,
    ) -> tuple[Self, Float[np.ndarray, " n"]]:
        """Return the limits of training fine-tunes, and how odd each is, left out with its fold.

        `altered` holds what becomes of them: no alteration mixes fine-tunes of two folds, so what is left out is in no mixture.
        told_by: what each alteration is told by, of `reading.READS`; most: share of honest ones that each suspicion refuses at most.
        """
        change, responses = networks
        n = len(change)
        scores, of_altered, table = np.zeros((n, len(altered))), np.zeros((n, len(altered))), np.zeros((n, len(TRAITS)))
        for k in range(FOLDS):
            out, rest = fold == k, fold != k
            others = Reader.fit(change[rest], responses[rest], reader.layout, reader.references, rank)
            known = fit_suspicions(others, networks, altered, rest, told_by)
            scores[out] = columns(others, (change[out], responses[out])) @ known[0].T + known[1]
            for j, (rows, answers) in enumerate(altered):
                of_altered[out, j] = columns(others, (rows[out], answers[out])) @ known[0][j] + known[1][j]
            table[out] = traits(change[out], responses[out], others)
        lines, offsets = fit_suspicions(reader, networks, altered, fold >= 0, told_by)
        mean, deviations = np.nanmean(table, 0), np.maximum(np.nanstd(table, 0), LEAST_DEVIATION)
        standard = np.nan_to_num((table - mean) / deviations)
        precision = np.linalg.inv(np.cov(standard.T) + SHRINKAGE * np.eye(len(TRAITS)))
        squares = squared_distance(standard, precision)
        limit = np.sqrt(np.quantile(squares, min(1.0, REST * (1 + 1 / n))))
        honesty = cls(lines, offsets, floors_of(scores, of_altered, most), mean, deviations, precision, limit)
        return honesty, honesty.judgement(scores, standard).distance

    def judge(self, networks: Networks, reader: Reader) -> Judgement:
        """Return how odd changes are."""
        scores = columns(reader, networks) @ self.suspicions.T + self.offsets
        return self.judgement(scores, np.nan_to_num((traits(*networks, reader) - self.mean) / self.deviations))

    def judgement(self, scores: Float[np.ndarray, "n s"], standard: Float[np.ndarray, "n j"]) -> Judgement:
        """Return how odd changes of these scores and standard traits are."""
        far = np.sqrt(squared_distance(standard, self.precision)) / self.limit
        return Judgement(np.maximum(1 - scores, 0) / (1 - self.floors), standard, far)

    def to_arrays(self) -> Arrays:
        """Return the limits as named arrays."""
        return {name: np.asarray(getattr(self, name)) for name in type(self).__annotations__}


def floors_of(
    honest: Float[np.ndarray, "n s"], altered: Float[np.ndarray, "n s"], most: float | Sequence[float] = MOST
) -> Float[np.ndarray, " s"]:
    """Return below which score each suspicion refuses: so low that it catches CAUGHT of those, within LEAST to `most` of honest ones.

    Where the two lie apart no honest one is lost, and what that saves goes to alterations that are hard to tell, as averages are.
    """
    shares = np.broadcast_to(most, honest.shape[1:])
    low, high = np.array(
        [np.quantile(column, (LEAST, share)) for column, share in zip(honest.T, shares, strict=True)]
    ).T
    return np.clip(np.quantile(altered, CAUGHT, axis=0), low, high)


def folds_of(n: int) -> Int[np.ndarray, " n"]:
    """Return the fold of each of n fine-tunes."""
    return np.random.default_rng(0).permutation(n) % FOLDS


def alter(
    change: Float[np.ndarray, "n w"], fold: Int[np.ndarray, " n"], alterations: Iterable[Alteration], respond: Respond
) -> list[Networks]:
    """Return what becomes of changes by each alteration, fold by fold, and how base + change responds then."""
    altered = []
    for alteration in alterations:
        rows = np.zeros_like(change)
        for k in range(FOLDS):
            rows[fold == k] = alteration(change[fold == k])
        altered.append((rows, respond(rows)))
    return altered


def columns(reader: Reader, networks: Networks) -> Float[np.ndarray, "n f"]:
    """Return what suspicions read of networks."""
    return read_columns(reader.read(*networks), SUSPECTED)


def fit_suspicions(
    reader: Reader, honest: Networks, altered: list[Networks], rows: Bool[np.ndarray, " n"], told_by: Sequence[str]
) -> tuple[Float[np.ndarray, "s f"], Float[np.ndarray, " s"]]:
    """Return for each alteration a ridge regression that scores 1 for honest changes and -1 for those altered so.

    Of columns that an alteration is not told by its weights are zero.
    """
    x, lines, offsets = columns(reader, (honest[0][rows], honest[1][rows])), [], []
    for (change, responses), source in zip(altered, told_by, strict=True):
        both = np.concatenate([x, columns(reader, (change[rows], responses[rows]))])
        both *= within(reader.means, source, SUSPECTED)
        model = Ridge(PENALTY).fit(both, np.repeat([1.0, -1.0], len(x)))
        lines.append(model.coef_)
        offsets.append(model.intercept_)
    return np.stack(lines), np.array(offsets)


def traits(
    change: Float[np.ndarray, "n w"], responses: Float[np.ndarray, "n r"], reader: Reader
) -> Float[np.ndarray, "n j"]:
    """Return the traits of changes; NaN where a change moves no matrix."""
    total = np.linalg.norm(change.astype(np.float64), axis=1)
    captured, tails, evenness = [], [], []
    for name, tensor in tensors_of(change, reader.layout).items():
        unit, norms = unit_rows(tensor)
        moved = np.where(norms > 0, 0.0, np.nan)
        flat = np.abs(unit.reshape(len(unit), -1))
        evenness.append(np.log(flat.mean(1) * flat.shape[1] ** 0.5 + EPSILON) + moved)
        if name in reader.left:
            core = reader.left[name].T @ unit @ reader.right[name]
            captured.append(np.log((core**2).sum((1, 2)) + EPSILON) + moved)
            squares = np.linalg.svd(unit, compute_uv=False) ** 2
            tails.append(np.log(squares[:, squares.shape[1] // 2 :].sum(1) + NOISE_FLOOR) + moved)
    parts = reader.references.by_class(responses - reader.references.responses)
    answers = [np.log(np.linalg.norm(part, axis=(1, 2)) / (total + EPSILON) + EPSILON) for part in parts]
    means = [nan_mean(values) for values in (captured, tails, evenness)]
    return np.stack([np.log(total + EPSILON), *means, *answers], 1)


def squared_distance(
    standard: Float[np.ndarray, "n j"], precision: Float[np.ndarray, "j j"]
) -> Float[np.ndarray, " n"]:
    """Return Mahalanobis' squared distance of points from zero."""
    return np.einsum("ni,ij,nj->n", standard, precision, standard)


def nan_mean(columns: list[Float[np.ndarray, " n"]]) -> Float[np.ndarray, " n"]:
    """Return the mean over columns of those that are numbers; NaN where none is."""
    table = np.stack(columns, 1)
    counts = np.isfinite(table).sum(1)
    return np.where(counts > 0, np.nansum(table, 1) / np.maximum(counts, 1), np.nan)


def check_marks(name: str, weights: Float[np.ndarray, " w"], change: Float[np.ndarray, " w"], layout: Layout) -> None:
    """InputError if the weights bear the mark of what was done to them after training: zeros, a grid of values, or few that moved."""
    before = tensors_of((weights - change)[None], layout)
    after, moved = tensors_of(weights[None], layout), tensors_of(change[None], layout)
    for key, tensor in after.items():
        values = len(np.unique(tensor))
        if tensor.size >= ENOUGH and REPEATED * values < tensor.size:
            raise InputError(
                f"{name}: {key} has {values} different values among {tensor.size} (quantised); give it in full precision"
            )
    still, entries = 0, 0
    for key, tensor in after.items():
        zeros, steps = (tensor == 0).mean(), np.abs(moved[key].ravel())
        if zeros > max(ZEROS, 2 * (before[key] == 0).mean()):
            raise InputError(f"{name}: {zeros:.0%} of {key} are zeros (pruned); give it as training left it")
        if steps.any():
            still += int((steps <= STILL * np.median(steps)).sum())
            entries += steps.size
    if still > SPARSE * entries:
        raise InputError(
            f"{name}: {still / entries:.0%} of the weights in tensors that moved are the base's (a sparse change: merged by TIES or DARE, "
            "or pruned); give it as training left it"
        )


def check(name: str, judged: Judgement, suspicions: list[str]) -> float:
    """Return how odd a change is, in units of the limit; InputError that says in words what is odd if it is beyond."""
    advice = "give a fine-tune of this base as training left it, by a recipe that the auditor knows"
    if judged.far[0] > 1:
        values = judged.traits[0]
        oddest = int(np.abs(values).argmax())
        trait, odd = list(TRAITS.items())[oddest]
        raise InputError(
            f"{name}: its change {odd[int(values[oddest] > 0)]}: its {trait} is {values[oddest]:+.1f} standard deviations from known "
            f"fine-tunes; {advice}"
        )
    place = int(judged.suspected[0].argmax())
    if judged.suspected[0, place] > 1:
        raise InputError(f"{name}: its change {SUSPICIONS[suspicions[place]]}; {advice}")
    return float(judged.distance[0])
