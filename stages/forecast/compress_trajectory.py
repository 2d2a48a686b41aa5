"""Compress runs of one data set by PCA, and measure what the components hold: differences between runs, or their movement.

Reads   models/train_lenet/<dataset>/
Writes  reports/compress_trajectory/<dataset>/explained.csv   fraction of variance that k components of the training runs explain
        reports/compress_trajectory/<dataset>/span.csv        fraction of the next movement that lies in the span of k components
        reports/compress_trajectory/<dataset>/summary.json    both, at the numbers of components in params
        reports/compress_trajectory/<dataset>/components.png, vector/components.svg

Axes: n vectors, p weights, k components.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor
from tqdm import tqdm

from stages.common.files import Rows, Summary, save_csv, save_json
from stages.common.metrics import mean_interval
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import principal_components
from stages.forecast import pictures
from stages.forecast.runs import load_runs
from stages.forecast.trajectory import Trajectory, origins

REPORTS = Path("reports/compress_trajectory")

Explained = dict[str, dict[str, list[float]]]  # by kind of run and of variance, a value for each k


class Params(StageParams):
    """Parameters of one data set's compression."""

    components: Annotated[list[PositiveInt], Field(min_length=1)]  # numbers of them; cut at snapshots - 1
    horizons: Annotated[list[PositiveInt], Field(min_length=1)]  # snapshots ahead
    origin_every: PositiveInt  # snapshots between origins


def energy_fractions(
    vectors: Float[Tensor, "n p"], basis: Float[Tensor, "k p"], ks: Iterable[int]
) -> Float[Tensor, "n ks"]:
    """Return the fraction of each vector's squared length in the span of the first k rows of an orthonormal basis, for all ks."""
    energy = (vectors @ basis.T).square().cumsum(1) / vectors.square().sum(1, keepdim=True)
    return torch.stack([energy[:, min(k, len(basis)) - 1] for k in ks], 1)


def explained_variance_ratios(
    runs: list[Trajectory], mean: Float[Tensor, " p"], basis: Float[Tensor, "k p"], ks: Iterable[int]
) -> dict[str, list[float]]:
    """Return the fraction of two variances that k components explain, for all ks: of run means, and of snapshots around these."""
    means = torch.stack([r.weights.mean(0) for r in runs])
    deviations = {
        "between": means - mean,
        "within": torch.cat([r.weights - m for r, m in zip(runs, means, strict=True)]),
    }
    ratios = {}
    for name, vectors in deviations.items():
        energy = vectors.square().sum(1, keepdim=True)
        ratios[name] = (energy_fractions(vectors, basis, ks) * energy / energy.sum()).sum(0).tolist()
    return ratios


def between_fraction(runs: list[Trajectory]) -> float:
    """Return the fraction of all snapshots' variance that lies between the means of runs; the rest lies within runs."""
    everything = torch.cat([r.weights for r in runs])
    within = sum((r.weights - r.weights.mean(0)).square().sum() for r in runs)
    return (1 - within / (everything - everything.mean(0)).square().sum()).item()


def span_rows(
    name: str,
    trajectory: Trajectory,
    training_basis: Float[Tensor, "k p"],
    components: list[int],
    horizons: list[int],
    origin_every: int,
) -> Rows:
    """Return the fraction of the movement from t to t + h in two spans known at t, for every origin, horizon and k.

    `runs`: the components of training runs. `past`: those of the run's own snapshots up to t. `random`, the baseline: the
    expectation k / p of any subspace.
    """
    rows = []
    for t, phase in origins(len(trajectory), max(horizons), origin_every).items():
        movements = torch.stack([trajectory.weights[t + h] - trajectory.weights[t] for h in horizons])
        _, past_basis, _ = principal_components(trajectory.weights[: t + 1], max(components))
        for span, basis in (("runs", training_basis), ("past", past_basis)):
            for h, fractions in zip(horizons, energy_fractions(movements, basis, components), strict=True):
                rows += [
                    {"span": span, "run": name, "phase": phase, "t": t, "h": h, "k": k, "share": fraction.item()}
                    | {"random": min(k, len(basis)) / trajectory.layout.size}
                    for k, fraction in zip(components, fractions, strict=True)
                ]
    return rows


def span_table(rows: Rows) -> Summary:
    """Return the mean fraction, over origins and phases, with its interval over runs: by span, horizon and k."""
    cells: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for row in rows:
        cells.setdefault((row["span"], row["h"], row["k"]), {}).setdefault(row["run"], []).append(row["share"])
    table: Summary = {}
    for (span, h, k), fractions_by_run in cells.items():
        means = [sum(fractions) / len(fractions) for fractions in fractions_by_run.values()]
        table.setdefault(span, {}).setdefault(str(h), {})[str(k)] = mean_interval(means)
    return table


def explained_rows(explained: Explained, components: list[int]) -> Rows:
    """Return the variance that k components explain as rows, one for each kind of run and k."""
    return [
        {"runs": which, "k": k, "between": ratios["between"][i], "within": ratios["within"][i]}
        for which, ratios in explained.items()
        for i, k in enumerate(components)
    ]


def summarise(train: list[Trajectory], explained: Explained, rows: Rows, components: list[int]) -> Summary:
    """Return what components hold, with what a random subspace would beside it."""
    return {
        "between_share": between_fraction(train),
        "explained": {
            which: {part: dict(zip(map(str, components), values, strict=True)) for part, values in ratios.items()}
            for which, ratios in explained.items()
        },
        "next_movement": span_table(rows),
        "random": {str(k): k / train[0].layout.size for k in components},
    }


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("compress_trajectory", dataset)
    pin_threads()
    runs = load_runs(dataset)
    train, test = list(runs.train.values()), list(runs.test.values())
    mean, basis, _ = principal_components(torch.cat([r.weights for r in train]), max(params.components))
    explained = {
        "training": explained_variance_ratios(train, mean, basis, params.components),
        "unseen": explained_variance_ratios(test, mean, basis, params.components),
    }
    rows = []
    for name, trajectory in tqdm(runs.test.items(), desc="project", unit=" runs", disable=None):
        rows += span_rows(name, trajectory, basis, params.components, params.horizons, params.origin_every)
    curves, summary = explained_rows(explained, params.components), summarise(train, explained, rows, params.components)

    folder = REPORTS / dataset
    save_csv(folder / "explained.csv", curves)
    save_csv(folder / "span.csv", rows)
    save_json(folder / "summary.json", summary)
    pictures.draw_components(folder / "components.png", curves, summary["next_movement"], summary["random"])
    k, h = str(params.components[-1]), str(params.horizons[0])
    held = {span: summary["next_movement"][span][h][k]["mean"] for span in ("runs", "past")}
    print(
        f"{dataset}: {k} components of the training runs span {held['runs']:.1%} of unseen runs' next movement, "
        f"a run's own past {held['past']:.1%}"
    )


if __name__ == "__main__":
    run(main)
