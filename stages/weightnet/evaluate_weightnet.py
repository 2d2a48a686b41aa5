"""Score all predictors on runs that they have not seen, beside hyper-parameters, a few labelled images and plain statistics.

Reads   models/build_zoo/<dataset>-<architecture>/, models/train_weightnet/<dataset>-<variant>/
Writes  reports/evaluate_weightnet/<dataset>/scores.csv      a row for each predictor, task, split, architecture and property
        reports/evaluate_weightnet/<dataset>/summary.json    means and spread over splits and over architectures held out;
                                                             how often intervals hold; how much relabelling neurons changes
        reports/evaluate_weightnet/<dataset>/metrics.json    the headlines of it, for `dvc metrics`
        reports/evaluate_weightnet/<dataset>/*.png, vector/*.svg
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import r2_score

from stages.common.files import Cell, load_table, remedy, require, save_csv, save_json
from stages.common.metrics import headline_metrics, mean_std
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, StageParams, lookup, parse_arguments, run
from stages.weightnet import pictures
from stages.weightnet.predictors.ensemble import Ensemble, load_predictors
from stages.weightnet.predictors.examiner import Examiner
from stages.weightnet.predictors.splits import ALL, HELD_OUT, rows_of
from stages.weightnet.predictors.weightnet import attention_maps
from stages.weightnet.tracing.program import run_stack
from stages.weightnet.tracing.symmetry import permute, random_permutations
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import REFERENCES
from stages.weightnet.zoo.reading import OWN, Zoo, load_zoo, own_zoo

PREDICTORS = Path("models/train_weightnet")
REPORTS = Path("reports/evaluate_weightnet")

HEADLINES = {  # what `dvc metrics` shows: Kendall's tau of test accuracy, and the part of values inside 90 % intervals
    "tau_exam": "scores/exam/tau",
    "tau_weightnet": "scores/weightnet/tau",
    "tau_statistics": "scores/stats_gbm/tau",
    "tau_hyperparameters": "scores/hyperparameters/tau",
    "tau_32_labelled_images": "scores/labelled_32/tau",
    "tau_held_out_exam": "held_out/mean/exam",
    "tau_held_out_32_labelled_images": "held_out/mean/labelled_32",
    "coverage_exam": "coverage/exam/test_acc",
}
SHOWN = ("stats_gbm", "weightnet", "exam")  # in pictures and in the last line, if they were trained
KEPT = ("weightnet", "exam")  # whose predictions of relabelled networks and whose intervals are looked at
DRAWING = "exam_drawing_"  # how other drawings of the exam are called

FEWEST = 3  # networks of which a rank correlation says anything

Rows = list[dict[str, Any]]
Spread = dict[str, float]  # mean and spread


class Params(StageParams):
    """Parameters of one data set's comparison."""

    seed: NonNegativeInt
    networks: PositiveInt  # whose neurons are relabelled


@dataclass(frozen=True)
class Table:
    """What all predictors predict, a row for each predictor, task, split, part and network."""

    columns: dict[str, np.ndarray]

    def where(self, **values: Cell) -> "Table":
        """Return the rows whose columns have these values."""
        chosen = np.logical_and.reduce([self.columns[name] == value for name, value in values.items()])
        return Table({name: column[chosen] for name, column in self.columns.items()})

    def groups(self, *names: str) -> Iterator["Table"]:
        """Give the rows that have the same values in some columns, in the order of those."""
        keys = list(zip(*(self.columns[name].tolist() for name in names), strict=True))
        places: dict[tuple[Cell, ...], list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        for key in sorted(places):
            yield Table({name: column[places[key]] for name, column in self.columns.items()})

    @property
    def measured(self) -> list[str]:
        """The names of the properties."""
        return [name for name in self.columns if f"{name}_low" in self.columns]

    def values(self, ending: str = "") -> Float[np.ndarray, "n k"]:
        """Return the predicted properties, or one end of their intervals."""
        return np.stack([self.columns[name + ending] for name in self.measured], 1)

    def first(self, name: str) -> Any:
        """Return the value of the first row."""
        return self.columns[name][0].item()


def load_predictions(dataset: str) -> Table:
    """Return the predictions of all families of params.yaml that are there; InputError if none is."""
    paths = [
        PREDICTORS / f"{dataset}-{family}" / "predictions.parquet" for family in lookup("train_weightnet.variants")
    ]
    found = [load_table(path) for path in paths if path.is_file()] or [load_table(require(paths[0]))]
    some = [table for table in found if table]  # of a family whose members are all left out there is none
    return Table({name: np.array([value for table in some for value in table[name]]) for name in some[0]})


def find_zoos(dataset: str, table: Table) -> tuple[str, dict[str, Zoo]]:
    """Return the main architecture, whose task is called as it is, and the zoos of all; InputError if they have changed since."""
    names = sorted(set(table.columns["architecture"].tolist()))
    (main,) = (set(names) & set(table.columns["task"].tolist())) or {ALL}  # of a zoo of one's own: all together
    zoos = {name: load_zoo(dataset, name) for name in names}
    for name, zoo in zoos.items():
        if (table.where(architecture=name).columns["row"] >= len(zoo)).any():
            path = PREDICTORS / f"{dataset}-{table.first('predictor')}" / "predictions.parquet"
            raise InputError(f"{path} is of another zoo of {name}{remedy(path, '-f ')}")
    return main, zoos


def score(truth: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Return Kendall's tau, Spearman's rho and R² of predictions; where either is constant, tau and rho are 0."""
    varied = predicted.std() > 0 and truth.std() > 0
    values = {
        "tau": kendalltau(truth, predicted).statistic,
        "rho": spearmanr(truth, predicted).statistic if varied else 0.0,
        "r2": r2_score(truth, predicted),
    }
    return {name: 0.0 if np.isnan(value) else float(value) for name, value in values.items()}


def measured_of(group: Table, zoos: dict[str, Zoo]) -> Float[np.ndarray, "n k"]:
    """Return what was measured of the networks of some rows, of one architecture or of several."""
    truth = np.empty((len(group.columns["row"]), len(group.measured)), np.float32)
    for name in set(group.columns["architecture"].tolist()):
        here = group.columns["architecture"] == name
        truth[here] = zoos[name].properties(torch.from_numpy(group.columns["row"][here])).numpy()
    return truth


def score_predictions(table: Table, zoos: dict[str, Zoo], together: bool) -> Rows:
    """Return a row of scores for each predictor, task, split, architecture and property, and for the references.

    together: networks of all architectures are one row, as of a zoo of one's own, which has few of each.
    """
    rows: Rows = []
    seen = set()
    keys = ("predictor", "task", "split", *(() if together else ("architecture",)))
    for group in table.where(part="test").groups(*keys):
        who = {name: group.first(name) for name in ("task", "split", "architecture")}
        who |= {"architecture": ALL} if together and who["task"] == ALL else {}
        truth, predicted = measured_of(group, zoos), group.values().astype(np.float32)
        for k, name in enumerate(group.measured):
            known = ~np.isnan(truth[:, k] + predicted[:, k])
            if known.sum() >= FEWEST:
                scores = score(truth[known, k], predicted[known, k])
                rows.append({"predictor": group.first("predictor"), **who, "property": name, **scores})
        if tuple(who.values()) not in seen and not together:
            seen.add(tuple(who.values()))
            zoo, where = zoos[who["architecture"]], group.columns["row"]
            for reference in REFERENCES:
                scores = score(truth[:, 0], zoo.column(reference)[where])
                rows.append({"predictor": reference, **who, "property": "test_acc", **scores})
    return rows


def summarise(rows: Rows) -> dict[str, dict[str, dict[str, Spread]]]:
    """Return mean and spread of some rows: property, predictor, score."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        cell = table.setdefault(row["property"], {}).setdefault(row["predictor"], {})
        for name in ("tau", "r2") if row["property"] == "test_acc" else ("tau",):
            cell.setdefault(name, []).append(row[name])
    return {
        name: {who: {score: mean_std(values) for score, values in scores.items()} for who, scores in found.items()}
        for name, found in table.items()
    }


def taus_of(rows: Rows) -> dict[str, Spread]:
    """Return tau of the test accuracy: mean and spread over the rows of each predictor."""
    found = summarise([row for row in rows if row["property"] == "test_acc"])
    return {who: scores["tau"] for who, scores in found["test_acc"].items()} if found else {}


def by_architecture(rows: Rows) -> dict[str, dict[str, Spread]]:
    """Return tau of the test accuracy for each architecture and predictor, and its mean and spread over architectures."""
    names = dict.fromkeys(row["architecture"] for row in rows)
    found = {name: taus_of([row for row in rows if row["architecture"] == name]) for name in names}
    return found | {"mean": taus_of(rows)}


def learning_curve(rows: Rows, learned: dict[tuple[str, str], int]) -> dict[str, dict[str, Spread]]:
    """Return tau of the test accuracy over the number of networks learned from, on the first split: predictor, number.

    learned: that number, for each predictor and task; of references, which learn nothing, there is none.
    """
    curve: dict[str, dict[str, Spread]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        for who, tau in taus_of([row for row in rows if row["task"] == task and row["split"] == 0]).items():
            if (who, task) in learned:
                curve.setdefault(who, {})[str(learned[who, task])] = tau
    return {
        who: dict(sorted(points.items(), key=lambda p: int(p[0]))) for who, points in curve.items() if len(points) > 1
    }


def one_sided(networks: Networks, random: torch.Generator) -> Networks:
    """Return the networks with the rows of their second weight tensor in another order, and nothing else: other functions."""
    edge = networks.symmetry.edges[1]
    weight = networks.weights[edge.tensor]
    order = torch.randperm(weight.shape[1], generator=random)
    return replace(networks, weights=networks.weights | {edge.tensor: weight[:, order]})


def kept_predictors(dataset: str, zoo: Zoo) -> dict[str, Ensemble | Examiner]:
    """Return the predictors that were kept, of those that are looked at."""
    paths = [PREDICTORS / f"{dataset}-{family}" / "predictors.pt" for family in KEPT]
    example = zoo.networks(torch.arange(2))
    return {who: kept for path in paths if path.is_file() for who, kept in load_predictors(path, example).items()}


def coverage(table: Table, zoos: dict[str, Zoo], tasks: Callable[[str], bool]) -> dict[str, dict[str, float]]:
    """Return the share of unseen networks whose properties lie in the intervals of each kept predictor, over some tasks."""
    found: dict[str, list[np.ndarray]] = {}
    for group in table.where(part="test").groups("predictor", "task", "architecture"):
        if group.first("predictor") in KEPT and tasks(group.first("task")):
            truth = zoos[group.first("architecture")].properties(torch.from_numpy(group.columns["row"])).numpy()
            inside = ((group.values("_low") <= truth) & (truth <= group.values("_high"))).astype(float)
            inside[np.isnan(truth)] = np.nan
            found.setdefault(group.first("predictor"), []).append(inside)
    return {
        who: dict(zip(table.measured, np.nanmean(np.concatenate(rows), 0).tolist(), strict=True))
        for who, rows in found.items()
    }


def over_drawings(rows: Rows) -> dict[str, float]:
    """Return mean and spread, over drawings of the exam, of tau of the test accuracy on one split; nothing if there is no exam."""
    taus = [found["mean"] for who, found in taus_of(rows).items() if who == "exam" or who.startswith(DRAWING)]
    return mean_std(taus) if taus else {}


def relabelling(
    kept: dict[str, Ensemble | Examiner], zoos: dict[str, Zoo], count: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return by how much relabelling neurons of `count` trained networks changes their outputs, and predictions of test accuracy.

    In float64 and relative: outputs to their largest, predictions to their spread over networks. one_sided: what a relabelling
    that is none (one layer's rows alone) changes.
    """
    random = generator(seed, "relabelling")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for architecture, zoo in zoos.items():
        if len(zoo.symmetry.edges) < 2:  # nothing that one side of could be moved
            continue
        final = rows_of(zoo, zoo.run, ["final"])[:count]
        orders = random_permutations(zoo.symmetry, random)
        images = torch.randn(16, *zoo.program.input_shape, generator=random).double()
        answers: dict[str, list[torch.Tensor]] = {name: [] for name in ("function", *kept)}
        for rows in final.split(zoo.at_a_time(count)):
            found = zoo.networks(rows)
            networks = replace(found, weights={name: tensor.double() for name, tensor in found.weights.items()})
            relabelled = replace(networks, weights=permute(networks.weights, zoo.symmetry, orders))
            three = (networks, relabelled, one_sided(networks, random))
            outputs = torch.stack([run_stack(n.program, n.weights, images, n.tanh) for n in three])
            answers["function"].append(outputs / (outputs[0].abs().amax((1, 2), keepdim=True) + 1e-12))
            for name, predictor in kept.items():
                answers[name].append(torch.stack([predictor.standardised(n)[:, :1, None] for n in three]))
        table[architecture] = {}
        for name, parts in answers.items():
            values = torch.cat(parts, 1)  # [3, networks, ...]
            moved = (values - values[0]).abs().amax((2, 3)) / (1.0 if name == "function" else values[0].std())
            table[architecture][name] = {"relabelled": moved[1].max().item(), "one_sided": moved[2].median().item()}
    return table


def extremes(kept: Ensemble, zoo: Zoo) -> dict[str, list[dict[str, Float[np.ndarray, "s s"]]]]:
    """Return WeightNet's attention, in every round, to the most and the least accurate of the final networks."""
    final = rows_of(zoo, zoo.run, ["final"])
    truth = zoo.properties(final)[:, 0]
    chosen = final[torch.stack([truth.argmax(), truth.argmin()])]
    maps = attention_maps(kept.models[0].eval().float().reader, zoo.networks(chosen))
    labels = ("most accurate", "least accurate")
    return {label: [{g: x[i].numpy() for g, x in layers.items()} for layers in maps] for i, label in enumerate(labels)}


def draw_pictures(
    folder: Path, table: Table, zoos: dict[str, Zoo], main: str, kept: dict[str, Ensemble | Examiner]
) -> None:
    """Draw predicted against measured properties, and what the exam and WeightNet look at, if they were trained."""
    shown = {}
    for name in SHOWN:
        rows = table.where(predictor=name, task=main, split=0, part="test")
        if len(rows.columns["row"]):
            shown[name] = (rows.values(), measured_of(rows, zoos))
    pictures.draw_predictions(folder / "predictions.png", shown, table.measured)
    exam, weightnet = kept.get("exam"), kept.get("weightnet")
    if isinstance(exam, Examiner):
        labels = exam.exam.consensus[0].argmax(-1).numpy()
        pictures.draw_exam(folder / "exam.png", exam.exam.inputs[0].numpy(), labels, exam.telling.numpy())
    else:
        pictures.draw_nothing(folder / "exam.png", "exam")
    if isinstance(weightnet, Ensemble) and weightnet.models[0].kind == "weightnet" and main in zoos:
        pictures.draw_attention(folder / "attention.png", extremes(weightnet, zoos[main]))
    else:
        pictures.draw_nothing(folder / "attention.png", "weightnet")


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of build_zoo.datasets").dataset
    own = own_zoo(dataset)
    params = Params.load("evaluate_weightnet", OWN if own else dataset)
    pin_threads()
    table = load_predictions(dataset)
    main_name, zoos = find_zoos(dataset, table)
    rows = score_predictions(table, zoos, together=bool(own))
    scores = summarise([row for row in rows if row["task"] == main_name and not row["predictor"].startswith(DRAWING)])
    learned = dict(
        zip(
            zip(table.columns["predictor"], table.columns["task"], strict=True),
            table.columns["learned"].tolist(),
            strict=True,
        )
    )
    curve = learning_curve(
        [row for row in rows if row["task"] == main_name or row["task"].startswith(f"{main_name}_")], learned
    )
    kept = kept_predictors(dataset, zoos.get(main_name) or next(iter(zoos.values())))
    folder = REPORTS / dataset
    save_csv(folder / "scores.csv", rows)
    summary = {
        "scores": {main_name: scores},
        "drawings": over_drawings([row for row in rows if row["task"] == main_name and row["split"] == 0]),
        "learning_curve": curve,
        "all_architectures": by_architecture([row for row in rows if row["task"] == ALL]),
        "held_out": by_architecture([row for row in rows if row["task"].startswith(HELD_OUT)]),
        "coverage": coverage(table, zoos, lambda task: task == ALL),
        "coverage_held_out": coverage(table, zoos, lambda task: task.startswith(HELD_OUT)),
        "relabelling": relabelling(kept, zoos, params.networks, params.seed),
    }
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary | {"scores": scores["test_acc"]}, HEADLINES))
    draw_pictures(folder, table, zoos, main_name, kept)
    pictures.draw_scores(folder / "scores.png", scores["test_acc"])
    labelled = {name: scores["test_acc"][name]["tau"]["mean"] for name in REFERENCES[:1] if name in scores["test_acc"]}
    pictures.draw_learning_curve(folder / "learning_curve.png", curve, labelled)
    taus = [f"{name} {scores['test_acc'][name]['tau']['mean']:.3f}" for name in SHOWN if name in scores["test_acc"]]
    print(f"{dataset}: Kendall's tau of test accuracy, {main_name}: {', '.join(taus)}")


if __name__ == "__main__":
    run(main)
