"""The report's section on what networks were trained on."""

from pathlib import Path

from stages.common.files import Summary, load_json
from stages.common.report import REPORTS, Cell, Detail, Picture, Section, Table, decimal, percent, row
from stages.recall.captions import caption

SHOWN = ("statistics", "spectrum", "change", "responses", "both", "all")
HEADLINE = ("statistics", "change", "responses", "all")
READS = {
    "statistics": "statistics of the change",
    "spectrum": "its singular values",
    "change": "change of the weights",
    "responses": "responses to 64 inputs",
    "both": "change and responses",
    "all": "all of these",
}
KINDS = {"whole": "whole network", "adapter": "adapter"}
DIFFERENCES = ("written_minus_nearest", "written_minus_nearest_averaged")
ROWS = {  # of the headline: fleet, characteristic, measure, and what people read
    ("classes", "present", "bits"): "which of ten classes: bits right",
    ("classes", "present", "whole"): "which of ten classes: all ten bits right",
    ("classes", "proportions", "r2"): "proportions of the classes: R²",
    ("unlabelled", "proportions", "r2"): "the same, of images without labels: R²",
    ("unlabelled", "mean_image", "retrieved"): "its data set, by the mean image, without labels",
    ("classes", "log2_size", "r2"): "number of images: R² of the logarithm",
    ("classes", "label_noise", "r2"): "share of random labels: R²",
    ("rules", "table", "bits"): "a rule never trained: bits of its truth table right",
    ("independent", "present", "bits"): "classes, of networks without a common base: bits right",
}
PICTURES: dict[str, list[tuple[str, str, str]]] = {  # of each fold: path, caption, what is seen
    "seen": [
        (
            "recover_memory/mean_images.png",
            "Mean images of data sets that fine-tunes were trained on, minus the mean of all (red above, blue below), and what a decoder "
            "reads of them from the weights. It has seen neither the networks nor the images; the trivial answer is blank.",
            "Rows of blurry red and blue images: those read from weights resemble the true ones, column by column.",
        )
    ],
    "decoded": [
        (
            "recover_memory/representations.png",
            "Every characteristic from every description of the change: 95 % intervals over fine-tunes; dotted: what ignores the network.",
            "Panels of horizontal bars, one a characteristic: the weights' change and the responses reach furthest.",
        ),
        (
            "recover_memory/growth.png",
            "Scores by the number of fine-tunes learned from; what ignores the network has 0.5 of bits, 0 of R².",
            "Rising lines that flatten within a hundred fine-tunes, one panel a fleet.",
        ),
        (
            "build_fleet/classes/fleet.png",
            "Ten of the data sets that networks were fine-tuned on: mean image, and proportions of the classes.",
            "Ten blurry mean images above ten small bar charts.",
        ),
        (
            "condense_changes/variance.png",
            "Share of the variance of changes that principal components hold, of unseen networks (lines) and training ones (dotted).",
            "Lines that rise with the number of components, one a fleet; dotted ones lie a little higher.",
        ),
    ],
    "written": [
        (
            "map_weight_space/written.png",
            "Accuracy of networks written for rules never trained, beside copies and constants; bars: 95 % intervals over rules.",
            "Horizontal bars: written networks lie between the nearest copies and networks trained on the rule.",
        ),
        (
            "map_weight_space/space.png",
            "Changes of weights along their two main axes, and cosine of two changes by the agreement of their rules.",
            "Scatter plots in which colours separate, and violins that rise with the agreement.",
        ),
    ],
    "arithmetic": [
        (
            "map_weight_space/arithmetic.png",
            "Sums and differences of changes: accuracy, with 95 % intervals over pairs of class sets.",
            "Horizontal bars: the sum does nearly as well as training on both; minus A forgets A.",
        )
    ],
    "masked": [
        (
            "train_mae/{dataset}/reconstructions.png",
            "Images, what is left of them, and what the masked autoencoder fills in.",
            "Three rows of ten glyphs: whole, mostly hidden, and filled in blurrily.",
        ),
        (
            "classify_masked/{dataset}/accuracy.png",
            "Test accuracy by the share of patches hidden; bars: standard deviation over seeds.",
            "Falling lines: fine-tuned above from scratch, frozen and random encoders far below.",
        ),
    ],
    "images": [
        (
            "recover_images/images.png",
            "Images recovered from a classifier's answers: alignment alone fools the classifier, not the eye.",
            "Rows of glyphs: originals, noise that is answered alike, blurry glyphs, and means of the class answered.",
        )
    ],
}


def recall_section(dataset: str) -> Section:
    """Return the section of what is recalled; its masked autoencoder and classifiers are those of one data set."""
    recovered = load_json(REPORTS / "recover_memory/summary.json")
    space = load_json(REPORTS / "map_weight_space/summary.json")
    audited = load_json(REPORTS / "train_auditor/summary.json")
    sizes = {fleet: load_json(REPORTS / f"build_fleet/{fleet}/summary.json") for fleet in recovered["decoded"]}
    shown = {
        fold: [Picture(REPORTS / Path(path.format(dataset=dataset)), text, alt) for path, text, alt in some]
        for fold, some in PICTURES.items()
    }
    masked = masked_table(load_json(REPORTS / "classify_masked" / dataset / "summary.json"))
    images = image_table(load_json(REPORTS / "recover_images/summary.json"))
    answer, baseline = verdict(recovered["decoded"], sizes)
    return Section(
        key="recall",
        title="What was it trained on?",
        data=f"{sum(s['train'] + s['test'] for s in sizes.values())} fine-tunes of small vision transformers on {dataset} and shapes",
        answer=answer,
        baseline=baseline,
        table=headline(recovered["decoded"], sizes),
        picture=shown["seen"][0],
        details=[
            Detail(
                "Every characteristic and description", [decoded_table(recovered["decoded"], sizes)], shown["decoded"]
            ),
            Detail("Controls", [control_table(recovered)]),
            Detail(
                "An auditor of fine-tunes by many recipes, whole and as adapters",
                [
                    auditor_table(audited["recalled"]),
                    recipe_table(audited["recalled"]),
                    refusal_table(audited["refusals"]),
                ],
            ),
            Detail("Networks written for rules never trained", [written_table(space)], shown["written"]),
            Detail("Sums and differences of changes", [arithmetic_table(space["arithmetic"])], shown["arithmetic"]),
            Detail("Masked images: the base of the fleets", [masked], shown["masked"]),
            Detail(
                "Images from a classifier's answers",
                [images],
                shown["images"],
            ),
        ],
    )


def verdict(decoded: Summary, sizes: Summary) -> tuple[str, str]:
    """Return what was found, and the baselines."""
    present = decoded["classes"]["present"]
    return (
        f"{percent(present['change']['bits']['mean']).text} of the yes-or-no answers about which classes a fine-tune saw are right, from "
        f"its change of weights alone ({sizes['classes']['test']} unseen fine-tunes)",
        f"the commonest answer for each class, whatever the network, is right on {percent(present['baseline']['bits']).text}",
    )


def tested(sizes: Summary) -> str:
    """Return of how many fine-tunes numbers are."""
    return "n = " + ", ".join(f"{size['test']} ({fleet})" for fleet, size in sizes.items()) + " unseen fine-tunes"


def headline(decoded: Summary, sizes: Summary) -> Table:
    """The main characteristics from the main descriptions, beside what ignores the network."""
    rows = [
        row(
            label,
            *(decimal(decoded[fleet][key][name][measure]) for name in HEADLINE),
            decimal(decoded[fleet][key]["baseline"][measure]),
        )
        for (fleet, key, measure), label in ROWS.items()
        if measure in decoded.get(fleet, {}).get(key, {}).get("baseline", {})
    ]
    explained = f"What is recalled of fine-tunes whose images and rules no other had, [95 % interval]; {tested(sizes)}."
    return Table(explained, ["recalled", *(READS[name] for name in HEADLINE), "ignoring the network"], rows)


def decoded_table(decoded: Summary, sizes: Summary) -> Table:
    """Return every characteristic from every representation."""
    rows = [
        row(
            f"{fleet}: {caption(key)}, {caption(measure)}",
            *(decimal(by[name][measure]) for name in SHOWN),
            decimal(baseline),
        )
        for fleet, characteristics in decoded.items()
        for key, by in characteristics.items()
        for measure, baseline in by["baseline"].items()
    ]
    explained = f"Recalled of fine-tunes never seen, whose images and rules no other had: [95 % intervals] over them; {tested(sizes)}."
    return Table(explained, ["characteristic", *(READS[name] for name in SHOWN), "ignoring the network"], rows)


def control_table(recovered: Summary) -> Table:
    """Return the controls, in which nothing can be recalled."""
    rows = [
        row(f"{fleet}: changes permuted between {kind} networks", percent(value), "50 %")
        for fleet, by_kind in recovered["permuted"].items()
        for kind, value in by_kind.items()
        if fleet != "independent"
    ]
    by = recovered["decoded"]["independent"]["present"]
    rows += [
        row(f"each network has a base and a head of its own: {READS[name]}", percent(by[name]["bits"]), "50 %")
        for name in ("change", "responses")
    ]
    n = next(iter(recovered["permuted"].values()))["test"]["n"]
    explained = (
        f"Controls: bits right, ± standard deviation over n = {n} permutations, or [95 % interval]. Weights tell nothing across bases; "
        "responses to the same inputs still do."
    )
    return Table(explained, ["control", "bits right", "chance"], rows)


def written_table(space: Summary) -> Table:
    """Return how written networks follow their rules."""
    rules = space["rules"]
    baselines = ("nearest_copied", "nearest_averaged", "base", "constant", "written_for_another")
    rows = [row(caption(k), percent(v), baseline=k in baselines) for k, v in rules["accuracy"].items() if "mean" in v]
    rows += [row(f"{caption(name)}, points", Cell(percent(rules[name]).text.replace(" %", ""))) for name in DIFFERENCES]
    rows += [row(f"cosines of changes: {caption(name)}", decimal(value)) for name, value in space["geometry"].items()]
    explained = (
        f"Networks written for rules never trained, n = {rules['accuracy']['written']['n']} rules, [95 % interval]: accuracy on test "
        "images. Below: how cosines of changes follow the agreement of two rules, and mean cosines."
    )
    return Table(explained, ["network", "accuracy, or cosine"], rows)


def arithmetic_table(arithmetic: Summary) -> Table:
    """Return what sums and differences of changes do."""
    rows = [
        row(f"{caption(where)}: {caption(name)}", percent(measured), "")
        for where in ("on_union", "on_union_minus_on_others")
        for name, measured in arithmetic[where].items()
    ]
    rows += [row(caption(name), percent(measured), "") for name, measured in arithmetic["negation"].items()]
    rows += [row(caption(name), "", decimal(measured)) for name, measured in arithmetic["cosine"].items()]
    n = arithmetic["on_union"]["sum"]["n"]
    explained = (
        f"Changes of disjoint class sets A and B, added (times {arithmetic['scale']:g}, chosen on other pairs) and subtracted; n = {n} "
        "pairs, [95 % interval]."
    )
    return Table(explained, ["network", "accuracy among all classes", "cosine of changes"], rows)


def masked_table(classified: Summary) -> Table:
    """Return accuracies over mask ratios."""
    ratios = list(next(iter(classified["acc"].values())))
    rows = [row(caption(method), *(percent(by[ratio]) for ratio in ratios)) for method, by in classified["acc"].items()]
    rows.append(row("most frequent class", *[percent(classified["majority"])] * len(ratios), baseline=True))
    n = classified["acc"]["fine_tuned"][ratios[0]]["n"]
    explained = f"Images classified while patches are hidden: test accuracy ± standard deviation, n = {n} seeds."
    return Table(
        explained, ["encoder", *(f"{float(r):.0%} hidden" for r in ratios)], rows, ["", *["high"] * len(ratios)]
    )


def image_table(images: Summary) -> Table:
    """Return how images are recovered from answers."""
    rows = [
        row(
            caption(name),
            decimal(measured["cycle_r2"], 3),
            percent(measured["judge"]),
            decimal(measured["pixel_r2"]),
            baseline=name == "class_mean",
        )
        for name, measured in images["decoders"].items()
    ]
    explained = (
        "Images recovered from a classifier's answers (n = 1 run): R² of its answers to them, agreement of a judge that shares nothing "
        f"with it (right on {images['judge_acc']:.1%} of originals), R² of pixels."
    )
    return Table(explained, ["decoder", "cycle R²", "judge agrees", "pixel R²"], rows)


def auditor_table(recalled: Summary) -> Table:
    """Return what the auditor tells of fine-tunes by recipes inside the ranges, and what of it could be the recipe's."""
    rows = []
    for kind, groups in recalled.items():
        for key, by in groups["inside"].items():
            measure = "bits" if "bits" in by else "r2"
            rows.append(
                row(
                    f"{KINDS[kind]}: {caption(key)}, {caption(measure)}",
                    decimal(by[measure]),
                    decimal(by[f"{measure}_ignoring_the_network"]),
                    decimal(by[f"{measure}_of_the_recipe_alone"]),
                    decimal(by["r2_recipe_removed"]) if "r2_recipe_removed" in by else "",
                    percent(by["coverage"]) if "coverage" in by else "",
                )
            )
    header = ["characteristic", "recalled", "ignoring the network", "from the recipe alone", "R², recipe removed"]
    explained = (
        "Fine-tunes never seen, by recipes drawn wide (SGD, Adam and AdamW, learning rates over a factor of 30, batches, shifts, layers), "
        "whole and as low-rank adapters: [95 % interval] over them."
    )
    return Table(explained, [*header, "inside 90 % intervals"], rows)


def recipe_table(recalled: Summary) -> Table:
    """Return what the auditor tells of fine-tunes by other recipes: scores, and how often intervals hold."""
    keys = list(next(iter(recalled.values()))["inside"])
    rows = [
        row(f"{KINDS[kind]}: {caption(group)}", *(recipe_cell(by[key]) for key in keys))
        for kind, groups in recalled.items()
        for group, by in groups.items()
    ]
    explained = (
        "The same by recipes inside the ranges and outside: bits right or R², and how many values lie inside intervals for 90 %. Hotter "
        "and colder: learning rates beyond the ranges; elsewhere: small batches, large shifts, the first half of the layers."
    )
    return Table(explained, ["recipes", *map(caption, keys)], rows)


def recipe_cell(by: Summary) -> Cell:
    """Return a score, and the coverage of its intervals if it has any."""
    score = by["bits"] if "bits" in by else by["r2"]
    covered = f" ({by['coverage']:.0%} inside)" if "coverage" in by else ""
    return Cell(f"{score['mean']:.2f}{covered}", score["mean"])


def refusal_table(refusals: Summary) -> Table:
    """Return how often the auditor refuses honest fine-tunes, altered ones, and those by recipes outside the ranges."""
    rows = [
        row(
            f"{KINDS[kind]}: {caption(name)}",
            percent(measured["refused"]),
            decimal(measured["auroc"]) if name != "honest" else "",
            baseline=name == "honest",
        )
        for kind, by in refusals.items()
        for name, measured in by.items()
    ]
    explained = (
        "What the auditor refuses; of honest fine-tunes these are false alarms, many where it learned from a few dozen. "
        "AUROC: how its measure of oddness alone, without marks on single weights, ranks them against honest ones."
    )
    return Table(explained, ["fine-tunes never seen", "refused", "AUROC"], rows)
