"""The report's section on predicted properties of networks."""

from stages.common.files import Summary, load_json
from stages.common.report import REPORTS, Cell, Detail, Row, Section, Table, decimal, pictures, row, short
from stages.weightnet.captions import ABLATIONS, BASELINES, PREDICTORS, predictor, property_label

EVALUATED = REPORTS / "evaluate_weightnet"
ZOO_PICTURE = {
    "zoo": (
        "What was measured of the zoo's final networks: how test accuracy is spread, and each other property against it.",
        "A histogram of test accuracies from chance to nearly all right, and six scatter plots of other properties against it.",
    )
}
PICTURES = {
    "scores": (
        "Kendall's tau between predicted and measured test accuracy, unseen runs; bars: standard deviation over splits. Grey: what "
        "sees hyper-parameters or images, or only looks up the nearest network.",
        "Horizontal bars, best above: 128 labelled images and the exam, then 32 labelled images, probes, statistics, then flat weights.",
    ),
    "learning_curve": (
        "The same over the number of networks learned from (the first split alone: no spread). Dashed: 32 labelled images.",
        "Rising lines of the predictors: the exam far above, then probes, boosting below, WeightNet rising most.",
    ),
    "predictions": (
        "Predicted against measured properties of unseen runs (first split); on the line they are equal.",
        "Scatter plots, a row a predictor, a column a property: the exam's points lie closest to the diagonal.",
    ),
    "exam": (
        "Inputs of the exam that tell most and least of a network's accuracy: what the better networks take each for, and how agreeing "
        "with them goes with accuracy (correlation).",
        "Rows of small grey pictures, some like blurred digits, some like noise, each with a class and a correlation.",
    ),
    "attention": (
        "Where WeightNet's neurons look, in the most and in the least accurate network; 1 if attention were even.",
        "Red and blue squares, one a layer and round.",
    ),
}


def weightnet_section(dataset: str) -> Section:
    """Return the section of predicted properties of one data set's zoo."""
    summary = load_json(EVALUATED / dataset / "summary.json")
    ((main, scores),) = summary["scores"].items()
    zoo = REPORTS / "build_zoo" / f"{dataset}-{main}"
    runs = load_json(zoo / "summary.json")["runs"]
    of = f"n = {scores['test_acc']['weightnet']['tau']['n']} splits of {runs} runs of {main}, means ± standard deviations"
    shown, curve, predictions, exam, attention = pictures(EVALUATED / dataset, PICTURES)
    answer, baseline = verdict(scores, runs)
    return Section(
        key="weightnet",
        title="How good is it?",
        data=f"{runs} small networks trained on {dataset}, and {len(summary['relabelling']) - 1} other zoos",
        answer=answer,
        baseline=baseline,
        table=headline(summary, scores, of),
        picture=shown,
        details=[
            Detail("Every property", [property_table(scores, of)], [predictions]),
            Detail("The exam", [property_table(of_exam(scores), of)], [exam]),
            Detail("More networks to learn from", [curve_table(summary["learning_curve"])], [curve]),
            Detail("Other architectures", architecture_tables(summary), pictures(zoo, ZOO_PICTURE)),
            Detail(
                "Intervals, and neurons relabelled", [interval_table(summary), relabelled_table(summary)], [attention]
            ),
        ],
    )


def verdict(scores: Summary, runs: int) -> tuple[str, str]:
    """Return what was found, and the baselines."""
    taus = {name: short(found["tau"]["mean"]) for name, found in scores["test_acc"].items()}
    return (
        f"Unseen networks are put in order of their accuracy from their answers to made-up inputs, an exam: Kendall's tau {taus['exam']} "
        f"with the true order ({runs} runs)",
        f"guessing has 0, boosting on statistics of the weights {taus['stats_gbm']}, on hyper-parameters alone "
        f"{taus['hyperparameters']}, 32 labelled images {taus['labelled_32']}",
    )


def headline(summary: Summary, scores: Summary, of: str) -> Table:
    """Kendall's tau of some properties, and of accuracy on unseen architectures, best first."""
    properties, unseen = ("test_acc", "fgsm_acc", "calibration_error"), summary["held_out"]["mean"]
    order = sorted(scores["test_acc"], key=lambda name: -scores["test_acc"][name]["tau"]["mean"])
    names = [name for name in order if not name.startswith(ABLATIONS)]
    return Table(
        f"Kendall's tau between predicted and measured values of unseen runs: 1 is the right order, 0 guessing. {of}; "
        "last column: one architecture is left out and predicted from the others, mean ± standard deviation over architectures.",
        ["predictor", "reads", *(property_label(kind) for kind in properties), "test accuracy, unseen architectures"],
        [
            row(
                predictor(name),
                PREDICTORS.get(name, ("", ""))[1],
                *(tau(scores[kind], name) for kind in properties),
                decimal(unseen[name]) if name in unseen else "",
                baseline=name in BASELINES,
            )
            for name in names
        ],
        ["", "", "high", "high", "high", "high"],
    )


def tau(found: Summary, name: str) -> Cell:
    """Return a predictor's tau of one property, if it has one."""
    return decimal(found[name]["tau"]) if name in found else Cell("")


def property_table(scores: Summary, of: str) -> Table:
    """Kendall's tau of every property, and R² of accuracy."""
    order = sorted(scores["test_acc"], key=lambda name: -scores["test_acc"][name]["tau"]["mean"])
    rows = [
        row(
            predictor(name),
            decimal(scores["test_acc"][name]["r2"]) if name in scores["gap"] else "",
            *(tau(found, name) for found in scores.values()),
            baseline=name in BASELINES,
        )
        for name in order
    ]
    header = ["predictor", "R² of test accuracy", *(property_label(kind) for kind in scores)]
    return Table(
        f"R² of test accuracy, then Kendall's tau of every property. {of}.",
        header,
        rows,
        ["", *["high"] * (1 + len(scores))],
    )


def of_exam(scores: Summary) -> Summary:
    """Return the scores of the exam, of its ablations and of what it is joined with."""
    return {
        kind: {name: found for name, found in of_kind.items() if name.startswith("exam")}
        for kind, of_kind in scores.items()
    }


def curve_table(curve: Summary) -> Table:
    """Kendall's tau of test accuracy over the number of networks learned from."""
    numbers = sorted({int(n) for points in curve.values() for n in points})
    rows = [
        row(predictor(who), *(decimal(p[str(n)]) if str(n) in p else "" for n in numbers)) for who, p in curve.items()
    ]
    splits = min(p["n"] for points in curve.values() for p in points.values())
    caption = f"Kendall's tau of test accuracy by the number of networks learned from, n = {splits} split{'s' if splits > 1 else ''}."
    return Table(caption, ["predictor", *(f"{n} networks" for n in numbers)], rows, ["", *["high"] * len(numbers)])


def architecture_tables(summary: Summary) -> list[Table]:
    """Kendall's tau of test accuracy over architectures, pooled: a single zoo of a few networks says little."""
    captions = {
        "held_out": "Each architecture left out and predicted from the others",
        "all_architectures": "A fifth of each architecture's runs, predicted by what learned from all",
    }
    tables = []
    for key, caption in captions.items():
        found = summary[key]
        if not found["mean"]:
            continue
        names = sorted(found["mean"], key=lambda name: -found["mean"][name]["mean"])
        others = {name: taus for name, taus in found.items() if name != "mean"}
        rows = [
            row(
                predictor(who),
                decimal(found["mean"][who]),
                *(decimal(f(taus[who]["mean"] for taus in others.values())) for f in (min, max)),
                baseline=who in BASELINES,
            )
            for who in names
        ]
        of = f"n = {len(others)} architectures (a single one has few networks, and no row of its own)"
        header = ["predictor", "mean ± standard deviation", "the worst", "the best"]
        tables.append(
            Table(f"{caption}: Kendall's tau of test accuracy over {of}.", header, rows, ["", "high", "", ""])
        )
    return tables


def interval_table(summary: Summary) -> Table:
    """How often intervals for 90 % of networks hold."""
    rows = [
        row(f"{predictor(who)}, {of}", *(f"{fraction:.0%}" for fraction in fractions.values()))
        for key, of in (("coverage", "unseen runs"), ("coverage_held_out", "unseen architectures"))
        for who, fractions in summary[key].items()
    ]
    header = ["predictor", *(property_label(kind) for kind in next(iter(summary["coverage"].values())))]
    return Table("Fraction of unseen networks inside intervals for 90 % (n = 1 split).", header, rows)


def relabelled_table(summary: Summary) -> Table:
    """What relabelling hidden neurons changes."""
    what = {"function": "the network's outputs"}
    rows = [
        Row(
            [
                Cell(name),
                Cell(what.get(of, predictor(of))),
                tiny(moved["relabelled"]),
                Cell(f"{moved['one_sided']:.2g}"),
            ]
        )
        for name, found in summary["relabelling"].items()
        for of, moved in found.items()
    ]
    caption = (
        "What relabelling hidden neurons changes, in float64, the most of the networks tried: outputs over their size, predictions over "
        "their spread. Last column, for comparison: one layer's rows alone, which makes another network (median)."
    )
    return Table(caption, ["architecture", "of", "relabelled", "one layer's rows alone"], rows)


def tiny(x: float) -> Cell:
    """Write a rounding error: below 10⁻⁹ its power of ten is all there is to know."""
    return Cell("less than 10⁻¹²" if x < 1e-12 else f"{x:.0e}", x)
