"""The report's section on the memory-augmented ViT."""

from typing import Any

from stages.common.files import load_json
from stages.report.elements import REPORTS, Picture, Section, Table, percent

FEW_SHOT, CONTINUAL = REPORTS / "train_few_shot", REPORTS / "train_continual"
MEMORY = REPORTS / "diagnose_memory"

PICTURES = [
    (FEW_SHOT, "methods", "Accuracy minus the linear probe's in the same episodes, 95 % intervals."),
    (CONTINUAL, "accuracy", "Accuracy over the tasks learnt so far."),
    (CONTINUAL, "matrices", "Accuracy on every task (columns) after every task (rows)."),
    (MEMORY, "retrieval", "Error of retrieval, and the capacity of modern and classical networks."),
    (MEMORY, "energy", "Energy while retrieving: it never rises."),
    (MEMORY, "attention", "Test images, and the stored images that they retrieve."),
    (MEMORY, "slots", "Attention of test images over all slots."),
]


def vit_memory_section(dataset: str) -> Section:
    """Return the section of the memory-augmented ViT of one data set."""
    return Section(
        title=f"ViT memory: {dataset}",
        question="Can a network be given a memory? Associative memory on a frozen vision transformer, beside what else there is.",
        tables=[
            few_shot_table(load_json(FEW_SHOT / dataset / "summary.json")),
            continual_table(load_json(CONTINUAL / dataset / "summary.json")),
            retrieval_table(load_json(MEMORY / dataset / "summary.json")),
        ],
        pictures=[Picture(folder / dataset / f"{name}.png", caption) for folder, name, caption in PICTURES],
    )


def few_shot_table(summary: dict[str, Any]) -> Table:
    """Accuracy from a few images of each class, best first, and the difference to the linear probe's."""

    def difference(method: dict[str, Any]) -> str:
        if "difference" not in method:
            return f"the baseline; chance {summary['chance']:.0%}"
        mean, low, high = (100 * method["difference"][key] for key in ("mean", "low", "high"))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

    methods = sorted(summary["methods"].items(), key=lambda item: -item[1]["acc"]["mean"])
    rows = [[name.replace("_", " "), percent(method["acc"]), difference(method)] for name, method in methods]
    caption = "Few-shot accuracy, means ± standard deviations over episodes; differences in the same episodes, 95 % intervals."
    return Table(["method", "accuracy", "minus the linear probe, points"], rows, caption)


def continual_table(summary: dict[str, Any]) -> Table:
    """Accuracy after the last task and forgetting, for both kinds of question, best first; chance."""
    columns = [(kind, key) for kind in ("class", "task") for key in ("final", "forgetting")]
    methods = sorted(summary["methods"].items(), key=lambda item: -item[1]["class"]["final"]["mean"])
    rows = [
        [name.replace("_", " "), *(percent(method[kind][key]) for kind, key in columns)] for name, method in methods
    ]
    rows.append(["chance", f"{summary['chance']['class']:.0%}", "", f"{summary['chance']['task']:.0%}", ""])
    header = ["method", "class-incremental", "forgetting", "task-incremental", "forgetting"]
    caption = "Accuracy after the last task, and how far below its best accuracy each earlier task is by then."
    return Table(header, rows, caption)


def retrieval_table(summary: dict[str, Any]) -> Table:
    """The error of retrieval by number of patterns and beta."""
    errors = summary["retrieval_error"]
    betas = list(next(iter(errors.values())))
    rows = [[patterns, *(f"{row[beta]:.3f}" for beta in betas)] for patterns, row in errors.items()]
    caption = "Distance of what is retrieved to the pattern meant."
    return Table(["patterns", *(f"beta {beta}" for beta in betas)], rows, caption)
