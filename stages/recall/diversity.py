"""What a fleet's networks tell of data sets and recipes, apart from what the recipe tells: numbers of images, repeats, shifts.

Both a characteristic and what is read of networks are regressed on the recipe's numbers, over training fine-tunes; what the recipe leaves
of the one is then decoded from what it leaves of the other (Frisch and Waugh 1933), and measured on fine-tunes never seen. So 0 means:
once the recipe is known, the network adds nothing.

Axes: n fine-tunes, h of them held out, t of a characteristic, k numbers of a recipe, f columns, s resamples.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from stages.common.files import Summary
from stages.common.metrics import bootstrap_interval
from stages.common.stage import InputError
from stages.recall.auditor import BINARY, RANKS, RECALLED
from stages.recall.decoders import fit_decoder, mean_of_items, r_squared_interval, right_bits
from stages.recall.fleet_files import Fleet, Split
from stages.recall.measures import measure_of, score
from stages.recall.reading import READS, Reader, References, read_columns

Columns = dict[str, Float[np.ndarray, "n f"]]

COUNTS = ("log2_size", "log2_distinct")  # of images, of distinct ones: each is measured with the other known, too
SHIFT = "shift"  # a recipe's number that is asked for as characteristics are
LEAST = 20  # fine-tunes to learn from, and to measure on: of fewer nothing can be said
LONG_RUN = np.log(40 * 64)  # logarithm of the images that are shown: 40 steps of 64


@dataclass(frozen=True, kw_only=True)
class Described(Split):
    """Fine-tunes as decoders read them, with their recipes, and what there is to tell of them."""

    columns: Columns  # by what is read
    recipe: dict[str, Float[np.ndarray, " n"]]
    truth: dict[str, Float[np.ndarray, "n t"]]

    @classmethod
    def of(cls, fleet: Fleet, references: References) -> Self:
        """Return a fleet of whole networks as a reader of its training fine-tunes describes it."""
        learned, recipe = fleet.learned, fleet.truth["recipe"].astype(np.float64)
        reader = Reader.fit(fleet.change[learned], fleet.responses[learned], fleet.layout, references, RANKS["whole"])
        descriptions = reader.read(fleet.change, fleet.responses)
        numbers = dict(zip(fleet.metadata["recipe"], recipe.T, strict=True))
        truth = {key: fleet.truth[key] for key in (*RECALLED, *COUNTS) if key in fleet.truth} | {SHIFT: numbers[SHIFT]}
        return cls(
            fleet.test,
            columns={source: read_columns(descriptions, source) for source in READS},
            recipe=numbers,
            truth={key: values.reshape(len(values), -1).astype(np.float64) for key, values in truth.items()},
        )

    def only(self, rows: Bool[np.ndarray, " n"]) -> Self:
        """Return some of the fine-tunes."""
        parts = ({name: values[rows] for name, values in of.items()} for of in (self.columns, self.recipe, self.truth))
        columns, recipe, truth = parts
        return replace(self, test=self.test[rows], columns=columns, recipe=recipe, truth=truth)


def standard(numbers: Float[np.ndarray, "n k"], learned: np.ndarray) -> Float[np.ndarray, "n f"]:
    """Return those of the numbers that vary, scaled as a reader's descriptions are."""
    deviation = numbers[learned].std(0)
    varying = numbers[:, deviation > 0]
    return (varying - varying[learned].mean(0)) / (deviation[deviation > 0] * max(1, varying.shape[1]) ** 0.5)


def left_by(
    known: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n t"], learned: np.ndarray
) -> Float[np.ndarray, "n t"]:
    """Return what is left of y once it is regressed on what is known."""
    return y - fit_decoder(known[learned], y[learned]).predict(known)


def decode(
    columns: Columns, truth: dict[str, Float[np.ndarray, "n t"]], split: Split
) -> dict[str, Float[np.ndarray, "h t"]]:
    """Return what held-out fine-tunes are told to have of every characteristic, by the reading that leave-one-out errors prefer."""
    y = np.column_stack(list(truth.values()))
    fitted = {source: fit_decoder(x[split.learned], y[split.learned]) for source, x in columns.items()}
    ends = np.cumsum([values.shape[1] for values in truth.values()])
    told = {}
    for key, of in zip(truth, np.split(np.arange(y.shape[1]), ends[:-1]), strict=True):
        errors = {source: decoder.errors[of].mean() for source, decoder in fitted.items() if decoder.errors is not None}
        source = min(errors, key=errors.__getitem__)
        told[key] = fitted[source].predict(columns[source][split.held_out])[:, of]
    return told


def beyond(
    columns: Columns,
    known: Float[np.ndarray, "n k"],
    y: Float[np.ndarray, "n t"],
    split: Split,
    resamples: int,
) -> dict[str, float]:
    """Return R² of what `known` leaves of y, decoded from what it leaves of what is read; its trivial value is 0."""
    rest = left_by(known, y, split.learned)
    apart = {source: left_by(known, x, split.learned) for source, x in columns.items()}
    predicted = decode(apart, {"rest": rest}, split)["rest"]
    return r_squared_interval(predicted, rest[split.held_out], np.zeros(y.shape[1]), resamples)


def auroc(scores: Float[np.ndarray, "*s h"], positive: Float[np.ndarray, "*s h"]) -> Float[np.ndarray, "*s"]:
    """Return the chance that a positive has a higher score than a negative."""
    n = positive.sum(-1)
    return ((rankdata(scores, axis=-1) * positive).sum(-1) - n * (n + 1) / 2) / (n * (positive.shape[-1] - n))


def measured(
    key: str, predicted: Float[np.ndarray, "h t"], true: Float[np.ndarray, "h t"], mean: np.ndarray, resamples: int
) -> Summary:
    """Return the score of a characteristic with its interval, beside that of the mean of what was learned from."""
    measure = measure_of(key)
    if key in BINARY:
        interval = bootstrap_interval(mean_of_items, right_bits(predicted, true).mean(1), resamples=resamples)
    else:
        interval = r_squared_interval(predicted, true, mean, resamples)
    found: Summary = {measure: interval}
    if key in BINARY:
        found[f"{measure}_ignoring_the_network"] = score(key, np.broadcast_to(mean, true.shape), true, mean)
    if key == SHIFT and (true > 0).any() and (true == 0).any():
        shifted = (true[:, 0] > 0).astype(np.float64)
        found["auroc"] = bootstrap_interval(auroc, predicted[:, 0], shifted, resamples=resamples)
    return found


def tell(fleet: Described, resamples: int) -> Summary:
    """Return of every characteristic how well networks tell it, the recipe alone, and networks what the recipe does not tell."""
    summary: Summary = {"learned_from": len(fleet.learned), "measured_on": len(fleet.held_out)}
    told = decode(fleet.columns, fleet.truth, fleet)
    for key, y in fleet.truth.items():
        if not y[fleet.learned].std(0).any():
            continue
        others = np.column_stack([values for name, values in fleet.recipe.items() if name != key])
        recipe, true, mean = standard(others, fleet.learned), y[fleet.held_out], y[fleet.learned].mean(0)
        found = measured(key, told[key], true, mean, resamples)
        alone = fit_decoder(recipe[fleet.learned], y[fleet.learned]).predict(recipe[fleet.held_out])
        found[f"{measure_of(key)}_of_the_recipe_alone"] = score(key, alone, true, mean)
        found["r2_given_recipe"] = beyond(fleet.columns, recipe, y, fleet, resamples)
        for other in COUNTS if key in COUNTS else ():
            if other != key and other in fleet.truth:
                known = standard(np.column_stack([others, fleet.truth[other]]), fleet.learned)
                found[f"r2_given_recipe_and_{other}"] = beyond(fleet.columns, known, y, fleet, resamples)
        summary[key] = found
    return summary


def groups_of(recipe: dict[str, Float[np.ndarray, " n"]]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Return which fine-tunes are measured together: all; those that saw many images; those that might stop early, and those not."""
    steps = recipe.get("log steps kept", recipe["log steps"])
    groups = {"all": np.ones(len(steps), bool), "long_runs": steps + recipe["log batch"] > LONG_RUN}
    if "patience" in recipe:
        groups |= {"early_stopping": recipe["patience"] > 0, "to_the_end": recipe["patience"] == 0}
    return groups


def told_by(fleet: Fleet, references: References, resamples: int) -> dict[str, Summary]:
    """Return what a fleet of whole networks tells: of all, and of groups of it that are learned from and measured apart.

    InputError if it is too small.
    """
    if (fewest := min(len(fleet.learned), len(fleet.held_out))) < LEAST:
        raise InputError(
            f"a fleet of train_auditor.apart needs {LEAST} fine-tunes to learn from and {LEAST} to measure on, got {fewest}: set train "
            "and test of vary_recipes.fleets"
        )
    described = Described.of(fleet, references)
    groups = {name: described.only(rows) for name, rows in groups_of(described.recipe).items()}
    enough = {name: of for name, of in groups.items() if min(len(of.learned), len(of.held_out)) >= LEAST}
    return {name: tell(of, resamples) for name, of in enough.items()}
