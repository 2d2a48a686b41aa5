"""The report's section on the memory-augmented ViT."""

from stages.common.files import load_json
from stages.report.elements import REPORTS, Picture, Section, Table, percent

FEW_SHOT, CONTINUAL = REPORTS / "train_few_shot", REPORTS / "train_continual"
MEMORY = REPORTS / "diagnose_memory"


def vit_memory_section(dataset: str) -> Section:
    """Return the section of the memory-augmented ViT of one data set."""
    few = load_json(FEW_SHOT / dataset / "summary.json")
    continual = load_json(CONTINUAL / dataset / "summary.json")
    memory = load_json(MEMORY / dataset / "summary.json")
    by_accuracy = sorted(few["methods"].items(), key=lambda item: -item[1]["acc"]["mean"])
    by_end = sorted(continual["methods"].items(), key=lambda item: -item[1]["class"]["final"]["mean"])
    differences = {name: method.get("difference") for name, method in few["methods"].items()}
    shots = [
        [
            name.replace("_", " "),
            percent(method["acc"]),
            f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
            if (d := differences[name])
            else f"the baseline; chance {few['chance']:.0%}",
        ]
        for name, method in by_accuracy
    ]
    tasks = [
        [
            name.replace("_", " "),
            *(percent(of[kind][key]) for kind in ("class", "task") for key in ("final", "forgetting")),
        ]
        for name, of in by_end
    ]
    tasks.append(["chance", f"{continual['chance']['class']:.0%}", "", f"{continual['chance']['task']:.0%}", ""])
    betas = list(next(iter(memory["retrieval_error"].values())))
    errors = [[n, *(f"{row[beta]:.3f}" for beta in betas)] for n, row in memory["retrieval_error"].items()]
    few_caption = "Few-shot accuracy, means ± standard deviations over episodes; differences in the same episodes, 95 % intervals."
    tables = [
        Table(["method", "accuracy", "minus the linear probe, points"], shots, few_caption),
        Table(
            ["method", "class-incremental", "forgetting", "task-incremental", "forgetting"],
            tasks,
            "Accuracy after the last task, and how far below its best accuracy each earlier task is by then.",
        ),
        Table(
            ["patterns", *(f"beta {beta}" for beta in betas)],
            errors,
            "Distance of what is retrieved to the pattern meant.",
        ),
    ]
    pictures = [
        Picture(
            FEW_SHOT / dataset / "methods.png",
            "Accuracy minus the linear probe's in the same episodes, 95 % intervals.",
        ),
        Picture(CONTINUAL / dataset / "accuracy.png", "Accuracy over the tasks learnt so far."),
        Picture(CONTINUAL / dataset / "matrices.png", "Accuracy on every task (columns) after every task (rows)."),
        Picture(
            MEMORY / dataset / "retrieval.png", "Error of retrieval, and the capacity of modern and classical networks."
        ),
        Picture(MEMORY / dataset / "energy.png", "Energy while retrieving: it never rises."),
        Picture(MEMORY / dataset / "attention.png", "Test images, and the stored images that they retrieve."),
        Picture(MEMORY / dataset / "slots.png", "Attention of test images over all slots."),
    ]
    return Section(
        title=f"ViT memory: {dataset}",
        question="Can a network be given a memory? Associative memory on a frozen vision transformer, beside what else there is.",
        tables=tables,
        pictures=pictures,
    )
