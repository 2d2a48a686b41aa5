"""Was a change turned round? A network beside its opposite, base minus change: one of both is what training left.

Training on some classes raises them over the others, and its opposite raises the others over them: as if it had been trained on those.
What is not alike is what happens within the two groups. Training sharpens: the images of classes that it raises are told apart better. Its
opposite blurs those of classes that it lowers, and has nothing in store for those that it raises. So the classes are cut into raised and
lowered ones, and the loss among those of a group alone, on their images, is compared with the base's, of the network and of its opposite;
likewise what else is measured of a group. A ridge regression on these, their products, and the direction of the change tells them apart.

Axes: n fine-tunes, i reference inputs, c classes, f measurements, q columns, w weights of a network, r responses.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import log_softmax, logsumexp
from sklearn.linear_model import Ridge

from stages.recall.condense import EPSILON
from stages.recall.honesty import FOLDS, PENALTY, Networks, Respond
from stages.recall.reading import Arrays, Reader, References, read_columns

READ = "direction_and_answers"  # of `reading.READS`, beside the groups
REFUSED = 0.02  # of honest fine-tunes: chosen on folds
FARTHEST = 4.0  # deviations of a measurement: loss has no upper end
PRODUCTS = 2.0  # weight of products beside single measurements: chosen on folds
LEAST_LOSS = 1e-4

Logits = Float[np.ndarray, "n i c"]
Group = Bool[np.ndarray, "n c"]


def raised(gains: Float[np.ndarray, "n c"]) -> Group:
    """Return which classes a change raises: the cut in two groups that leaves the least variance within them."""
    ordered, n, c = np.sort(gains, 1), *gains.shape
    within = [ordered[:, :k].var(1) * k + ordered[:, k:].var(1) * (c - k) for k in range(1, c)]
    cut = np.argmin(within, 0)
    rows = np.arange(n)
    return gains > ((ordered[rows, cut] + ordered[rows, cut + 1]) / 2)[:, None]


def loss_within(logits: Logits, labels: Int[np.ndarray, " i"], group: Group) -> Float[np.ndarray, " n"]:
    """Return the mean loss of the images of a group's classes, when no other class can be answered."""
    among = logsumexp(np.where(group[:, None, :], logits, -np.inf), axis=2)
    own = logits[:, np.arange(len(labels)), labels]
    return mean_over(among - own, group[:, labels])


def mean_over(values: Float[np.ndarray, "n k"], chosen: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Return the mean of each row over what is chosen of it; 0 where nothing is."""
    return np.where(chosen, values, 0).sum(1) / np.maximum(chosen.sum(1), 1)


def measure(
    before: Float[np.ndarray, "i c"], after: tuple[Logits, Logits], labels: Int[np.ndarray, " i"]
) -> Float[np.ndarray, "n f"]:
    """Return what networks and their opposites do to the classes that the networks raise, and to those that they lower."""
    base = np.broadcast_to(before, after[0].shape)
    members = (np.arange(before.shape[1])[:, None] == labels).astype(np.float64)
    members /= np.maximum(members.sum(1, keepdims=True), 1)
    moved = [logits - base - (logits - base).mean(2, keepdims=True) for logits in after]
    by_class = [np.einsum("ai,nic->nac", members, step) for step in moved]
    up = raised(by_class[0].mean(1))
    groups, size = (up, ~up), np.sqrt((by_class[0] ** 2).mean((1, 2))) + EPSILON
    start = [loss_within(base, labels, group) for group in groups]
    found = [up.sum(1), np.log(size), *start]
    for logits, step, table in zip(after, moved, by_class, strict=True):
        changes = losses(logits, members, labels) - losses(base, members, labels)
        spread = entropy(logits, members) - entropy(base, members)
        over = (table * up[:, None]).sum(2) / up.sum(1)[:, None] - (table * ~up[:, None]).sum(2) / (~up).sum(1)[:, None]
        own = table - table.mean(1, keepdims=True) - table.mean(2, keepdims=True) + table.mean((1, 2), keepdims=True)
        diagonal, length = np.diagonal(own, axis1=1, axis2=2), np.sqrt((step**2).mean(2)) @ members.T + EPSILON
        rest = np.sqrt((own**2).mean((1, 2))) + EPSILON
        found += [np.log(rest / size), diagonal.mean(1) / rest, np.log(mean_over(length, up) / mean_over(length, ~up))]
        for group, first in zip(groups, start, strict=True):
            last, change = loss_within(logits, labels, group), mean_over(changes, group)
            found += [last - first, (last - first) / size, np.log((last + LEAST_LOSS) / (first + LEAST_LOSS))]
            found += [mean_over(diagonal, group) / size, mean_over(over, group) / size, mean_over(spread, group)]
            found += [change, change / size, mean_over(np.sign(changes) * np.log1p(np.abs(changes)), group)]
    return np.stack(found, 1)


def losses(
    logits: Logits, members: Float[np.ndarray, "c i"], labels: Int[np.ndarray, " i"]
) -> Float[np.ndarray, "n c"]:
    """Return the mean loss of each class's images."""
    return -log_softmax(logits, axis=2)[:, np.arange(len(labels)), labels] @ members.T


def entropy(logits: Logits, members: Float[np.ndarray, "c i"]) -> Float[np.ndarray, "n c"]:
    """Return the mean entropy of the answers to each class's images."""
    chances = log_softmax(logits, axis=2)
    return -(np.exp(chances) * chances).sum(2) @ members.T


def measured(
    references: References, responses: Float[np.ndarray, "n r"], opposite: Float[np.ndarray, "n r"]
) -> Float[np.ndarray, "n f"]:
    """Return `measure` of networks by their responses."""
    inputs, classes = len(references.labels), references.classes

    def logits(rows: Float[np.ndarray, "n r"]) -> Logits:
        return rows[:, : inputs * classes].reshape(len(rows), inputs, classes).astype(np.float64)

    return measure(logits(references.responses[None])[0], (logits(responses), logits(opposite)), references.labels)


@dataclass(frozen=True)
class Turned:
    """What tells changes from their negatives: 1 of honest ones and -1 of negated ones, and below which floor it refuses."""

    middle: Float[np.ndarray, " f"]
    spread: Float[np.ndarray, " f"]
    mean: Float[np.ndarray, " q"]  # of measurements and products
    scale: Float[np.ndarray, " q"]
    weights: Float[np.ndarray, " p"]
    offset: Float[np.ndarray, ""]
    floor: Float[np.ndarray, ""]

    @classmethod
    def fit(
        cls,
        networks: Networks,
        opposite: Float[np.ndarray, "n r"],
        fold: Int[np.ndarray, " n"],
        reader: Reader,
        rank: int,
    ) -> tuple[Self, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return what training fine-tunes teach, and how odd they are and were their negatives, each left out with its fold.

        opposite: the responses of base minus change.
        """
        change, responses = networks
        odd, caught = np.zeros(len(change)), np.zeros(len(change))
        for k in range(FOLDS):
            out, rest = fold == k, fold != k
            others = Reader.fit(change[rest], responses[rest], reader.layout, reader.references, rank)
            known = cls.of((change[rest], responses[rest]), opposite[rest], others)
            odd[out] = known.score((change[out], responses[out]), opposite[out], others)
            caught[out] = known.score((-change[out], opposite[out]), responses[out], others)
        unfinished = cls.of(networks, opposite, reader)
        finished = cls(**{**vars(unfinished), "floor": np.quantile(odd, REFUSED)})
        return finished, finished.oddness(odd), finished.oddness(caught)

    @classmethod
    def of(cls, networks: Networks, opposite: Float[np.ndarray, "n r"], reader: Reader) -> Self:
        """Return what fine-tunes teach, without a floor."""
        change, responses = networks
        found = measured(reader.references, responses, opposite)
        middle, spread = np.median(found, 0), found.std(0) + EPSILON
        both = with_products((found - middle) / spread)
        blank = np.zeros(())
        known = cls(middle, spread, both.mean(0), 1 / (both.std(0) + EPSILON), blank, blank, blank)
        x = np.concatenate(
            [known.columns(networks, opposite, reader), known.columns((-change, opposite), responses, reader)]
        )
        model = Ridge(PENALTY).fit(x, np.repeat([1.0, -1.0], len(change)))
        return cls(**{**vars(known), "weights": model.coef_, "offset": np.array(model.intercept_)})

    def columns(
        self, networks: Networks, opposite: Float[np.ndarray, "n r"], reader: Reader
    ) -> Float[np.ndarray, "n p"]:
        """Return what the regression reads: direction and answers, measurements, and their products, each of mean square norm near 1."""
        f = len(self.middle)
        table = (
            with_products((measured(reader.references, networks[1], opposite) - self.middle) / self.spread) - self.mean
        ) * self.scale
        single, products = table[:, :f] / f**0.5, PRODUCTS * table[:, f:] / (table.shape[1] - f) ** 0.5
        return np.concatenate([read_columns(reader.read(*networks), READ), single, products], 1)

    def score(self, networks: Networks, opposite: Float[np.ndarray, "n r"], reader: Reader) -> Float[np.ndarray, " n"]:
        """Return scores of networks, of which `opposite` are their opposites' responses."""
        return self.columns(networks, opposite, reader) @ self.weights + self.offset

    def oddness(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return how odd networks of these scores are: 0 as honest ones are on average, refused beyond 1."""
        return np.maximum(1 - scores, 0) / (1 - self.floor)

    def judge(self, networks: Networks, reader: Reader, respond: Respond) -> Float[np.ndarray, " n"]:
        """Return how odd networks are."""
        return self.oddness(self.score(networks, respond(-networks[0]), reader))

    def to_arrays(self) -> Arrays:
        """Return it as named arrays."""
        return {name: np.asarray(getattr(self, name)) for name in type(self).__annotations__}


def with_products(values: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n q"]:
    """Return values, none larger than FARTHEST, and the products of each two."""
    near = np.clip(values, -FARTHEST, FARTHEST)
    first, second = np.triu_indices(near.shape[1])
    return np.concatenate([near, near[:, first] * near[:, second]], 1)
