"""The report's section on the eigenvectors of bilinear networks."""

from stages.common.files import Summary, load_csv, load_json
from stages.common.report import REPORTS, Cell, Detail, Row, Section, Table, decimal, percent, pictures, row

DECOMPOSED = REPORTS / "decompose_bilinear"
SINGLE_LAYER = ("regularised", "unregularised")
LABELS = {"regularised": "regularised", "unregularised": "unregularised", "two_layer": "two layers"}
PICTURES = {
    "truncation": (
        "Test accuracy from the first eigenvectors of each class: by sign (as many of either), by magnitude, and at random.",
        "Two plots, one a network: accuracy rises to the whole network's within a few eigenvectors; the random ones' stays far below.",
    ),
    "eigenvectors": (
        "The most positive and most negative eigenvectors of each class, in pixel space, eigenvalue above; red positive, blue negative. "
        "At 8x8 pixels they look like noise to most people: strokes show at MNIST's 28x28.",
        "A grid of small red and blue images, a row a class, a block a network.",
    ),
    "spectra": (
        "Eigenvalues of each class in falling order, over the largest.",
        "Ten line plots, one a class: a few large positive and negative eigenvalues, and many near zero.",
    ),
    "masks": (
        "The mask of each class, computed from the weights; an image, the image under the mask, and under the mask with its pixels "
        "permuted. What the network answers stands above.",
        "Rows of digits: under the mask the answers change, under permuted masks mostly not.",
    ),
    "attributions": (
        "What each pixel adds to the predicted logit: exact, since the pixels of an image sum to it. Red adds, blue takes away.",
        "Pairs of a digit and a red and blue map of its pixels.",
    ),
}


def bilinear_section(dataset: str) -> Section:
    """Return the section of the bilinear classifiers of one data set."""
    summary = load_json(DECOMPOSED / dataset / "summary.json")
    truncation, *others = pictures(DECOMPOSED / dataset, PICTURES)
    answer, baseline = verdict(summary)
    return Section(
        key="bilinear",
        title="What features did it learn?",
        data=f"bilinear classifiers of {dataset}, {summary['regularised']['full_acc']['n']} seeds",
        answer=answer,
        baseline=baseline,
        table=headline(summary),
        picture=truncation,
        details=[
            Detail("The eigenvectors", [similarity_table(summary)], others[:2]),
            Detail("Every basis and number of eigenvectors", [truncation_table(summary)]),
            Detail(
                "Masks made of the weights, and pixels that matter",
                [mask_table(summary), pixel_table(summary)],
                others[2:],
            ),
            Detail("Two layers", two_layer_tables(dataset, summary)),
        ],
    )


def few(summary: Summary, variant: str = "regularised") -> tuple[int, dict[str, float], dict[str, float]]:
    """Return how many eigenvectors a class the headline is about, the accuracy from them, and from any as many."""
    curves = summary[variant]["truncated_acc"]["hidden"]
    k = list(curves["sign"])[-1]
    return 2 * int(k), curves["sign"][k], curves["random"][k]


def verdict(summary: Summary) -> tuple[str, str]:
    """Return what was found, and the baselines."""
    count, acc, chance = few(summary)
    whole, linear = summary["regularised"]["full_acc"], summary["linear"]["full_acc"]
    return (
        f"{count} eigenvectors a class, read from the weights alone, classify {percent(acc['mean']).text} of test images "
        f"({whole['n']} seeds)",
        f"{count} random ones of them have {percent(chance['mean']).text}, a linear classifier {percent(linear['mean']).text}, the "
        f"whole network {percent(whole['mean']).text}",
    )


def headline(summary: Summary) -> Table:
    """The main numbers, each beside its baseline."""
    count, acc, chance = few(summary)
    main, linear = summary["regularised"], percent(summary["linear"]["full_acc"])
    untrained = decimal(summary["untrained"]["similarity"]["eigenvectors"])
    pixels, kept = list(main["kept_prediction"]["attributed"].items())[-1]
    rows = [
        *(
            row(
                f"test accuracy, {label}",
                percent(summary[variant]["full_acc"]),
                linear,
                "linear classifier, trained alike",
            )
            for variant, label in LABELS.items()
        ),
        row(f"accuracy from {count} eigenvectors a class", percent(acc), percent(chance), f"{count} random ones"),
        *(
            row(
                f"accuracy under the most harmful mask, {LABELS[variant]}",
                percent(summary[variant]["mask_acc"]["mask"]["best"]),
                percent(summary[variant]["mask_acc"]["permuted"]["best"]),
                "the mask's pixels permuted, chosen alike",
            )
            for variant in SINGLE_LAYER
        ),
        row(
            f"answers kept without the {pixels} pixels that add most",
            percent(kept),
            percent(main["kept_prediction"]["brightest"][pixels]),
            f"without the {pixels} brightest",
        ),
        *(
            row(
                f"eigenvectors alike between seeds, {LABELS[variant]}",
                decimal(summary[variant]["similarity"]["eigenvectors"]),
                untrained,
                "untrained networks",
            )
            for variant in SINGLE_LAYER
        ),
    ]
    caption = (
        f"Means ± standard deviations, n = {main['full_acc']['n']} seeds (alike: absolute cosine of matched eigenvectors, over their "
        "pairs). Regularised, where nothing else is said."
    )
    return Table(caption, ["measure", "value", "baseline", "the baseline is"], rows)


def similarity_table(summary: Summary) -> Table:
    """How alike the eigenvectors of two seeds are, beside those of untrained networks."""
    labels = {"eigenvectors": "matched eigenvectors", "subspace": "span of the top eigenvectors"}
    names = {**{variant: LABELS[variant] for variant in SINGLE_LAYER}, "untrained": "untrained"}
    n = int(summary["regularised"]["similarity"]["eigenvectors"].get("n", 1))
    return Table(
        f"How alike two seeds are: absolute cosine, n = {n} pairs of seeds.",
        ["network", *labels.values()],
        [
            row(name, *(decimal(summary[key]["similarity"][kind]) for kind in labels), baseline=key == "untrained")
            for key, name in names.items()
        ],
        ["", "high", "high"],
    )


def truncation_table(summary: Summary) -> Table:
    """Accuracy from a few eigenvectors, beside the whole network's and that of as many random eigenvectors."""
    rows = [
        row(
            LABELS[variant],
            basis,
            f"{k} + {k}",
            percent(acc),
            percent(summary[variant]["full_acc"]),
            percent(curves["random"][k]),
        )
        for variant in SINGLE_LAYER
        for basis, curves in summary[variant]["truncated_acc"].items()
        for k, acc in curves["sign"].items()
    ]
    caption = (
        "Test accuracy from some positive and as many negative eigenvectors a class, of three bases: of the hidden units, of the "
        f"pixels, and of the pixels weighted by the data. n = {summary['regularised']['full_acc']['n']} seeds."
    )
    return Table(caption, ["network", "basis", "eigenvectors", "accuracy", "whole network", "any as many"], rows)


def mask_table(summary: Summary) -> Table:
    """Accuracy under masks made from the weights, beside the same masks with their pixels permuted and chosen alike."""
    labels = {"best": "the most harmful", "mean": "mean over classes"}
    rows = [
        row(
            LABELS[variant],
            label,
            percent(summary[variant]["mask_acc"]["mask"][kind]),
            percent(summary[variant]["mask_acc"]["permuted"][kind]),
            percent(summary[variant]["full_acc"]),
        )
        for variant in SINGLE_LAYER
        for kind, label in labels.items()
    ]
    caption = f"Test accuracy under one mask of norm {summary['mask_norm']:g}, n = {summary['regularised']['full_acc']['n']} seeds."
    return Table(caption, ["network", "mask", "accuracy", "pixels permuted", "no mask"], rows)


def pixel_table(summary: Summary) -> Table:
    """Answers kept without the pixels that add most to them, beside those kept without the brightest or random ones."""
    kept = summary["regularised"]["kept_prediction"]
    rows = [
        row(count, *(percent(kept[which][count]) for which in ("attributed", "brightest", "random")))
        for count in kept["attributed"]
    ]
    caption = (
        f"Answers that stay when pixels are deleted, regularised, n = {summary['regularised']['full_acc']['n']} seeds."
    )
    return Table(caption, ["pixels deleted", "those that add most", "the brightest", "random lit ones"], rows)


def two_layer_tables(dataset: str, summary: Summary) -> list[Table]:
    """Accuracy of the two-layer network from a few outer (rows) and inner (columns) eigenvectors: the largest, and any."""
    cells = load_csv(DECOMPOSED / dataset / "two_layer.csv")
    whole = summary["two_layer"]["full_acc"]
    of = f"n = {whole['n']} seeds; the whole network has {percent(whole).text}."
    captions = {
        "magnitude": f"Test accuracy from the largest outer (rows) and inner (columns) eigenvectors a class, {of}",
        "random": f"The baseline: the same from random eigenvectors, {of}",
    }
    tables = []
    for ranking, caption in captions.items():
        grid: dict[str, dict[str, Cell]] = {}
        for cell in (cell for cell in cells if cell["ranking"] == ranking):
            acc = percent({"mean": float(cell["acc"]), "std": float(cell["std"])})
            grid.setdefault(cell["outer"], {})[cell["inner"]] = acc
        inner = [f"{count} inner" for count in next(iter(grid.values()))]
        rows = [Row([Cell(outer), *accs.values()], baseline=ranking == "random") for outer, accs in grid.items()]
        tables.append(Table(caption, ["outer", *inner], rows))
    return tables
