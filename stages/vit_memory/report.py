"""The report's section on the memory-augmented ViT."""

from stages.common.files import Summary, load_json
from stages.common.report import REPORTS, Cell, Detail, Section, Table, decimal, percent, pictures, points, row
from stages.vit_memory.captions import caption

FEW_SHOT, CONTINUAL = REPORTS / "train_few_shot", REPORTS / "train_continual"
MEMORY = REPORTS / "diagnose_memory"
FEW_SHOT_BASELINES = ("linear_probe", "pixels", "random_vit")
SEVERAL = ("memory", "ranpac", "nearest_mean")  # methods of both questions
FEW_SHOT_PICTURES = {
    "methods": (
        "Accuracy with a few images a class minus the linear probe's in the same episodes, points; bars: 95 % intervals.",
        "Points with intervals, one a method: the memory head right of zero, prompts and random weights far left of it.",
    )
}
CONTINUAL_PICTURES = {
    "accuracy": (
        "Test accuracy over the tasks learned so far (mean over seeds), among all classes and among the task's own.",
        "Two line plots: fine-tuning, LwF and EWC fall with every task, memory, RanPAC and SLDA stay high.",
    ),
    "matrices": (
        "Accuracy on every task (columns) after every task (rows), mean over seeds; tasks not yet learned are left blank.",
        "Small coloured triangles, one a method: those of forgetting methods are bright on the diagonal alone.",
    ),
}
MEMORY_PICTURES = {
    "attention": (
        "Test images, and the stored images that they retrieve at two betas; share of attention above.",
        "Rows of digits: at a small beta a little of everything, at beta 16 images of the same class.",
    ),
    "retrieval": (
        "Left: distance of what is retrieved to the pattern meant (length 1). Right: share of patterns retrieved without error.",
        "Falling curves over beta, later for more patterns; the classical network fails beyond a dozen patterns.",
    ),
    "energy": (
        "Energy after each update, which never rises, and how far the state still moves.",
        "Curves that fall within one or two updates and then stay level.",
    ),
    "slots": (
        "Attention of test images (rows, by class) over all slots (columns, by class).",
        "Bright blocks along the diagonal at the large beta, even grey at the small one.",
    ),
}


def vit_memory_section(dataset: str) -> Section:
    """Return the section of the memory-augmented ViT of one data set."""
    shots, tasks, memory = (load_json(folder / dataset / "summary.json") for folder in (FEW_SHOT, CONTINUAL, MEMORY))
    (methods,) = pictures(FEW_SHOT / dataset, FEW_SHOT_PICTURES)
    answer, baseline = verdict(shots, tasks)
    return Section(
        key="vit_memory",
        title="Can it be given a memory?",
        data=f"a frozen vision transformer on {dataset}",
        answer=answer,
        baseline=baseline,
        table=headline(shots, tasks),
        picture=methods,
        details=[
            Detail("A few images of each class", [few_shot_table(shots)]),
            Detail(
                "Tasks one after the other", [continual_table(tasks)], pictures(CONTINUAL / dataset, CONTINUAL_PICTURES)
            ),
            Detail("What a memory retrieves", [retrieval_table(memory)], pictures(MEMORY / dataset, MEMORY_PICTURES)),
        ],
    )


def verdict(shots: Summary, tasks: Summary) -> tuple[str, str]:
    """Return what was found, and the baselines."""
    few = {name: percent(shots["methods"][name]["acc"]["mean"]).text for name in ("memory_head", "linear_probe")}
    last = {name: percent(of["class"]["final"]["mean"]).text for name, of in tasks["methods"].items()}
    tuned = f"fine-tuning {last['finetune']}, " if "finetune" in last else ""  # where whole networks train
    return (
        f"A memory on a frozen network, of a few images of each class, is right on {few['memory_head']}; of classes that come task by "
        f"task, on {last['memory']} at the end",
        f"with the few images a well-fitted linear probe has {few['linear_probe']}; at the end of the tasks {tuned}guessing "
        f"{percent(tasks['chance']['class'], 0).text}",
    )


def headline(shots: Summary, tasks: Summary) -> Table:
    """Both questions, the methods of both first, then those of one, best first."""

    def cells(few: str, lasting: str) -> list[Cell | str]:
        found, kept = shots["methods"].get(few), tasks["methods"].get(lasting)
        return [
            percent(found["acc"]) if found else "",
            points(found["difference"]) if found and "difference" in found else "the baseline" if found else "",
            *(percent(kept["class"][key]) if kept else "" for key in ("final", "forgetting")),
        ]

    few = sorted(shots["methods"], key=lambda m: -shots["methods"][m]["acc"]["mean"])
    lasting = sorted(tasks["methods"], key=lambda m: -tasks["methods"][m]["class"]["final"]["mean"])
    rows = [row(caption(m), *cells("memory_head" if m == "memory" else m, m)) for m in SEVERAL]
    rows += [row(caption(m), *cells("", m), baseline=m == "finetune") for m in lasting if m not in SEVERAL]
    rows += [
        row(caption(m), *cells(m, ""), baseline=m in FEW_SHOT_BASELINES)
        for m in few
        if m not in (*SEVERAL, "memory_head")
    ]
    chance: list[Cell | str] = [percent(shots["chance"], 0), "", percent(tasks["chance"]["class"], 0), ""]
    n, seeds = shots["methods"]["linear_probe"]["acc"]["n"], tasks["methods"]["memory"]["class"]["final"]["n"]
    return Table(
        f"Left: accuracy with a few images of each class, n = {n} episodes (± standard deviation; difference in points, "
        f"[95 % interval]). Right: accuracy among all classes after tasks learned one by one, and how far each fell since it was known "
        f"best, n = {seeds} seeds.",
        ["method", "few images", "minus linear probe", "after all tasks", "forgotten"],
        [*rows, row("chance", *chance, baseline=True)],
        ["", "high", "high", "high", "low"],
    )


def few_shot_table(summary: Summary) -> Table:
    """Accuracy from a few images of each class, best first, and the difference to the linear probe's."""
    methods = sorted(summary["methods"].items(), key=lambda item: -item[1]["acc"]["mean"])
    rows = [
        row(
            caption(name),
            percent(method["acc"]),
            points(method["difference"]) if "difference" in method else "the baseline",
            baseline=name in FEW_SHOT_BASELINES,
        )
        for name, method in methods
    ]
    text = (
        f"Accuracy ± standard deviation over n = {methods[0][1]['acc']['n']} episodes; differences in the same episodes, "
        f"[95 % interval]. Chance {summary['chance']:.0%}."
    )
    return Table(text, ["method", "accuracy", "minus the linear probe, points"], rows, ["", "high", "high"])


def continual_table(summary: Summary) -> Table:
    """Accuracy after the last task and forgetting, for both kinds of question, best first; chance."""
    columns = [(kind, key) for kind in ("class", "task") for key in ("final", "forgetting")]
    methods = sorted(summary["methods"].items(), key=lambda item: -item[1]["class"]["final"]["mean"])
    rows = [
        row(caption(name), *(percent(method[kind][key]) for kind, key in columns), baseline=name == "finetune")
        for name, method in methods
    ]
    chance = [percent(summary["chance"][kind], 0) for kind in ("class", "task")]
    rows.append(row("chance", chance[0], "", chance[1], "", baseline=True))
    header = ["method", "among all classes", "forgotten", "among the task's own", "forgotten"]
    n = summary["methods"]["memory"]["class"]["final"]["n"]
    text = f"Accuracy after the last task, and how far below its best accuracy each earlier task is by then, n = {n} seeds."
    return Table(text, header, rows, ["", "high", "low", "high", "low"])


def retrieval_table(summary: Summary) -> Table:
    """The error of retrieval by number of patterns and beta."""
    errors = summary["retrieval_error"]
    betas = list(next(iter(errors.values())))
    rows = [row(patterns, *(decimal(by[beta], 3) for beta in betas)) for patterns, by in errors.items()]
    text = "Distance of what is retrieved to the pattern meant, patterns of length 1: 1 is a blank answer. Mean over seeds."
    return Table(text, ["patterns", *(f"beta {beta}" for beta in betas)], rows)
