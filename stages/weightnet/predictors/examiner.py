"""What is learned from the marks of a zoo's networks, beside its ablations, and kept for networks to come."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.common.checkpoints import Checkpoint
from stages.weightnet.predictors.data import Data
from stages.weightnet.predictors.exam import READINGS, Exam, ExamParams, asker, draw_exam, mark
from stages.weightnet.predictors.intervals import ROUNDING, conformal_quantile
from stages.weightnet.predictors.kernel_ridge import KernelRidge, fit_kernel_ridge
from stages.weightnet.predictors.splits import Rows
from stages.weightnet.predictors.targets import EDGE, own_units
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES
from stages.weightnet.zoo.reading import Zoo

AT_A_TIME = 32  # networks that sit the exam together, each with attacked inputs of its own
REFERENCE = "labelled_32"  # the accuracy that a few labelled images show
OWN = (
    "scale",
    "errors",
    "elsewhere",
    "weights",
    "names",
    "targets",
    "telling",
)  # what an examiner keeps beside its exam and what it learned
Pair = tuple[Float[Tensor, "v k"], Float[Tensor, "t k"]]  # of validation and of test networks


def better_networks(zoos: dict[str, Zoo], rows: dict[str, Rows], share: float, least: int) -> list[tuple[str, int]]:
    """Return name of architecture and row of the most accurate share of some networks, at least so many; NaN is not known."""
    pooled = [(name, row) for name, index in rows.items() for row in index.tolist()]
    skill = torch.cat([torch.from_numpy(zoos[name].column("test_acc"))[index] for name, index in rows.items()])
    skill = skill.nan_to_num(-torch.inf)
    best = skill.argsort(descending=True, stable=True)[: max(least, round(share * len(skill)))]
    return [pooled[place] for place in best.tolist()]


def draw_from(data: Data, params: ExamParams, drawing: int) -> Exam:
    """Draw an exam from the networks to learn from."""
    better = better_networks(data.zoos, data.split.train, params.better, params.members)

    def choose(places: Int[Tensor, " c"]) -> list[Networks]:
        chosen: dict[str, list[int]] = {}
        for place in places.tolist():
            name, row = better[place]
            chosen.setdefault(name, []).append(row)
        return [data.zoos[name].networks(torch.tensor(rows)) for name, rows in chosen.items()]

    small = all(zoo.at_a_time(AT_A_TIME) == AT_A_TIME for zoo in data.zoos.values())
    return draw_exam(choose, len(better), params, drawing, params.committees if small else 1)


def mark_rows(exam: Exam, zoos: dict[str, Zoo], rows: dict[str, Rows]) -> Float[Tensor, "n 5 m"]:
    """Return the marks of some networks of all architectures."""
    return torch.cat([mark_some(exam, zoos[name], index) for name, index in rows.items()])


def mark_some(exam: Exam, zoo: Zoo, rows: Rows) -> Float[Tensor, "n 5 m"]:
    """Return the marks of some networks of one architecture, which sit the exam beside those of their activation: that is faster."""
    order = zoo.tanh[rows].int().argsort(stable=True)
    parts = rows[order].split(zoo.at_a_time(AT_A_TIME))
    return torch.cat([mark(exam, zoo.networks(part)) for part in parts])[order.argsort()]


def with_trees(marks: list[Float[Tensor, "n r"]], targets: Float[Tensor, "n k"], trees: int, ridge: Pair) -> Pair:
    """Return the mean of kernel ridge's predictions and those of extremely randomised trees (Geurts et al. 2006)."""
    from sklearn.ensemble import ExtraTreesRegressor  # here: 2 s that a prediction does without

    together = (
        [targets] if not targets.isnan().any() else list(targets.split(1, 1))
    )  # each by itself, from where it is known
    found: list[list[Tensor]] = [[], []]
    for columns in together:
        known = ~columns.isnan().any(1)
        forest = ExtraTreesRegressor(trees, min_samples_leaf=2, max_features=0.3, random_state=0, n_jobs=1)
        forest.fit(marks[0][known].numpy(), columns[known].numpy().squeeze())
        for place, part in enumerate(marks[1:]):
            found[place].append(torch.from_numpy(forest.predict(part.numpy())).view(len(part), -1))
    validation, test = ((torch.cat(part, 1) + own) / 2 for part, own in zip(found, ridge, strict=True))
    return validation, test


def joined(
    prediction: Pair, reference: tuple[Float[Tensor, " v"], Float[Tensor, " t"]], truth: Float[Tensor, "v k"]
) -> Pair:
    """Return predictions with a share taken from an accuracy that was measured on a few images: least squares on validation runs."""
    seen, new = (value.clamp(EDGE, 1 - EDGE).logit() for value in reference)
    columns: list[Pair] = []
    for own, other, target in zip(prediction[0].T, prediction[1].T, truth.T.double(), strict=True):
        x, z = (torch.stack([torch.ones_like(a), a, b], 1) for a, b in ((own, seen), (other, new)))
        weights = torch.linalg.lstsq(x, target[:, None]).solution
        columns.append(((x @ weights)[:, 0], (z @ weights)[:, 0]))
    validation, test = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return validation, test


def errors_elsewhere(
    marks: Float[Tensor, "n r"], targets: Float[Tensor, "n k"], sizes: list[int]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """Return what errors would be on networks of other architectures, over how uncertain predictions are, and their weights.

    sizes: of each architecture's networks, which lie one after the other. Each is left out once; all count alike.
    """
    place = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    errors = []
    for left_out in range(len(sizes)):
        out = place == left_out
        ridge = fit_kernel_ridge(marks[~out], targets[~out])
        errors.append((ridge.predict(marks[out]) - targets[out]) / ridge.deviation(marks[out]))
    return torch.cat(errors), 1 / torch.tensor(sizes, dtype=torch.float64)[place]


def examine(
    data: Data, params: ExamParams, trees: int, main: bool, first: bool, keeps: bool
) -> tuple[dict[str, Pair], Pair, "Examiner"]:
    """Draw, let sit, mark and learn: return the predictions of the exam and of what it is compared with, how uncertain the exam's
    are, and the examiner.

    data.inputs: hyper-parameters. main: also tell what parts of the marks would have told; and on the first split, other drawings.
    keeps: also tell, for an examiner that is kept, which inputs tell most.
    """
    split, parts = data.split, (data.split.train, data.split.validation, data.split.test)
    targets, truth, _ = (data.part(rows, data.targets) for rows in parts)
    exam = draw_from(data, params, 0)
    marks = [mark_rows(exam, data.zoos, rows) for rows in parts]
    whole = [part.flatten(1) for part in marks]

    def learn(inputs: list[Tensor]) -> Pair:
        ridge = fit_kernel_ridge(inputs[0], targets)
        return ridge.predict(inputs[1]), ridge.predict(inputs[2])

    def column(rows: dict[str, Rows]) -> Tensor:
        return torch.cat([torch.from_numpy(data.zoos[name].column(REFERENCE))[index] for name, index in rows.items()])

    ridge = fit_kernel_ridge(whole[0], targets)
    own = (ridge.predict(whole[1]), ridge.predict(whole[2]))
    found = {"exam": own, "exam_trees": with_trees(whole, targets, trees, own)}
    if all(REFERENCE in zoo.index for zoo in data.zoos.values()):
        found[f"exam_{REFERENCE}"] = joined(own, (column(parts[1]), column(parts[2])), truth)
    if main:
        known = [torch.cat([part, data.part(rows, data.inputs)], 1) for part, rows in zip(whole, parts, strict=True)]
        if known[0].shape[1] > whole[0].shape[1]:
            found["exam_hyperparameters"] = learn(known)
        found |= {f"exam_{name}": learn([read(part) for part in marks]) for name, read in READINGS.items()}
        for drawing in range(1, params.drawings if first else 1):
            other = draw_from(data, params, drawing)
            found[f"exam_drawing_{drawing + 1}"] = learn([mark_rows(other, data.zoos, r).flatten(1) for r in parts])
    deviation = (ridge.deviation(whole[1]), ridge.deviation(whole[2]))
    errors, sizes = (own[0] - truth) / deviation[0], [len(rows) for rows in split.train.values()]
    elsewhere = errors_elsewhere(whole[0], targets, sizes) if len(sizes) > 1 else (errors, torch.ones(len(errors)))
    telling = how_telling(exam, data.zoos, split.train) if keeps else torch.zeros(0)
    kept = Examiner(exam, ridge, data.scale, errors, *elsewhere, data.names, targets, telling, data.measured)
    return found, deviation, kept


@dataclass(frozen=True)
class Examiner:
    """An exam, and what was learned from the marks in it. Errors are over how uncertain predictions were."""

    exam: Exam
    ridge: KernelRidge
    scale: dict[str, Tensor]
    errors: Float[Tensor, "v k"]  # on validation runs
    elsewhere: Float[Tensor, "e k"]  # on architectures that were left out
    weights: Float[Tensor, " e"]  # of those
    names: list[str]  # of the networks that it learned from
    targets: Float[Tensor, "n k"]  # what was measured of them, standardised
    telling: Float[Tensor, " b"]  # of each drawn input, how much agreeing with the consensus goes with test accuracy
    measured: tuple[str, ...] = PROPERTIES  # the names of the properties

    @property
    def inputs(self) -> Float[Tensor, "n r"]:
        """What it read of the networks that it learned from, standardised."""
        return self.ridge.known

    @property
    def skill(self) -> int:
        """The place of test accuracy among the properties."""
        return self.measured.index("test_acc")

    @cached_property
    def uncertain(self) -> Float[Tensor, " n"]:
        """How uncertain predicted accuracies of the networks that it learned from are where their architectures are left out.

        Of one architecture alone, each network is left out by itself.
        """
        found = self.inputs.new_empty(len(self.names))
        for out in (self.architecture == number for number in self.architecture.unique()):
            found[out] = self.ridge.without(out).deviation_at(self.inputs[out])[:, self.skill]
        return found

    @property
    def architecture(self) -> Float[Tensor, " n"]:
        """The number of each network's architecture; where there is but one, each network counts as one.

        Networks of an architecture lie one after the other, and each weighs one over how many they are: together they weigh 1, so
        what lies before a network weighs as many wholes as there are architectures before its own.
        """
        if len(self.weights) != len(self.names):
            return torch.arange(len(self.names), dtype=torch.float64)
        return (self.weights.cumsum(0) - self.weights + ROUNDING).floor()

    def unlike(self, read: Float[Tensor, "1 r"]) -> float:
        """Return for how many of the networks that it learned from accuracy would be less uncertain, were their architecture new.

        read: of one network, as `read` gives it.
        """
        return (self.uncertain < self.ridge.deviation_at(read)[0, self.skill]).double().mean().item()

    def half_width(self, familiar: bool) -> Float[Tensor, " k"]:
        """Return half the width of intervals of a prediction as uncertain as 1; familiar: for networks of the zoo's architectures."""
        return conformal_quantile(self.errors) if familiar else conformal_quantile(self.elsewhere, self.weights)

    def read(self, networks: Networks | nn.Module) -> Float[Tensor, "n r"]:
        """Return what it reads of networks: their marks, standardised."""
        return self.ridge.standardised(mark(self.exam, networks).flatten(1))

    def standardised(self, networks: Networks | nn.Module) -> Float[Tensor, "n k"]:
        """Return predictions in units of the properties' spread, in float64."""
        return self.ridge.predict(mark(self.exam, networks).flatten(1))

    def intervals(self, networks: Networks | nn.Module) -> Float[Tensor, "3 n k"]:
        """Return lower ends, predictions and upper ends, in the properties' own units: wider, the less a network is known.

        They hold for 90 % of networks of architectures that were not learned from.
        """
        return self.intervals_by(mark(self.exam, networks).flatten(1))

    def intervals_by(self, marks: Float[Tensor, "n r"]) -> Float[Tensor, "3 n k"]:
        """Return the same by networks' marks."""
        center, half = self.ridge.predict(marks), self.half_width(familiar=False) * self.ridge.deviation(marks)
        return torch.stack(
            [own_units(end, self.scale, self.measured) for end in (center - half, center, center + half)]
        )

    def state(self) -> Checkpoint:
        """Return plain values and tensors, from which `load_examiner` makes it again."""
        exam, ridge = ({f.name: getattr(part, f.name) for f in fields(part)} for part in (self.exam, self.ridge))
        own = {name: getattr(self, name) for name in OWN}
        if self.measured != PROPERTIES:
            own["measured"] = list(self.measured)
        ridge = {name: value for name, value in ridge.items() if value is not None}
        return {"exam": exam, "ridge": ridge | {"known": self.ridge.known.float()}} | own


def load_examiner(state: Checkpoint) -> Examiner:
    """Return what `Examiner.state` gave."""
    ridge = KernelRidge(**state["ridge"] | {"known": state["ridge"]["known"].double()})
    names = tuple(state.get("measured", PROPERTIES))
    exam = Exam(**state["exam"] | {"inputs": state["exam"]["inputs"].float()})  # released ones have halves
    return Examiner(exam, ridge, **{name: state[name] for name in OWN}, measured=names)


def how_telling(exam: Exam, zoos: dict[str, Zoo], rows: dict[str, Rows]) -> Float[Tensor, " b"]:
    """Return of every drawn input how agreeing with the consensus on it goes with test accuracy: their correlation."""
    label = exam.consensus[0].argmax(-1)
    right = torch.cat([asker(zoos[n].networks(r))(exam.inputs[0]).argmax(-1) == label for n, r in rows.items()])
    skill = torch.cat([torch.from_numpy(zoos[name].column("test_acc"))[index] for name, index in rows.items()])
    both = torch.cat([right.T.double(), skill[None]])[:, ~skill.isnan()]
    return torch.nan_to_num(torch.corrcoef(both)[-1, :-1])  # of an input on which all agree there is none
