"""Tell from a fine-tune what it was trained on: which classes, in which proportions, how many images, how noisy labels.

Needs an auditor of its base: the one that 'dvc repro train_auditor' makes here, else the published one (models/released/auditor). A whole
network is given by --checkpoint, a LoRA adapter by --adapter or --checkpoint, a folder that peft's save_pretrained wrote. Files may be in
half precision, and adapters merged. Intervals held for 90 % of fine-tunes left out of training, and probabilities are calibrated on them.
Refused is what training does not make of the base: other networks, changes that were negated, merged, quantised or pruned, and recipes
unlike those that were learned from. Where a value is unlike what was learned from, intervals are wider and the table says so: do not
trust it then.

    python -m stages.recall.audit --example
    python -m stages.recall.audit --base models/classify_masked/glyphs/backbone.safetensors \\
        --checkpoint models/build_fleet/classes/example.safetensors
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.checkpoints import READABLE, load_weights
from stages.common.files import load_json
from stages.common.released import published
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.recall.adapter_files import adapter_folder, load_adapter, load_beside
from stages.recall.adapters import MATRICES, can_adapt, check_ranks, dense, merged_adapter
from stages.recall.auditor import Auditor, Kind, base_sha256, unsureness
from stages.recall.decoders import Decoder
from stages.recall.functional_vit import FIXED, HEAD, Base, load_base
from stages.recall.heads import check_head, saved_head
from stages.recall.honesty import check, check_marks
from stages.recall.own_base import read_own_base, with_head
from stages.recall.reading import READS, read_columns

if TYPE_CHECKING:
    import pandas as pd

OWN, RELEASED = Path("models/train_auditor"), Path("models/released/auditor")
FILE = "auditor.safetensors"
BESIDE = ("head.", "fc_norm.", "decoder.", FIXED)  # what a fine-tuned network may have beside the encoder's weights
# 2^40 images: more than anybody has, and a number that can be written
RANGES = {"proportions": (0.0, 1.0), "log2_size": (0.0, 40.0), "label_noise": (0.0, 1.0)}
ROUNDING = 1e-6  # of a weight in single precision, reckoned with a few times
BAR = 20  # characters of a share of 1
FROM_WEIGHTS = ("direction", "sizes", "spectra", "quantiles")


def find_auditor(chosen: Path | None, base: Base | None) -> tuple[Path, Auditor]:
    """Return the folder of the auditor that is chosen, and the auditor.

    By default, of those of this base, that which learned from most.
    """
    if chosen is not None:
        file = chosen if chosen.is_file() else chosen / FILE
        return file.parent, Auditor.load(file)
    folders = (OWN, published(RELEASED))
    there = {folder: Auditor.load(folder / FILE) for folder in folders if (folder / FILE).is_file()}
    if not there:
        raise InputError(f"{RELEASED / FILE} is missing: run 'git checkout {RELEASED}'")
    fit = {f: a for f, a in there.items() if base is None or base_sha256(base) == a.card["base_sha256"]} or there
    folder = max(fit, key=lambda f: fit[f].learned_from)
    whose = "own" if folder == OWN else "published"
    nothing = "" if OWN in there else ": none was made here"
    print(f"the {whose} auditor is used ({folder}, of {fit[folder].learned_from} fine-tunes){nothing}", file=sys.stderr)
    return folder, fit[folder]


def check_base(path: Path, base: Base, auditor: Auditor, folder: Path) -> None:
    """InputError if a base is not the one whose fine-tunes the auditor knows."""
    if base_sha256(base) != auditor.card["base_sha256"]:
        own = auditor.card.get("backbone")
        right = own["weights"] if own else folder / "base.safetensors"
        stage = "adapt_backbone and audit_backbone" if own else "train_auditor"
        raise InputError(
            f"{path} is not the base that the auditor in {folder} is of: give {right}, or make an auditor of your base: run 'dvc repro "
            f"{stage}'"
        )


def read_change(path: Path, base: Base) -> Float[np.ndarray, " w"]:
    """Return how a checkpoint differs from its base; InputError if it is no network of this architecture, or the base itself."""
    state, notes = load_weights(path, base.layout.shapes, BESIDE, torch.float32, "the base")
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    fixed = base.encoder[FIXED]
    if FIXED in state and not is_rounded(state[FIXED], fixed):
        raise InputError(f"{path} does not descend from the base: its {FIXED} is another")
    check_saved_head(path, state, base)
    return moved(path, {name: state[name] for name in base.trained}, base)


def check_saved_head(path: Path, beside: Mapping[str, Tensor], base: Base) -> None:
    """InputError if the head that is saved with a fine-tune is not the base's, as it was or trained along."""
    head = saved_head(beside)
    if head is not None:
        check_head(str(path), head, base.decoder[HEAD[0]])


def moved(path: Path, tuned: dict[str, Tensor], base: Base) -> Float[np.ndarray, " w"]:
    """Return how weights differ from the base's; InputError if none does.

    A tensor that is the base's but for the precision in which it was saved stands still, as it did in training.
    """
    change = {
        name: torch.zeros_like(w) if is_rounded(tuned[name], w) else tuned[name] - w for name, w in base.trained.items()
    }
    if not any(step.any() for step in change.values()):
        raise InputError(f"{path} is the base itself: nothing was trained")
    return base.layout.flatten(change).numpy()


def is_rounded(tensor: Tensor, exact: Tensor) -> bool:
    """Whether a tensor is another one but for rounding, as in moving averages, or saved in half the precision."""
    return torch.allclose(tensor, exact, rtol=ROUNDING, atol=ROUNDING**2) or any(
        torch.equal(tensor, exact.to(half).to(tensor.dtype)) for half in (torch.float16, torch.bfloat16)
    )


def read_backbone(path: Path, auditor: Auditor) -> Base:
    """Return the base of an auditor of one's own, from its weights; InputError if they are missing or none of such a network."""
    of = auditor.card["backbone"]
    if not path.exists():
        raise InputError(f"{path}, the weights of the auditor's base, is missing: give them by --base")
    head = {name: torch.from_numpy(array) for name, array in auditor.head.items()}
    return with_head(read_own_base(of["model"], str(path), of["image_size"]), head)


def read_tuned(path: Path, base: Base, auditor: Auditor) -> Float[np.ndarray, " w"]:
    """Return how a fine-tune of a base of one's own differs from it: it is read as the base is; a head of its own is left out."""
    tuned = read_backbone(path, auditor)
    if not torch.allclose(tuned.encoder[FIXED], base.encoder[FIXED], atol=1e-6):
        print(f"{path}: its {FIXED} was trained, too, which is not read", file=sys.stderr)
    return moved(path, tuned.trained, base)


def read_adapter(folder: Path, base: Base) -> Float[np.ndarray, " w"]:
    """Return how an adapter changes its base: what (B, A) and (B G, G⁻¹ A) have in common. InputError if it is none, or a mixture."""
    adapters, notes = load_adapter(folder, base.layout)
    for note in notes:
        print(f"{folder}: {note}", file=sys.stderr)
    if strange := [name for name in adapters if not can_adapt(name)]:
        raise InputError(f"{folder} adapts {strange[0]}: the auditor knows adapters of {', '.join(MATRICES)}")
    check_ranks(str(folder), adapters)
    return dense(adapters, base.layout)


def recall(change: Float[np.ndarray, " w"], name: str, kind: Kind, auditor: Auditor, base: Base) -> dict[str, Any]:
    """Return what a fine-tune was trained on, as far as it tells, and what is to be doubted; InputError if it is refused."""
    if kind not in auditor.parts:
        raise InputError(f"{name}: the auditor knows no fine-tunes of this kind ({kind})")
    part = auditor.parts[kind]
    if kind == "whole":  # an adapter leaves most weights where they were
        check_marks(name, base.start.numpy() + change, change, base.layout)
    rows, responses = auditor.condense(change, base.layout), auditor.respond(base, change)
    judged = part.judge((rows, responses), lambda changes: auditor.respond(base, changes[0]))
    distance = check(name, judged, part.suspected)
    descriptions = part.reader.read(rows, responses)
    answer: dict[str, Any] = {"kind": kind, "distance": distance, "warnings": []}
    for characteristic, scores in part.decode(descriptions).items():
        source, decoder = part.decoders[characteristic]
        doubt = decoder.doubt(scores[0])
        unsure = doubt * unsureness(np.array(distance))
        found = tell(characteristic, decoder, scores[0], unsure, auditor.card["classes"])
        key = "images" if characteristic == "log2_size" else characteristic
        answer[key] = {"from": gives(source), "found": found}
        if (doubt > 1).any():
            answer["warnings"].append(beyond(key, decoder))
    if part.unmasked is not None:
        source, decoder = part.unmasked
        told = decoder.known(decoder.predict(read_columns(descriptions, source)))
        answer["whole_images"] = {"from": gives(source), "probability": float(decoder.probabilities(told)[0, 0])}
    return answer


def gives(source: str) -> str:
    """Return in a word what a decoder of this source reads."""
    kinds = {"weights" if name in FROM_WEIGHTS else "responses" for name in READS[source]}
    return " and ".join(sorted(kinds, reverse=True))


def tell(
    name: str, decoder: Decoder, scores: Float[np.ndarray, " t"], doubt: Float[np.ndarray, " t"], classes: list[str]
) -> dict[str, dict[str, float]]:
    """Return a characteristic, of each class if it is of classes: a probability, or a value and its interval."""
    if name == "present":
        chances = decoder.probabilities(decoder.known(scores), decoder.doubt(scores))
        return {c: {"probability": float(p)} for c, p in zip(classes, chances, strict=True)}
    columns = decoder.interval(scores, RANGES[name], doubt)
    if name == "log2_size":
        name, columns = "images", tuple(2**column for column in columns)
    names = classes if name == "proportions" else [name]
    return {
        key: {"value": float(value), "low": float(low), "high": float(high)}
        for key, value, low, high in zip(names, *columns, strict=True)
    }


def beyond(name: str, decoder: Decoder) -> str:
    """Return a warning that what was decoded lies beyond all that was learned from."""
    least, most = decoder.true_range
    learned = f"{2**least:.0f} to {2**most:.0f}" if name == "images" else f"{least:.0%} to {most:.0%}"
    return f"{name.replace('_', ' ')}: what is decoded lies beyond what was learned from ({learned})"


def describe(answer: dict[str, Any], true: dict[str, Any] | None = None) -> str:
    """Return the answer as a table, beside the truth if it is known; what is to be doubted comes first."""
    present, proportions = answer["present"], answer["proportions"]
    lines = [f"DO NOT TRUST: {warning}" for warning in answer["warnings"]]
    lines.append(f"{'class':8s} present   share (90 % interval)" + ("      truth" if true else ""))
    for place, (name, found) in enumerate(present["found"].items()):
        chance, share = f"{found['probability']:6.1%}", proportions["found"][name]
        line = f"{name:8s} {chance}   {share['value']:5.1%} ({share['low']:.0%} to {share['high']:.0%})"
        if true:
            line = f"{line:42s} {true['proportions'][place]:5.1%}   {bars(share['value'], true['proportions'][place])}"
        lines.append(line)
    lines.append(f"present is read from {present['from']}, shares from {proportions['from']}")
    images, noise = answer["images"], answer["label_noise"]
    n, e = images["found"]["images"], noise["found"]["label_noise"]
    lines.append(f"images       {n['value']:.0f} ({n['low']:.0f} to {n['high']:.0f}), from {images['from']}")
    lines.append(f"labels drawn {e['value']:.0%} ({e['low']:.0%} to {e['high']:.0%}) at random, from {noise['from']}")
    if true:
        lines[-2] += f"; truth {2 ** true['log2_size']:.0f}"
        lines[-1] += f"; truth {true['label_noise']:.0%}"
    if "whole_images" in answer:
        chance = answer["whole_images"]["probability"]
        kind = "whole images" if chance > 0.5 else "images of which patches were hidden"
        lines.append(f"trained on   {kind}, {max(chance, 1 - chance):.0%}, from {answer['whole_images']['from']}")
    lines.append(f"the change is {answer['distance']:.0%} as far from what training makes as the limit")
    return "\n".join(lines)


def bars(told: float, true: float) -> str:
    """Return two shares as bars of characters: = where both reach, # where only what is told does, and . where only the truth does."""
    a, b = (round(BAR * value) for value in (told, true))
    return "=" * min(a, b) + "#" * (a - b) + "." * (b - a)


def show_examples(folder: Path, auditor: Auditor) -> None:
    """Print what is recalled of the auditor's examples beside the truth, and why one is refused."""
    path, examples = folder / "base.safetensors", load_json(folder / "auditor.json")["examples"]
    base = load_base(path)
    check_base(path, base, auditor, folder)
    kinds: tuple[tuple[Kind, Path], ...] = (
        ("whole", folder / "examples/whole.safetensors"),
        ("adapter", folder / "examples/adapter"),
    )
    print("Fine-tunes that the auditor has never seen, on images that nothing it learned from was trained on.")
    print("Bars: = told and true, # told only, . true only.")
    for kind, path in kinds:
        change = read_adapter(path, base) if kind == "adapter" else read_change(path, base)
        print(f"\n{path}")
        print(describe(recall(change, str(path), kind, auditor, base), examples[kind]["true"]))
    path = folder / "examples/negated.safetensors"
    try:
        recall(read_change(path, base), str(path), "whole", auditor, base)
        print(f"\n{path}: not refused, though it should be: {examples['negated']['refused']}")
    except InputError as error:
        print(f"\n{path} (truth: {examples['negated']['refused']})\nrefused: {error}")


def parse() -> argparse.Namespace:
    """Return the command line's arguments; InputError if what is to be audited is not said once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=Path, help="the network that was fine-tuned (.safetensors); by default the auditor's"
    )
    parser.add_argument("--checkpoint", type=Path, help=f"the fine-tuned network; {READABLE}")
    parser.add_argument(
        "--adapter", type=Path, help="a folder with adapter_config.json and adapter_model.safetensors (or .bin)"
    )
    parser.add_argument(
        "--auditor",
        type=Path,
        help="an auditor's file or its folder; by default the one made here, else the published one",
    )
    parser.add_argument(
        "--example", action="store_true", help="audit the auditor's examples, and print the truth beside it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    given = sum(map(bool, (arguments.checkpoint, arguments.adapter, arguments.example)))
    if given != 1:
        raise InputError("expected one of --checkpoint, --adapter and --example: name what is to be audited")
    return arguments


def answer_for(base: Path | None, checkpoint: Path | None, adapter: Path | None, chosen: Path | None) -> dict[str, Any]:
    """Return everything that is recalled of a fine-tune, a checkpoint or an adapter, as --json prints it; InputError if it is refused."""
    path = adapter or checkpoint
    assert path is not None
    adapter = adapter_folder(path) or adapter
    path = adapter or path
    if chosen is not None and "backbone" in (found := find_auditor(chosen, None))[1].card:
        folder, auditor = found
        start = base or Path(auditor.card["backbone"]["weights"])
        known = read_backbone(start, auditor)
        read = partial(read_tuned, auditor=auditor)
    else:
        tuned_from = load_base(base) if base else None
        folder, auditor = find_auditor(chosen, tuned_from)
        start = base or folder / "base.safetensors"
        known, read = tuned_from or load_base(start), read_change
    check_base(start, known, auditor, folder)
    change = read_adapter(path, known) if adapter else read(path, known)
    # Fleets of a base of one's own have new heads, too.
    if adapter and "backbone" not in auditor.card:
        check_saved_head(path, load_beside(adapter), known)
    kind: Kind = "adapter" if adapter else "whole"
    weights = known.start.numpy() + change
    if not adapter and (merged := merged_adapter(change, weights, known.layout)) is not None:
        print(f"{path}: the change is of low rank, and is read as an adapter that was merged", file=sys.stderr)
        kind, change = "adapter", dense(merged, known.layout)
    return recall(change, str(path), kind, auditor, known)


def audit(
    checkpoint: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    auditor: str | Path | None = None,
) -> "pd.DataFrame":
    """Return a row for each class and characteristic that is recalled of one fine-tune, a checkpoint or a folder of an adapter.

    characteristic    present, proportions, images or label_noise
    label             the class, of the first two
    value             a probability (present), a share from 0 to 1, or a number of images
    low, high         the ends of its interval for 90 % of fine-tunes; NaN of a probability
    source            whether weights or responses told
    doubtful          whether what is decoded lies beyond all that the auditor learned from

    base, auditor: as the command has them. InputError if it is refused: not a fine-tune of the base as training left it.
    """
    import pandas as pd

    if (checkpoint is None) == (adapter is None):
        raise InputError("expected one of checkpoint and adapter: name what is to be audited")
    paths = (None if path is None else Path(path) for path in (base, checkpoint, adapter, auditor))
    answer = answer_for(*paths)
    warned = {warning.partition(":")[0].replace(" ", "_") for warning in answer["warnings"]}
    rows = [
        {
            "characteristic": name,
            "label": label if name in ("present", "proportions") else "",
            "value": found.get("value", found.get("probability")),
            "low": found.get("low", math.nan),
            "high": found.get("high", math.nan),
            "source": answer[name]["from"],
            "doubtful": name in warned,
        }
        for name in ("present", "proportions", "images", "label_noise")
        for label, found in answer[name]["found"].items()
    ]
    return pd.DataFrame(rows)


def main() -> None:
    arguments = parse()
    pin_threads()
    if arguments.example:
        base = load_base(arguments.base) if arguments.base else None
        show_examples(*find_auditor(arguments.auditor, base))
        return
    answer = answer_for(arguments.base, arguments.checkpoint, arguments.adapter, arguments.auditor)
    if arguments.json:
        json.dump(answer, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(describe(answer))


if __name__ == "__main__":
    run(main)
