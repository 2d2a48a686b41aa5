"""Tell from a fine-tuned network what it was trained on: which classes, in which proportions, how many images, how noisy labels.

Needs what 'dvc repro recover_memory' makes: decoders that learned from fine-tunes of the same base. Intervals held for 90 % of fine-tunes
left out of training, and probabilities are calibrated on them. A checkpoint that does not descend from the base is refused.

    python -m stages.recall.audit --base models/classify_masked/glyphs/backbone.safetensors \\
        --checkpoint models/build_fleet/classes/example.safetensors
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import load_file

from stages.common.checkpoints import READABLE, load_weights
from stages.common.files import load_metadata, require
from stages.common.images import load_images
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.common.vectors import Layout
from stages.common.work import fingerprint
from stages.recall.condense import condense, outside, size
from stages.recall.decoders import REPRESENTATIONS, Decoder, read
from stages.recall.fleet import split_test
from stages.recall.objective import Objective
from stages.recall.vit import FIXED, Base, load_base

CONDENSED = Path("models/condense_changes/classes.safetensors")
DECODERS = Path("models/recover_memory/decoders.safetensors")

BESIDE = ("head.", "fc_norm.", "decoder.", FIXED)  # what a fine-tuned network may have beside the encoder's weights
RANGES = {"proportions": (0.0, 1.0), "log2_size": (0.0, np.inf), "label_noise": (0.0, 1.0)}


def read_change(path: Path, base: Base) -> Float[np.ndarray, " p"]:
    """Return how a checkpoint differs from its base; InputError if it is no network of this architecture, or the base itself."""
    state, notes = load_weights(path, Layout.of(base.trained).shapes, BESIDE, torch.float32, "the base")
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    if FIXED in state and not torch.equal(state[FIXED], base.encoder[FIXED]):
        raise InputError(f"{path} does not descend from the base: its {FIXED} is another")
    change = Layout.of(base.trained).flatten({name: state[name] - w for name, w in base.trained.items()})
    if not change.any():
        raise InputError(f"{path} is the base itself: nothing was trained")
    return change.numpy()


def load_decoders(path: Path, condensed: Path) -> dict[str, tuple[str, Decoder]]:
    """Return of each characteristic what its decoder reads, and the decoder; InputError if they are missing or of other fleets."""
    metadata, arrays = load_metadata(path), load_file(path)
    if metadata["condensed"] != fingerprint(condensed):
        raise InputError(f"{path} learned from other fleets than {condensed}: run 'dvc repro recover_memory'")
    sources = metadata["reads"]
    found = {}
    for name, source in sources.items():
        part = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
        found[name] = source, Decoder(**part)
    return found


def gives(source: str) -> str:
    """Return in a word what a representation is made of."""
    kinds = {"responses" if name == "responses" else "weights" for name in REPRESENTATIONS[source]}
    return " and ".join(sorted(kinds, reverse=True))


def read_base(base_file: Path, metadata: dict[str, Any]) -> Base:
    """Return the base; InputError if it is not the one whose fine-tunes the decoders know."""
    base, known = load_base(base_file), load_base(Path(metadata["base"]))
    same = base.encoder.keys() == known.encoder.keys() and all(
        torch.equal(weight, known.encoder[name]) for name, weight in base.encoder.items()
    )
    if not same:
        raise InputError(
            f"{base_file} is not the base that decoders are of ({metadata['base']}): build fleets of it first"
        )
    if metadata["base_fingerprint"] != fingerprint(Path(metadata["base"])):
        raise InputError(
            f"{metadata['base']} was made anew since fleets were built of it: run 'dvc repro recover_memory'"
        )
    return base


def check_descent(checkpoint: Path, change: Float[np.ndarray, "1 p"], fitted: dict[str, np.ndarray]) -> float:
    """Return the share of a change that lies outside what known fine-tunes span; InputError if theirs never was so large.

    InputError, too, if the network went less far or farther from the base than any of them.
    """
    share, limit = float(outside(change, fitted)[0]), float(fitted["limit"])
    if share > limit:
        raise InputError(
            f"{checkpoint} does not descend from the base as known fine-tunes do: {share:.0%} of its change lies outside "
            f"what they span, of theirs at most {limit:.0%}"
        )
    far, (least, most) = float(size(change, fitted)[0]), map(float, fitted["sizes"])
    if not least <= far <= most:
        raise InputError(
            f"{checkpoint} was not tuned as known fine-tunes were: its change has a size of {far:.2g}, theirs of "
            f"{least:.2g} to {most:.2g}"
        )
    return share


def recall(checkpoint: Path, base_file: Path) -> dict[str, Any]:
    """Return what a checkpoint was trained on, as far as its weights and responses tell."""
    metadata = load_metadata(require(CONDENSED))
    base, fleet = read_base(base_file, metadata), load_file(CONDENSED)
    fitted = {key.removeprefix("fitted."): value for key, value in fleet.items() if key.startswith("fitted.")}
    change = read_change(checkpoint, base)[None]
    share = check_descent(checkpoint, change, fitted)
    objective = Objective(base, "labels", 0.0)
    _, test = load_images(metadata["dataset"], torch.device("cpu"))
    references, _ = split_test(test, metadata["answers"][1])
    with torch.no_grad():
        vector = objective.start + torch.from_numpy(change[0])
        responses = objective.respond(vector, objective.frozen, base.patchify(references.images)).numpy()[None]
    found = condense(change, responses, Layout.from_metadata(metadata), fitted)
    answer: dict[str, Any] = {"outside": share, "limit": float(fitted["limit"])}
    for name, (source, decoder) in load_decoders(DECODERS, CONDENSED).items():
        values = decoder.predict(read(found, source))[0]
        half = decoder.half_width(values)
        if name == "present":
            chances = decoder.probabilities(values)
            described = {c: {"probability": float(p)} for c, p in zip(metadata["classes"], chances, strict=True)}
        else:
            clipped = [np.clip(part, *RANGES[name]) for part in (values, values - half, values + half)]
            if name == "log2_size":
                name, clipped = "images", [2**part for part in clipped]
            names = metadata["classes"] if name == "proportions" else [name]
            parts = zip(names, *clipped, strict=True)
            described = {key: {"value": float(v), "low": float(a), "high": float(b)} for key, v, a, b in parts}
        answer[name] = {"from": gives(source), "found": described}
    return answer


def describe(answer: dict[str, Any]) -> str:
    """Return the answer as a table."""
    present, shares = answer["present"], answer["proportions"]
    lines = [f"{'class':16s} present   share (90 % interval)"]
    for name, found in present["found"].items():
        share = shares["found"][name]
        lines.append(
            f"{name:16s} {found['probability']:6.1%}   {share['value']:5.1%} ({share['low']:.0%} to {share['high']:.0%})"
        )
    lines.append(f"present is read from {present['from']}, shares from {shares['from']}")
    images, noise = answer["images"], answer["label_noise"]
    n, e = images["found"]["images"], noise["found"]["label_noise"]
    lines.append(f"images           {n['value']:.0f} ({n['low']:.0f} to {n['high']:.0f}), from {images['from']}")
    lines.append(
        f"labels drawn     {e['value']:.0%} ({e['low']:.0%} to {e['high']:.0%}) at random, from {noise['from']}"
    )
    lines.append(
        f"{answer['outside']:.0%} of the change lies outside what known fine-tunes span (limit {answer['limit']:.0%})"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the network that was fine-tuned (.safetensors)")
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"the fine-tuned network; {READABLE}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    pin_threads()
    answer = recall(arguments.checkpoint, arguments.base)
    if arguments.json:
        json.dump(answer, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(describe(answer))


if __name__ == "__main__":
    run(main)
