"""The report's section on forecasts of weights."""

from typing import Any

from stages.common.files import load_csv, load_json
from stages.report.elements import REPORTS, Picture, Section, Table, interval

EVALUATED = REPORTS / "evaluate_forecaster"
COMPRESSED = REPORTS / "compress_trajectory"
NOWCAST = REPORTS / "nowcast_training"


def forecast_section(dataset: str) -> Section:
    """Return the section of the forecasts of weights of one data set."""
    ratios, losses = (load_csv(EVALUATED / dataset / f"{name}.csv") for name in ("ratios", "losses"))
    captions = {
        EVALUATED: {
            "horizons": "Error over that of keeping the last weights, with 95 % intervals over runs; what is not shown is worse.",
            "times": "The same against the snapshot from which is forecast.",
            "accumulation": "Errors of forecasts that are made from forecasts, step by step, beside direct ones, in the late half.",
            "losses": "Test loss of the forecast networks over that of the last one.",
            "accuracies": "Accuracy that the forecast networks gain over the last one.",
            "path": "A run that no forecaster has seen, in the plane of its two main directions, and the transformer's forecasts.",
        },
        COMPRESSED: {
            "components": "What principal components hold: differences between runs, and little of where a run goes next."
        },
        NOWCAST: {"losses": "Test loss while training, with nowcasting and without; what nowcasting costs is charged."},
    }
    return Section(
        title=f"Forecast: {dataset}",
        question="Where will training go next? Forecasts of a network's weights from its past, and their use while training.",
        tables=[*ratio_tables(ratios), *loss_tables(losses), span_table(dataset), nowcast_table(dataset)],
        pictures=[
            Picture(folder / dataset / f"{name}.png", caption)
            for folder, pictures in captions.items()
            for name, caption in pictures.items()
        ],
    )


def number(row: dict[str, str], prefix: str = "") -> dict[str, float]:
    """Return mean, low and high of a row; a single run has no interval."""
    names = {"mean": prefix or "mean", "low": f"{prefix}_low".strip("_"), "high": f"{prefix}_high".strip("_")}
    return {key: float(row[name]) for key, name in names.items() if row[name] not in ("", "nan")}


def ratio_tables(rows: list[dict[str, str]]) -> list[Table]:
    """Errors in weight space over persistence's: a table for each phase, late first."""
    regimes, horizons = ordered(rows, "regime"), ordered(rows, "h")
    tables = []
    for phase in ("late", "early"):
        cells = {(r["forecaster"], r["regime"], r["h"]): interval(number(r)) for r in rows if r["phase"] == phase}
        tables.append(
            Table(
                [f"forecaster, {phase} half", *(f"{regime}, h = {h}" for regime in regimes for h in horizons)],
                [
                    [f, *(cells[f, regime, h] for regime in regimes for h in horizons)]
                    for f in ordered(rows, "forecaster")
                ],
                "Squared error of the weights h snapshots ahead over that of keeping the last weights, on runs that no "
                "forecaster has seen: mean and 95 % interval over runs.",
            )
        )
    return tables


def loss_tables(rows: list[dict[str, str]]) -> list[Table]:
    """Loss of the forecast networks over the last one's, and the accuracy that they gain: a table for each phase."""
    horizons, main = ordered(rows, "h"), rows[0]["regime"]
    tables = []
    for phase in ("late", "early"):
        of_phase = [r for r in rows if r["phase"] == phase and r["regime"] == main]
        cells = {
            (
                r["forecaster"],
                r["h"],
            ): f"{interval(number(r, 'loss_ratio'))}, {float(r['acc_points']):+.1f}, {float(r['lower_loss']):.0%}"
            for r in of_phase
        }
        tables.append(
            Table(
                [f"forecast network, {phase} half", *(f"h = {h}" for h in horizons)],
                [[f, *(cells[f, h] for h in horizons)] for f in ordered(rows, "forecaster")],
                f"Regime {main}: test loss over that of the last network, points of accuracy gained, and how often the loss is lower.",
            )
        )
    return tables


def span_table(dataset: str) -> Table:
    """Share of the next movement in the span of principal components, beside a random subspace's."""
    summary: dict[str, Any] = load_json(COMPRESSED / dataset / "summary.json")
    shares, labels = summary["next_movement"], {"runs": "training runs", "past": "the run's own past"}
    ks = list(summary["random"])
    rows = [
        [f"{label}, h = {h}", *(interval(shares[span][h][k]) for k in ks)]
        for span, label in labels.items()
        for h in shares[span]
    ]
    rows.append(["any subspace of as many dimensions", *(f"{share:.4f}" for share in summary["random"].values())])
    return Table(
        ["components of", *(f"k = {k}" for k in ks)],
        rows,
        "Share of an unseen run's movement over h snapshots that lies in the span of k principal components known before; "
        f"{summary['between_share']:.0%} of the training snapshots' variance lies between runs.",
    )


def nowcast_table(dataset: str) -> Table:
    """Training with and without nowcasting, beside bare Adam."""
    summary: dict[str, Any] = load_json(NOWCAST / dataset / "summary.json")
    rows = [
        [
            name.replace("_", ", "),
            interval(result["mean_loss_ratio"]),
            interval(result["last_loss_ratio"]),
            interval(result["cost_to_target_ratio"]),
            f"{result['reached_target']:.0%}",
            f"{result['charged_steps']:.0f}",
        ]
        for name, result in summary["methods"].items()
    ]
    edge = {True: "inside its grid", False: "at the edge of its grid"}
    return Table(
        ["method", "loss over training", "last loss", "steps to target", "reached it", "steps charged"],
        rows,
        "Networks that no forecaster has seen, over bare Adam's seed by seed, at equal cost: mean and 95 % interval. "
        f"Tuned: {summary['tuned_learning_rate']:g}, {edge[summary['tuned_inside_grid']]}; cosine from {summary['cosine_peak']:g}, "
        f"{edge[summary['cosine_inside_grid']]}. The target is bare Adam's loss in its last tenth.",
    )


def ordered(rows: list[dict[str, str]], column: str) -> list[str]:
    """Return the values of a column, in the order in which they first appear."""
    return list(dict.fromkeys(row[column] for row in rows))
