"""Tell from a fine-tuned network what it was trained on: which classes, in which proportions, how many images, how noisy labels.

Needs what 'dvc repro recover_memory' makes: decoders that learned from fine-tunes of the same base. Intervals held for 90 % of fine-tunes
left out of training, and probabilities are calibrated on them. Refused is a checkpoint that does not descend from the base, or whose
change is none that tuning the whole network makes: too small or large, turned round (negated), of low rank (LoRA), sparse or noisy.
Where a change or a value is unlike what was learned from, intervals are wider and the table says so: do not trust it then.
Not told apart: a change scaled by less than other learning rates do, and the average of two fine-tunes (it is told their average).

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
from stages.common.files import load_metadata
from stages.common.images import load_images
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.common.vectors import Layout
from stages.common.work import fingerprint
from stages.recall.condense import Condenser
from stages.recall.decoders import REPRESENTATIONS, Decoder, read
from stages.recall.fleet import split_test
from stages.recall.fleet_files import CONDENSE_CHANGES, load_fitted, without_prefix
from stages.recall.functional_vit import FIXED, Base, load_base
from stages.recall.objective import Objective
from stages.recall.typicality import Typicality, check, read_traits

CONDENSED = CONDENSE_CHANGES / "classes.safetensors"
DECODERS = Path("models/recover_memory/decoders.safetensors")

BESIDE = ("head.", "fc_norm.", "decoder.", FIXED)  # what a fine-tuned network may have beside the encoder's weights
# 2^40 images: more than anybody has, and a number that can be written
RANGES = {"proportions": (0.0, 1.0), "log2_size": (0.0, 40.0), "label_noise": (0.0, 1.0)}


def read_change(path: Path, base: Base) -> Float[np.ndarray, " w"]:
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
    sources = metadata["reads"].items()
    return {name: (source, Decoder(**without_prefix(arrays, f"{name}."))) for name, source in sources}


def gives(source: str) -> str:
    """Return in a word what a representation is made of."""
    kinds = {"responses" if name == "responses" else "weights" for name in REPRESENTATIONS[source]}
    return " and ".join(sorted(kinds, reverse=True))


def read_base(base_file: Path, metadata: dict[str, Any]) -> Base:
    """Return the base; InputError if it is not the one whose fine-tunes the decoders know."""
    base, expected = load_base(base_file), load_base(Path(metadata["base"]))
    same = base.encoder.keys() == expected.encoder.keys() and all(
        torch.equal(weight, expected.encoder[name]) for name, weight in base.encoder.items()
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


def respond(base: Base, change: Float[np.ndarray, "1 w"], dataset: str, inputs: int) -> Float[np.ndarray, "1 r"]:
    """Return the responses of base + change to the reference inputs."""
    objective = Objective(base, "labels", 0.0)
    _, test = load_images(dataset, torch.device("cpu"))
    references, _ = split_test(test, inputs)
    with torch.no_grad():
        vector = objective.start + torch.from_numpy(change[0])
        return objective.respond(vector, objective.frozen, base.patchify(references.images)).numpy()[None]


def recall(checkpoint: Path, base_file: Path) -> dict[str, Any]:
    """Return what a checkpoint was trained on, as far as its weights and responses tell, and what is to be doubted."""
    fitted, typical, metadata = load_fitted("classes")
    layout, base = Layout.from_metadata(metadata), read_base(base_file, metadata)
    condenser, typicality = Condenser.from_arrays(fitted, layout), Typicality(**typical)
    change = read_change(checkpoint, base)[None]
    traits = read_traits(change, layout, condenser.span, typicality.direction)
    check(str(checkpoint), traits, typicality)
    responses = respond(base, change, metadata["dataset"], metadata["answers"][1])
    descriptions = condenser.condense(change, responses)
    distance = float(typicality.distance(traits)[0])
    answer: dict[str, Any] = {
        "outside": float(traits.outside[0]),
        "limit": float(typicality.limit),
        "distance": distance,
        "warnings": [],
    }
    if distance > 1:
        answer["warnings"].append(
            f"the change as a whole is unlike known fine-tunes: {distance:.1f} times as far from their mean as 99 % of them"
        )
    for name, (source, decoder) in load_decoders(DECODERS, CONDENSED).items():
        scores = decoder.predict(read(descriptions, source))[0]
        doubt = decoder.doubt(scores)
        found = tell(name, decoder, scores, doubt * max(1.0, distance), metadata["classes"])
        key = "images" if name == "log2_size" else name
        answer[key] = {"from": gives(source), "found": found}
        if (doubt > 1).any():
            answer["warnings"].append(beyond(key, decoder))
    return answer


def tell(
    name: str, decoder: Decoder, scores: Float[np.ndarray, " t"], doubt: Float[np.ndarray, " t"], classes: list[str]
) -> dict[str, dict[str, float]]:
    """Return a characteristic, of each class if it is of classes: a probability, or a value and its interval."""
    if name == "present":
        chances = decoder.probabilities(decoder.known(scores), doubt)
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


def describe(answer: dict[str, Any]) -> str:
    """Return the answer as a table; what is to be doubted comes first."""
    present, proportions = answer["present"], answer["proportions"]
    lines = [f"DO NOT TRUST: {warning}" for warning in answer["warnings"]]
    lines.append(f"{'class':16s} present   share (90 % interval)")
    for name, found in present["found"].items():
        chance, share = f"{found['probability']:6.1%}", proportions["found"][name]
        lines.append(f"{name:16s} {chance}   {share['value']:5.1%} ({share['low']:.0%} to {share['high']:.0%})")
    lines.append(f"present is read from {present['from']}, shares from {proportions['from']}")
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
