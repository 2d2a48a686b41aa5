"""The report's section on what networks were trained on."""

from typing import Any

from stages.common.files import load_json
from stages.recall.captions import caption
from stages.report.elements import REPORTS, Picture, Section, Table, interval, percent

SHOWN = ("statistics", "spectrum", "change", "responses", "both", "all")
DIFFERENCES = ("written_minus_nearest", "written_minus_nearest_averaged")
MEASURES = {"bits": "bits right", "whole": "whole sets right", "r2": "R²", "retrieved": "retrieved among the test sets"}


def recall_section(dataset: str) -> Section:
    """Return the section of what is recalled; its masked autoencoder and classifiers are those of one data set."""
    recovered = load_json(REPORTS / "recover_memory/summary.json")
    space = load_json(REPORTS / "map_weight_space/summary.json")
    audited = load_json(REPORTS / "train_auditor/summary.json")
    tables = [
        decoded_table(recovered["decoded"]),
        control_table(recovered),
        written_table(space),
        arithmetic_table(space["arithmetic"]),
        masked_table(load_json(REPORTS / "classify_masked" / dataset / "summary.json")),
        image_table(load_json(REPORTS / "recover_images/summary.json")),
        auditor_table(audited["recalled"]),
        recipe_table(audited["recalled"]),
        refusal_table(audited["refusals"]),
    ]
    captions = {
        f"train_mae/{dataset}/reconstructions.png": "What a masked autoencoder sees and fills in.",
        f"classify_masked/{dataset}/accuracy.png": "Accuracy on images of which patches are hidden.",
        "build_fleet/classes/fleet.png": "Some of the data sets of fine-tunes: mean image and proportions.",
        "recover_memory/representations.png": "What is recalled, from what: 95 % intervals; dotted: what ignores the network.",
        "recover_memory/growth.png": "More fine-tunes to learn from help.",
        "recover_memory/mean_images.png": "Mean images of data sets never seen, minus the fleet's, and what the weights tell of them.",
        "recover_images/images.png": "Images recovered from a classifier's answers: alignment alone fools the classifier, not the eye.",
        "condense_changes/variance.png": "How many principal components hold changes of weights.",
        "map_weight_space/space.png": "Networks that follow alike rules lie alike.",
        "map_weight_space/written.png": "Networks written for rules never trained.",
        "map_weight_space/arithmetic.png": "Sums and differences of changes of weights.",
    }
    return Section(
        title=f"Recall: {dataset}",
        question="What was a network trained on? Read from its change of weights, for data sets, images and rules never seen.",
        tables=tables,
        pictures=[Picture(REPORTS / path, caption) for path, caption in captions.items()],
    )


def decoded_table(decoded: dict[str, Any]) -> Table:
    """Return every characteristic from every representation."""
    rows = [
        [
            f"{fleet}: {key.replace('_', ' ')}, {MEASURES[measure]}",
            *(interval(by[name][measure]) for name in SHOWN),
            f"{baseline:.2f}",
        ]
        for fleet, characteristics in decoded.items()
        for key, by in characteristics.items()
        for measure, baseline in by["baseline"].items()
    ]
    explained = "Recalled of fine-tunes never seen, whose images and rules no other had: 95 % intervals over them."
    return Table(["characteristic", *SHOWN, "ignoring the network"], rows, explained)


def control_table(recovered: dict[str, Any]) -> Table:
    """Return the controls, in which nothing can be recalled."""
    rows = [
        [f"{fleet}: changes permuted between {kind} networks", percent(value), "50%"]
        for fleet, by_kind in recovered["permuted"].items()
        for kind, value in by_kind.items()
        if fleet != "independent"
    ]
    by = recovered["decoded"]["independent"]["present"]
    rows += [
        [f"each network has a base and a head of its own: {name}", interval(by[name]["bits"]), "50%"]
        for name in ("change", "responses")
    ]
    explained = "Controls: bits right. Weights tell nothing across bases; responses to the same inputs still do."
    return Table(["control", "bits right", "chance"], rows, explained)


def written_table(space: dict[str, Any]) -> Table:
    """Return how written networks follow their rules."""
    rules = space["rules"]
    rows = [[caption(name), interval(measured)] for name, measured in rules["accuracy"].items()]
    rows += [[caption(name), interval(rules[name])] for name in DIFFERENCES]
    rows += [[f"geometry: {caption(name)}", f"{value:.2f}"] for name, value in space["geometry"].items()]
    explained = (
        "Networks written for rules never trained: accuracy on test images. Geometry: how cosines of changes follow the agreement "
        "of rules never trained, and mean cosines."
    )
    return Table(["network", "accuracy"], rows, explained)


def arithmetic_table(arithmetic: dict[str, Any]) -> Table:
    """Return what sums and differences of changes do."""
    rows = [
        [f"{caption(where)}: {caption(name)}", interval(measured)]
        for where in ("on_union", "on_union_minus_on_others")
        for name, measured in arithmetic[where].items()
    ]
    rows += [[caption(name), interval(measured)] for name, measured in arithmetic["negation"].items()]
    rows += [[f"cosine: {caption(name)}", interval(measured)] for name, measured in arithmetic["cosine"].items()]
    explained = f"Changes of disjoint class sets A and B, added (times {arithmetic['scale']:g}, chosen on other pairs) and subtracted."
    return Table(["network", "accuracy among all classes, or cosine"], rows, explained)


def masked_table(classified: dict[str, Any]) -> Table:
    """Return accuracies over mask ratios."""
    ratios = list(next(iter(classified["acc"].values())))
    rows = [[caption(method), *(percent(by[ratio]) for ratio in ratios)] for method, by in classified["acc"].items()]
    rows.append(["most frequent class", *[f"{classified['majority']:.1%}"] * len(ratios)])
    header = ["encoder", *(f"{float(ratio):.0%} hidden" for ratio in ratios)]
    return Table(header, rows, "Images classified while patches are hidden: test accuracy.")


def image_table(images: dict[str, Any]) -> Table:
    """Return how images are recovered from answers."""
    rows = [
        [caption(name), f"{measured['cycle_r2']:.3f}", f"{measured['judge']:.1%}", f"{measured['pixel_r2']:.2f}"]
        for name, measured in images["decoders"].items()
    ]
    explained = (
        "Images recovered from a classifier's answers: R² of its answers to them, agreement of a judge that shares nothing with it "
        f"(right on {images['judge_acc']:.1%} of originals), R² of pixels."
    )
    return Table(["decoder", "cycle R²", "judge agrees", "pixel R²"], rows, explained)


def auditor_table(recalled: dict[str, Any]) -> Table:
    """Return what the auditor tells of fine-tunes by recipes inside the ranges, and what of it could be the recipe's."""
    rows = [
        [
            f"{kind}: {key.replace('_', ' ')}, {MEASURES[measure]}",
            interval(by[measure]),
            f"{by[f'{measure}_ignoring_the_network']:.2f}",
            f"{by[f'{measure}_of_the_recipe_alone']:.2f}",
            f"{by['r2_recipe_removed']:.2f}" if "r2_recipe_removed" in by else "",
            f"{by['coverage']:.1%}" if "coverage" in by else "",
            f"{by['coverage_present']:.1%}" if "coverage_present" in by else "",
            f"{by['calibration_error']:.3f}" if "calibration_error" in by else "",
        ]
        for kind, groups in recalled.items()
        for key, by in groups["inside"].items()
        for measure in ("bits" if "bits" in by else "r2",)
    ]
    header = ["characteristic", "recalled", "ignoring the network", "from the recipe alone", "R², recipe removed"]
    header += ["inside 90 % intervals", "of classes present", "calibration error"]
    explained = "The auditor on fine-tunes never seen, by recipes drawn wide, whole and as low-rank adapters: 95 % intervals over them."
    return Table(header, rows, explained)


def recipe_table(recalled: dict[str, Any]) -> Table:
    """Return what the auditor tells of fine-tunes by other recipes: scores, and how often intervals hold."""
    keys = list(next(iter(recalled.values()))["inside"])
    rows = [
        [f"{kind}: {caption(group)}", *(recipe_cell(by[key]) for key in keys)]
        for kind, groups in recalled.items()
        for group, by in groups.items()
    ]
    header = ["recipes", *(f"{key.replace('_', ' ')}" for key in keys)]
    explained = (
        "The same by recipes inside the ranges and outside: bits right or R², and how many values lie inside intervals of 90 %. "
        "Hotter and colder: learning rates beyond the ranges; elsewhere: small batches, large shifts, the first half of the layers."
    )
    return Table(header, rows, explained)


def recipe_cell(by: dict[str, Any]) -> str:
    """Return a score, and the coverage of its intervals if it has any."""
    score = by["bits"] if "bits" in by else by["r2"]
    return f"{score['mean']:.2f}" + (f" ({by['coverage']:.0%})" if "coverage" in by else "")


def refusal_table(refusals: dict[str, Any]) -> Table:
    """Return how often the auditor refuses honest fine-tunes, altered ones, and those by recipes outside the ranges."""
    rows = [
        [
            f"{kind}: {caption(name)}",
            f"{measured['refused']:.1%}",
            f"{measured['auroc']:.2f}" if name != "honest" else "",
        ]
        for kind, by in refusals.items()
        for name, measured in by.items()
    ]
    explained = (
        "What the auditor refuses: of honest fine-tunes these are false alarms, many where it learned from a few dozen. "
        "AUROC: how its measure of oddness alone, without marks on single weights, ranks them against honest ones."
    )
    return Table(["fine-tunes never seen", "refused", "AUROC"], rows, explained)
