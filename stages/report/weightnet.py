"""The report's section on predicted properties of networks."""

from stages.common.files import load_json
from stages.report.elements import REPORTS, Picture, Section, Table, decimal

EVALUATED = REPORTS / "evaluate_weightnet"


def weightnet_section(dataset: str) -> Section:
    """Return the section of predicted properties of one data set's zoo."""
    summary = load_json(EVALUATED / dataset / "summary.json")
    ((main, scores),) = summary["scores"].items()
    order = sorted(scores["test_acc"], key=lambda name: -scores["test_acc"][name]["tau"]["mean"])
    rows = [
        [
            name,
            decimal(scores["test_acc"][name]["r2"]) if name in scores["gap"] else "",
            *(decimal(found[name]["tau"]) if name in found else "" for found in scores.values()),
        ]
        for name in order
    ]
    caption = f"Runs not seen, {main}: R² of the test accuracy, and Kendall's tau of every property."
    tables = [Table(["predictor", "R² of test_acc", *scores], rows, caption)]
    for key, caption in (
        ("held_out", "Architectures not seen: Kendall's tau of test accuracy, learnt from networks of all others."),
        ("all_architectures", "A fifth of each architecture's runs, not seen: the same, learnt from networks of all."),
    ):
        found = summary[key]
        if not found["mean"]:
            continue
        names = sorted(found["mean"], key=lambda name: -found["mean"][name]["mean"])
        cells = [[who, *(decimal(taus[who]) for taus in found.values())] for who in names]
        tables.append(Table(["predictor", *found], cells, caption))
    curve = summary["learning_curve"]
    numbers = sorted({int(n) for points in curve.values() for n in points})
    cells = [
        [who, *(decimal(points[str(n)]) if str(n) in points else "" for n in numbers)] for who, points in curve.items()
    ]
    caption = "Kendall's tau of test accuracy over the number of networks learnt from."
    tables.append(Table(["predictor", *map(str, numbers)], cells, caption))
    rows = [
        [f"{who}, {of}", *(f"{share:.2f}" for share in shares.values())]
        for key, of in (("coverage", "unseen runs"), ("coverage_held_out", "unseen architectures"))
        for who, shares in summary[key].items()
    ]
    caption = "Share of networks not seen whose properties lie in intervals for 90 %."
    tables.append(Table(["predictor", *next(iter(summary["coverage"].values()))], rows, caption))
    rows = [
        [name, what, f"{moved['relabelled']:.0e}", f"{moved['one_sided']:.2g}"]
        for name, found in summary["relabelling"].items()
        for what, moved in found.items()
    ]
    caption = (
        "What relabelling hidden neurons changes, in float64: outputs over their size, predictions over their spread; one layer's "
        "rows alone, which is another network, for comparison."
    )
    tables.append(Table(["architecture", "of", "relabelled", "one layer's rows alone"], rows, caption))
    captions = {
        "scores": "Kendall's tau of test accuracy. Grey: what sees hyper-parameters or real images.",
        "predictions": "Predicted against measured properties of runs not seen.",
        "learning_curve": "More networks to learn from help: Kendall's tau of test accuracy.",
        "exam": "Inputs of the exam that tell most and least: what better networks take them for, and how agreeing goes with accuracy.",
        "attention": "Where WeightNet's neurons look, in the most and in the least accurate network.",
    }
    return Section(
        title=f"WeightNet: {dataset}",
        question="How good is a network? Predicted from its weights, for runs and architectures not seen.",
        tables=tables,
        pictures=[
            Picture(
                REPORTS / "build_zoo" / f"{dataset}-{main}" / "zoo.png",
                "What was measured of the zoo's networks.",
            ),
            *(Picture(EVALUATED / dataset / f"{name}.png", caption) for name, caption in captions.items()),
        ],
    )
