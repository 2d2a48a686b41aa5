"""Score all predictors on runs that they have not seen, beside hyper-parameters, a few labelled images and plain statistics.

Reads   models/build_zoo/<dataset>-<architecture>/, models/train_weightnet/<dataset>-<variant>/
Writes  reports/evaluate_weightnet/<dataset>/scores.csv      a row for each predictor, task, split, architecture and property
        reports/evaluate_weightnet/<dataset>/summary.json    means and spread over splits; how much relabelling neurons changes
        reports/evaluate_weightnet/<dataset>/*.png
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import r2_score

from stages.common.artifacts import load_metadata, require, save_csv, save_json
from stages.common.command import InputError, parse_arguments, run
from stages.common.metrics import mean_std
from stages.common.params import StageParams
from stages.common.runtime import generator, pin_threads
from stages.weightnet import pictures
from stages.weightnet.predictors import Kept, attention_maps, load_predictors
from stages.weightnet.program import run_stack
from stages.weightnet.properties import PROPERTIES, REFERENCES
from stages.weightnet.symmetry import Networks, permute, random_permutations
from stages.weightnet.zoo import Zoo, load_zoo

PREDICTORS = Path("models/train_weightnet")
REPORTS = Path("reports/evaluate_weightnet")

SHOWN = ("stats_gbm", "weightnet", "hybrid")  # in pictures and in the last line, if they were trained
FAMILIES = ("weightnet", "probe", "hybrid", "baselines", "ablations")
ARCHITECTURES = ("cnn3", "flat", "residual")

Rows = list[dict[str, Any]]


class Params(StageParams):
    """Parameters of one data set's comparison."""

    seed: NonNegativeInt
    main_task: str  # the one that pictures show
    networks: PositiveInt  # whose neurons are relabelled


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


def summarise(rows: Rows, main_task: str) -> dict[str, Any]:
    """Return mean and spread over splits: task, architecture, property, predictor, score.

    Of the main task, tau of every property and R² of the test accuracy; of others, tau of the test accuracy.
    """
    table: dict[str, Any] = {}
    for row in rows:
        is_main, is_accuracy = row["task"] == main_task, row["property"] == "test_acc"
        if not (is_main or is_accuracy):
            continue
        cell = table
        for key in ("task", "architecture", "property", "predictor"):
            cell = cell.setdefault(row[key], {})
        for name in ("tau", "r2") if is_main and is_accuracy else ("tau",):
            cell.setdefault(name, []).append(row[name])
    return {
        task: {
            architecture: {
                name: {who: {s: mean_std(v) for s, v in scores.items()} for who, scores in found.items()}
                for name, found in properties.items()
            }
            for architecture, properties in architectures.items()
        }
        for task, architectures in table.items()
    }


def learning_curve(scores: dict[str, Any], architecture: str, learnt: dict[str, int]) -> dict[str, Any]:
    """Return tau of the test accuracy over the number of networks learnt from, of predictors that learnt from several numbers.

    learnt: that number, for <predictor>/<task>.
    """
    curve: dict[str, Any] = {}
    for task, found in scores.items():
        for who, score in found.get(architecture, {}).get("test_acc", {}).items():
            if f"{who}/{task}" in learnt:
                curve.setdefault(who, {})[str(learnt[f"{who}/{task}"])] = score["tau"]
    return {
        who: dict(sorted(points.items(), key=lambda p: int(p[0]))) for who, points in curve.items() if len(points) > 1
    }


def one_sided(networks: Networks, random: torch.Generator) -> Networks:
    """Return the networks with the rows of their second weight tensor in another order, and nothing else: other functions."""
    edge = networks.symmetry.edges[1]
    weight = networks.weights[edge.tensor]
    order = torch.randperm(weight.shape[1], generator=random)
    return Networks(
        networks.program, networks.symmetry, networks.weights | {edge.tensor: weight[:, order]}, networks.tanh
    )


def kept_predictors(dataset: str, zoo: Zoo) -> dict[str, Kept]:
    """Return the predictors that were kept."""
    paths = (PREDICTORS / f"{dataset}-{family}" / "predictors.pt" for family in ("weightnet", "hybrid"))
    return {who: kept for path in paths for who, kept in load_predictors(path, zoo.networks(torch.arange(2))).items()}


def relabelling(kept: dict[str, Kept], zoos: dict[str, Zoo], params: Params) -> dict[str, Any]:
    """Return by how much relabelling the neurons of trained networks changes their outputs, and predictions of test accuracy.

    In float64 and relative: outputs to their largest, predictions to their spread over networks. one_sided: what a relabelling
    that is none (one layer's rows alone) changes.
    """
    random = generator(params.seed, "relabelling")
    table: dict[str, Any] = {}
    for architecture, zoo in zoos.items():
        final = torch.tensor([i for i, name in enumerate(zoo.snapshot) if name == "final"])[: params.networks]
        found = zoo.networks(final)
        exact = {name: tensor.double() for name, tensor in found.weights.items()}
        networks = Networks(found.program, found.symmetry, exact, found.tanh)
        moved = permute(exact, found.symmetry, random_permutations(found.symmetry, random))
        relabelled = Networks(found.program, found.symmetry, moved, found.tanh)
        broken = one_sided(networks, random)
        images = torch.randn(16, *found.program.input_shape, generator=random).double()
        before, after, other = (run_stack(n.program, n.weights, images, n.tanh) for n in (networks, relabelled, broken))
        largest = before.abs().amax((1, 2)) + 1e-12
        cell = {
            "function": {
                "relabelled": ((after - before).abs().amax((1, 2)) / largest).max().item(),
                "one_sided": ((other - before).abs().amax((1, 2)) / largest).median().item(),
            }
        }
        for name, predictor in kept.items():
            values = [predictor.standardised(n)[:, 0] for n in (networks, relabelled, broken)]
            spread = values[0].std().item()
            cell[name] = {
                "relabelled": (values[1] - values[0]).abs().max().item() / spread,
                "one_sided": (values[2] - values[0]).abs().median().item() / spread,
            }
        table[architecture] = cell
    return table


def extremes(kept: Kept, zoo: Zoo) -> dict[str, list[dict[str, Float[np.ndarray, "s s"]]]]:
    """Return WeightNet's attention, in every round, to the most and the least accurate of the final networks."""
    final = torch.tensor([i for i, name in enumerate(zoo.snapshot) if name == "final"])
    truth = zoo.properties(final)[:, 0]
    chosen = final[torch.stack([truth.argmax(), truth.argmin()])]
    maps = attention_maps(kept.model.eval().float().readers[0], zoo.networks(chosen))
    labels = ("most accurate", "least accurate")
    return {label: [{g: x[i].numpy() for g, x in layers.items()} for layers in maps] for i, label in enumerate(labels)}


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of build_zoo.datasets").dataset
    params = Params.load("evaluate_weightnet", dataset)
    pin_threads()
    zoos = {architecture: load_zoo(dataset, architecture) for architecture in ARCHITECTURES}
    arrays: dict[str, torch.Tensor] = {}
    learnt: dict[str, int] = {}
    for family in FAMILIES:
        path = require(PREDICTORS / f"{dataset}-{family}" / "predictions.safetensors")
        arrays |= load_file(path)
        learnt |= load_metadata(path)["learnt"]
    rows = score_predictions(arrays, zoos)
    scores = summarise(rows, params.main_task)
    architecture, main_scores = next(iter(scores[params.main_task].items()))
    curve = learning_curve(scores, architecture, learnt)
    kept = kept_predictors(dataset, zoos[architecture])
    if "weightnet" not in kept:
        raise InputError("params.yaml: train_weightnet: weightnet is skipped or keeps no predictor, but is to be drawn")
    folder = REPORTS / dataset
    save_csv(folder / "scores.csv", rows)
    moved = relabelling(kept, zoos, params)
    save_json(folder / "summary.json", {"scores": scores, "learning_curve": curve, "relabelling": moved})
    first = {name: f"{name}/{params.main_task}/0/test/{architecture}/" for name in SHOWN}
    shown = {
        name: (arrays[key + "values"], zoos[architecture].properties(arrays[key + "rows"]))
        for name, key in first.items()
        if key + "values" in arrays
    }
    pictures.draw_predictions(
        folder / "predictions.png", {name: (p.numpy(), t.numpy()) for name, (p, t) in shown.items()}
    )
    pictures.draw_scores(folder / "scores.png", main_scores["test_acc"])
    pictures.draw_learning_curve(folder / "learning_curve.png", curve)
    pictures.draw_attention(folder / "attention.png", extremes(kept["weightnet"], zoos[architecture]))
    taus = [f"{name} {main_scores['test_acc'][name]['tau']['mean']:.3f}" for name in shown]
    print(f"{dataset}: Kendall's tau of test accuracy, {params.main_task}: {', '.join(taus)}")


if __name__ == "__main__":
    run(main)
