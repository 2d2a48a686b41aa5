"""Score all predictors on runs that they have not seen, beside hyper-parameters, a few labelled images and plain statistics.

Reads   models/build_zoo/<dataset>-<architecture>/, models/train_weightnet/<dataset>-<variant>/
Writes  reports/evaluate_weightnet/<dataset>/scores.csv      a row for each predictor, task, split, architecture and property
        reports/evaluate_weightnet/<dataset>/summary.json    means and spread over splits and over architectures held out;
                                                             how often intervals hold; how much relabelling neurons changes
        reports/evaluate_weightnet/<dataset>/metrics.json    the headlines of it, for `dvc metrics`
        reports/evaluate_weightnet/<dataset>/*.png
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import r2_score

from stages.common.files import load_metadata, remedy, require, save_csv, save_json
from stages.common.metrics import headline_metrics, mean_std
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.weightnet import pictures
from stages.weightnet.predictors.ensemble import Kept, load_predictors
from stages.weightnet.predictors.splits import ALL, HELD_OUT, rows_of
from stages.weightnet.predictors.weightnet import attention_maps
from stages.weightnet.tracing.program import run_stack
from stages.weightnet.tracing.symmetry import permute, random_permutations
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES, REFERENCES
from stages.weightnet.zoo.reading import Zoo, load_zoo

PREDICTORS = Path("models/train_weightnet")
REPORTS = Path("reports/evaluate_weightnet")

HEADLINES = {  # what `dvc metrics` shows: Kendall's tau of test accuracy, and the part of values inside 90 % intervals
    "tau_hybrid": "scores/hybrid/tau",
    "tau_weightnet": "scores/weightnet/tau",
    "tau_statistics": "scores/stats_gbm/tau",
    "tau_hyperparameters": "scores/hyperparameters_gbm/tau",
    "tau_32_labelled_images": "scores/labelled_32/tau",
    "tau_held_out_hybrid": "held_out/mean/hybrid",
    "tau_held_out_32_labelled_images": "held_out/mean/labelled_32",
    "coverage_hybrid": "coverage/hybrid/test_acc",
}
SHOWN = ("stats_gbm", "weightnet", "hybrid")  # in pictures and in the last line, if they were trained
FAMILIES = ("weightnet", "probe", "hybrid", "baselines", "ablations")

Rows = list[dict[str, Any]]


class Params(StageParams):
    """Parameters of one data set's comparison."""

    seed: NonNegativeInt
    networks: PositiveInt  # whose neurons are relabelled


def load_predictions(dataset: str) -> tuple[dict[str, torch.Tensor], dict[str, int], str, list[str]]:
    """Return the predictions of all families, how many networks each learnt from, the main architecture and all of them."""
    paths = [require(PREDICTORS / f"{dataset}-{family}" / "predictions.safetensors") for family in FAMILIES]
    arrays: dict[str, torch.Tensor] = {}
    learnt: dict[str, int] = {}
    found = [load_metadata(path) for path in paths]
    for path, metadata in zip(paths, found, strict=True):
        arrays |= load_file(path)
        learnt |= metadata["learnt"]
        if metadata["architectures"] != found[0]["architectures"] or metadata["main"] != found[0]["main"]:
            raise InputError(f"{path} and {paths[0]} have learned from different zoos{remedy(path, '-f ')}")
    return arrays, learnt, found[0]["main"], found[0]["architectures"]


def score(truth: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Return Kendall's tau, Spearman's rho and R² of predictions; of constant ones, tau and rho are 0."""
    values = {
        "tau": kendalltau(truth, predicted).statistic,
        "rho": spearmanr(truth, predicted).statistic if predicted.std() > 0 else 0.0,
        "r2": r2_score(truth, predicted),
    }
    return {name: 0.0 if np.isnan(value) else float(value) for name, value in values.items()}


def score_predictions(arrays: dict[str, torch.Tensor], zoos: dict[str, Zoo]) -> Rows:
    """Return a row of scores for each predictor, task, split, architecture and property, and for the references."""
    rows: Rows = []
    for key in sorted(key for key in arrays if key.endswith("/values")):
        predictor, task, split, part, architecture, _ = key.split("/")
        if part != "test":
            continue
        where = arrays[key.removesuffix("values") + "rows"]
        zoo = zoos[architecture]
        truth = zoo.properties(where).numpy()
        who = {"task": task, "split": int(split), "architecture": architecture}
        for k, name in enumerate(PROPERTIES):
            scores = score(truth[:, k], arrays[key][:, k].numpy())
            rows.append({"predictor": predictor, **who, "property": name, **scores})
        for reference in REFERENCES:
            found = {"predictor": reference, **who, "property": "test_acc"}
            if not any(row.items() >= found.items() for row in rows):
                rows.append(found | score(truth[:, 0], zoo.column(reference)[where]))
    return rows


def summarise(rows: Rows) -> dict[str, Any]:
    """Return mean and spread of some rows: property, predictor, score."""
    table: dict[str, Any] = {}
    for row in rows:
        cell = table.setdefault(row["property"], {}).setdefault(row["predictor"], {})
        for name in ("tau", "r2") if row["property"] == "test_acc" else ("tau",):
            cell.setdefault(name, []).append(row[name])
    return {
        name: {who: {score: mean_std(values) for score, values in scores.items()} for who, scores in found.items()}
        for name, found in table.items()
    }


def taus_of(rows: Rows) -> dict[str, Any]:
    """Return tau of the test accuracy: mean and spread over the rows of each predictor."""
    found = summarise([row for row in rows if row["property"] == "test_acc"])
    return {who: scores["tau"] for who, scores in found["test_acc"].items()} if found else {}


def by_architecture(rows: Rows) -> dict[str, Any]:
    """Return tau of the test accuracy for each architecture and predictor, and its mean and spread over architectures."""
    names = dict.fromkeys(row["architecture"] for row in rows)
    found = {name: taus_of([row for row in rows if row["architecture"] == name]) for name in names}
    return found | {"mean": taus_of(rows)}


def learning_curve(rows: Rows, learnt: dict[str, int]) -> dict[str, Any]:
    """Return tau of the test accuracy over the number of networks learnt from, on the first split: predictor, number.

    learnt: that number, for <predictor>/<task>; of references, which learn nothing, there is none.
    """
    curve: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        for who, tau in taus_of([row for row in rows if row["task"] == task and row["split"] == 0]).items():
            if f"{who}/{task}" in learnt:
                curve.setdefault(who, {})[str(learnt[f"{who}/{task}"])] = tau
    return {
        who: dict(sorted(points.items(), key=lambda p: int(p[0]))) for who, points in curve.items() if len(points) > 1
    }


def one_sided(networks: Networks, random: torch.Generator) -> Networks:
    """Return the networks with the rows of their second weight tensor in another order, and nothing else: other functions."""
    edge = networks.symmetry.edges[1]
    weight = networks.weights[edge.tensor]
    order = torch.randperm(weight.shape[1], generator=random)
    return replace(networks, weights=networks.weights | {edge.tensor: weight[:, order]})


def kept_predictors(dataset: str, zoo: Zoo) -> dict[str, Kept]:
    """Return the predictors that were kept."""
    paths = (PREDICTORS / f"{dataset}-{family}" / "predictors.pt" for family in ("weightnet", "hybrid"))
    return {who: kept for path in paths for who, kept in load_predictors(path, zoo.networks(torch.arange(2))).items()}


def coverage(kept: dict[str, Kept], arrays: dict[str, torch.Tensor], zoos: dict[str, Zoo]) -> dict[str, Any]:
    """Return the share of unseen runs, of all architectures, whose properties lie in the intervals of each kept predictor."""
    table = {}
    for who, predictor in kept.items():
        inside = []
        for name, zoo in zoos.items():
            for rows in arrays[f"{who}/{ALL}/0/test/{name}/rows"].split(zoo.at_a_time(64)):
                low, _, high = predictor.intervals(zoo.networks(rows))
                truth = zoo.properties(rows)
                inside.append((low <= truth) & (truth <= high))
        table[who] = dict(zip(PROPERTIES, torch.cat(inside).double().mean(0).tolist(), strict=True))
    return table


def relabelling(kept: dict[str, Kept], zoos: dict[str, Zoo], params: Params) -> dict[str, Any]:
    """Return by how much relabelling the neurons of trained networks changes their outputs, and predictions of test accuracy.

    In float64 and relative: outputs to their largest, predictions to their spread over networks. one_sided: what a relabelling
    that is none (one layer's rows alone) changes.
    """
    random = generator(params.seed, "relabelling")
    table: dict[str, Any] = {}
    for architecture, zoo in zoos.items():
        final = rows_of(zoo, zoo.run, ["final"])[: params.networks]
        orders = random_permutations(zoo.symmetry, random)
        images = torch.randn(16, *zoo.program.input_shape, generator=random).double()
        answers: dict[str, list[torch.Tensor]] = {name: [] for name in ("function", *kept)}
        for rows in final.split(zoo.at_a_time(params.networks)):
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


def extremes(kept: Kept, zoo: Zoo) -> dict[str, list[dict[str, Float[np.ndarray, "s s"]]]]:
    """Return WeightNet's attention, in every round, to the most and the least accurate of the final networks."""
    final = rows_of(zoo, zoo.run, ["final"])
    truth = zoo.properties(final)[:, 0]
    chosen = final[torch.stack([truth.argmax(), truth.argmin()])]
    maps = attention_maps(kept.models[0].eval().float().readers[0], zoo.networks(chosen))
    labels = ("most accurate", "least accurate")
    return {label: [{g: x[i].numpy() for g, x in layers.items()} for layers in maps] for i, label in enumerate(labels)}


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of build_zoo.datasets").dataset
    params = Params.load("evaluate_weightnet", dataset)
    pin_threads()
    arrays, learnt, main_name, architectures = load_predictions(dataset)
    zoos = {architecture: load_zoo(dataset, architecture) for architecture in architectures}
    rows = score_predictions(arrays, zoos)
    scores = summarise([row for row in rows if row["task"] == main_name])
    curve = learning_curve(
        [row for row in rows if row["task"] == main_name or row["task"].startswith(f"{main_name}_")], learnt
    )
    kept = kept_predictors(dataset, zoos[main_name])
    if "weightnet" not in kept:
        raise InputError("params.yaml: train_weightnet: weightnet is skipped or keeps no predictor, but is to be drawn")
    folder = REPORTS / dataset
    save_csv(folder / "scores.csv", rows)
    moved = relabelling(kept, zoos, params)
    summary = {
        "scores": {main_name: scores},
        "learning_curve": curve,
        "all_architectures": by_architecture([row for row in rows if row["task"] == ALL]),
        "held_out": by_architecture([row for row in rows if row["task"].startswith(HELD_OUT)]),
        "coverage": coverage(kept, arrays, zoos),
        "relabelling": moved,
    }
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary | {"scores": scores["test_acc"]}, HEADLINES))
    first = {name: f"{name}/{main_name}/0/test/{main_name}/" for name in SHOWN}
    shown = {
        name: (arrays[key + "values"], zoos[main_name].properties(arrays[key + "rows"]))
        for name, key in first.items()
        if key + "values" in arrays
    }
    pictures.draw_predictions(
        folder / "predictions.png", {name: (p.numpy(), t.numpy()) for name, (p, t) in shown.items()}
    )
    pictures.draw_scores(folder / "scores.png", scores["test_acc"])
    pictures.draw_learning_curve(folder / "learning_curve.png", curve)
    pictures.draw_attention(folder / "attention.png", extremes(kept["weightnet"], zoos[main_name]))
    taus = [f"{name} {scores['test_acc'][name]['tau']['mean']:.3f}" for name in shown]
    print(f"{dataset}: Kendall's tau of test accuracy, {main_name}: {', '.join(taus)}")


if __name__ == "__main__":
    run(main)
