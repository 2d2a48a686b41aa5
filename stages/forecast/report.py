"""The report's section on forecasts of weights."""

from stages.common.files import Summary, load_csv, load_json
from stages.common.report import (
    REPORTS,
    Cell,
    Detail,
    Row,
    Section,
    Table,
    decimal,
    in_order,
    percent,
    pictures,
    row,
)
from stages.forecast.captions import BASELINES, FORECASTERS, METHODS, REGIMES

EVALUATED = REPORTS / "evaluate_forecaster"
COMPRESSED = REPORTS / "compress_trajectory"
NOWCAST = REPORTS / "nowcast_training"
Rows = list[dict[str, str]]


def forecast_section(dataset: str) -> Section:
    """Return the section of the forecasts of weights of one data set."""
    ratios, losses = (load_csv(EVALUATED / dataset / f"{name}.csv") for name in ("ratios", "losses"))
    nowcast = load_json(NOWCAST / dataset / "summary.json")
    shown = pictures(EVALUATED / dataset, EVALUATED_PICTURES)
    answer, baseline = verdict(ratios)
    return Section(
        key="forecast",
        title="Where will training go next?",
        data=f"{trained(dataset)} LeNet-5 runs on {dataset}",
        answer=answer,
        baseline=baseline,
        table=headline(ratios, losses),
        picture=shown[0],
        details=[
            Detail("Every regime and horizon: errors of the weights", ratio_tables(ratios), shown[1:3]),
            Detail("The networks forecast: test loss and accuracy", loss_tables(losses), shown[3:5]),
            Detail("Training with forecasts", [nowcast_table(nowcast)], pictures(NOWCAST / dataset, NOWCAST_PICTURES)),
            Detail(
                "Principal components of trajectories",
                [span_table(dataset)],
                [*pictures(COMPRESSED / dataset, COMPRESSED_PICTURES), *shown[5:]],
            ),
        ],
    )


EVALUATED_PICTURES = {
    "horizons": (
        "Squared error of forecast weights over that of keeping the last weights (1 is that baseline, below is better), against how "
        "many snapshots ahead. Bars: 95 % intervals where there are three runs or more; a single run has none.",
        "A grid of line plots, a row each for the early and the late half of training, a column a regime: learned forecasters lie below "
        "1, means of snapshots above it.",
    ),
    "times": (
        "The same ratio against the snapshot that is forecast from, summed over the runs of the main regime.",
        "Line plots, one a horizon: ratios of learned forecasters over the time in training, below 1 nearly throughout.",
    ),
    "accumulation": (
        "The same ratio for forecasts made from forecasts, step by step (lines), beside direct ones (points), in the late half.",
        "One line a regime: the ratio against the number of steps rolled out, direct forecasts as points beside it.",
    ),
    "losses": (
        "Test loss of the forecast networks over that of the last network; below 1 the forecast network is better.",
        "A grid of line plots, early and late half, one column: ratios of test losses against the horizon by forecaster.",
    ),
    "accuracies": (
        "Test accuracy that forecast networks gain over the last one, in points.",
        "Two line plots, early and late half: gained points of accuracy against the horizon by forecaster.",
    ),
    "path": (
        "One run that no forecaster has seen (n = 1), in the plane of its two main directions, and the transformer's forecasts.",
        "A grey curved path of snapshots, from which short red lines branch off: forecasts that follow it for a while.",
    ),
}
COMPRESSED_PICTURES = {
    "components": (
        "Left: variance that k components of the training runs explain. Right: share of an unseen run's movement in their span.",
        "Two line plots over the number of components: variance between runs is soon explained, the next movement hardly ever.",
    )
}
NOWCAST_PICTURES = {
    "losses": (
        "Test loss (mean over seeds) while training, with forecasts and without; what they cost is charged as steps.",
        "Falling curves of test loss against steps: the methods with forecasts lie right of those without.",
    )
}


def trained(dataset: str) -> int:
    """Return how many runs were trained, to learn from, to choose with and to test on."""
    return sum(
        int(acc["n"])
        for acc in load_json(REPORTS / "train_lenet" / dataset / "summary.json")["final_test_acc"].values()
    )


def number(r: dict[str, str], prefix: str = "") -> dict[str, float]:
    """Return mean, low and high of a row; a single run has no interval."""
    names = {"mean": prefix or "mean", "low": f"{prefix}_low".strip("_"), "high": f"{prefix}_high".strip("_")}
    return {key: float(r[name]) for key, name in names.items() if r[name] not in ("", "nan")}


def select(rows: Rows, prefix: str = "", **columns: str) -> dict[str, Cell]:
    """Return the numbers of the rows whose columns have these values, by forecaster."""
    chosen = [r for r in rows if all(r[key] == value for key, value in columns.items())]
    return {r["forecaster"]: decimal(number(r, prefix)) for r in chosen}


def runs(rows: Rows, regime: str) -> str:
    """Return of how many runs numbers are."""
    n = next(int(r["n"]) for r in rows if r["regime"] == regime)
    return f"n = {n} unseen runs, [95 % interval]" if n > 1 else "n = 1: a single run, without a spread"


def verdict(ratios: Rows) -> tuple[str, str]:
    """Return what was found, and the baselines."""
    main, h = ratios[0]["regime"], middle(in_order(ratios, "h"))
    late = select(ratios, regime=main, phase="late", h=h)
    n = next(int(r["n"]) for r in ratios if r["regime"] == main)
    return (
        f"Weights {h} snapshots ahead are forecast with {late['transformer'].mean()} of the squared error of keeping the last weights "
        f"(transformer, {n} unseen runs)",
        f"keeping the last weights has 1, the mean of the last three snapshots {late['average_3'].mean()}, linear extrapolation "
        f"{late['linear'].mean()}",
    )


def middle(horizons: list[str]) -> str:
    """Return the horizon that sentences name: the second."""
    return horizons[min(1, len(horizons) - 1)]


def headline(ratios: Rows, losses: Rows) -> Table:
    """Errors in the late half of the main regime, and the loss of the forecast networks."""
    main, horizons = ratios[0]["regime"], in_order(ratios, "h")
    some = list(dict.fromkeys([horizons[0], middle(horizons), horizons[-1]]))
    errors = [select(ratios, regime=main, phase="late", h=h) for h in some]
    loss = select(losses, "loss_ratio", regime=main, phase="late", h=middle(horizons))
    order = [name for name in FORECASTERS if name in errors[0]]
    return Table(
        f"Squared error of weights 1 to {horizons[-1]} snapshots ahead, and test loss of the network so forecast, each over that of "
        f"keeping the last weights: less is better, 1 is the baseline. {REGIMES.get(main, main)}, late half, {runs(ratios, main)}.",
        ["forecaster", *(f"{h} ahead" for h in some), f"test loss, {middle(horizons)} ahead"],
        [
            Row([Cell(FORECASTERS[name]), *(by[name] for by in (*errors, loss))], baseline=name in BASELINES)
            for name in order
        ],
        ["", *["low"] * (len(some) + 1)],
    )


def ratio_tables(ratios: Rows) -> list[Table]:
    """Errors in weight space over persistence's: a table for each regime and phase, late first."""
    horizons = in_order(ratios, "h")
    tables = []
    for regime in in_order(ratios, "regime"):
        for phase in ("late", "early"):
            cells = [select(ratios, regime=regime, phase=phase, h=h) for h in horizons]
            tables.append(
                Table(
                    f"{REGIMES.get(regime, regime)}, {phase} half: squared error over that of keeping the last weights, "
                    f"{runs(ratios, regime)}.",
                    ["forecaster", *(f"{h} ahead" for h in horizons)],
                    [Row([Cell(FORECASTERS[f]), *(by[f] for by in cells)], f in BASELINES) for f in cells[0]],
                    ["", *["low"] * len(horizons)],
                )
            )
    return tables


def loss_tables(losses: Rows) -> list[Table]:
    """Loss of the forecast networks over the last one's, and the accuracy that they gain: a table for each phase."""
    main, h = losses[0]["regime"], middle(in_order(losses, "h"))
    tables = []
    for phase in ("late", "early"):
        of_phase = [r for r in losses if (r["phase"], r["regime"], r["h"]) == (phase, main, h)]
        tables.append(
            Table(
                f"The network {h} snapshots ahead, {REGIMES.get(main, main)}, {phase} half, {runs(losses, main)}.",
                ["forecaster", "test loss over the last one's", "accuracy gained, points", "origins with a lower loss"],
                [
                    row(
                        FORECASTERS[r["forecaster"]],
                        decimal(number(r, "loss_ratio")),
                        Cell(f"{float(r['acc_points']):+.1f}", float(r["acc_points"])),
                        percent(float(r["lower_loss"]), 0),
                        baseline=r["forecaster"] in BASELINES,
                    )
                    for r in of_phase
                ],
                ["", "low", "high", "high"],
            )
        )
    return tables


def span_table(dataset: str) -> Table:
    """Share of the next movement in the span of principal components, beside a random subspace's."""
    summary: Summary = load_json(COMPRESSED / dataset / "summary.json")
    shares, labels = summary["next_movement"], {"runs": "training runs", "past": "the run's own past"}
    ks = list(summary["random"])[-5:]
    rows = [
        row(f"{label}, {h} ahead", *(decimal(shares[span][h][k]) for k in ks))
        for span, label in labels.items()
        for h in shares[span]
    ]
    rows.append(row("any subspace", *(decimal(summary["random"][k], 4) for k in ks), baseline=True))
    n = int(next(iter(shares["runs"].values()))[ks[0]]["n"])
    return Table(
        "Share of an unseen run's movement that lies in the span of k principal components known before, "
        f"n = {n} runs, [95 % interval]; {summary['between_share']:.0%} of the training snapshots' variance lies between runs.",
        ["components of", *(f"k = {k}" for k in ks)],
        rows,
    )


def nowcast_table(summary: Summary) -> Table:
    """Training with and without nowcasting, beside bare Adam."""
    edge = {True: "inside its grid", False: "at the edge of its grid"}
    n = summary["methods"]["adam"]["mean_loss_ratio"]["n"]
    return Table(
        f"Unseen networks, over plain Adam's seed by seed at equal cost, n = {n} seeds, [95 % interval]. The target is plain Adam's "
        f"loss in its last tenth. Tuned learning rate {summary['tuned_learning_rate']:g}, {edge[summary['tuned_inside_grid']]}; "
        f"cosine from {summary['cosine_peak']:g}, {edge[summary['cosine_inside_grid']]}.",
        ["method", "loss over training", "last loss", "steps to target", "reached it", "steps charged"],
        [
            row(
                METHODS.get(name, name),
                decimal(result["mean_loss_ratio"]),
                decimal(result["last_loss_ratio"]),
                decimal(result["cost_to_target_ratio"]),
                percent(result["reached_target"], 0),
                f"{result['charged_steps']:.0f}",
                baseline=name == "adam",
            )
            for name, result in summary["methods"].items()
        ],
        ["", "low", "low", "low", "", ""],
    )
