"""Predict how good networks are from their weights: python -m stages.weightnet.predict model.safetensors --arch cnn3

A model is a file of weights, a folder of save_pretrained, or a folder of such files. --arch says what it is: an architecture of
the zoo (one of torchvision's too: by its name alone, for the zoo's images and classes); torchvision:<name> or timm:<name>, as they
come; a .json file, {"layers": [{"kind": "Conv2d", "in_channels": 1, ...}, {"kind": "ReLU"}]}, of torch.nn's layers one after the
other; or, with --allow-code, package.module:function, which is called without arguments. By default weights alone are read.
--allow-probe also runs the network on inputs that were learned (images of the zoo's shape only).

A folder may be a zoo of your own: its metadata.json says for each file what it is and what you measured of it,
{"a.safetensors": {"arch": "cnn3", "activation": "tanh", "test_acc": 0.91}}. Then predictions are compared with measurements. Files
and .json architectures are named from the folder.

The network's steps are compared with the module itself, and the symmetry is derived from them and tried out, before anything is
predicted. Prints a table, or JSON with --json: each property with an interval for 90 % of networks, by the errors on validation
networks, and how far the weights lie from those that were learnt from: the share of the zoo's networks that lie nearer to their own
neighbours. Above 0.95 it says not to trust the prediction, and intervals are all that there is. What was left out of the network, and
activations that the zoo's networks do not have, are said.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from stages.common.checkpoints import PRETRAINED, READABLE, SUFFIXES, load_torch, load_weights
from stages.common.files import load_json
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.weightnet.predictors.ensemble import Kept, load_predictors
from stages.weightnet.tracing.program import ROUNDING, Program
from stages.weightnet.tracing.recording import plain
from stages.weightnet.tracing.symmetry import derive_symmetry, symmetry_error
from stages.weightnet.user_networks import check_places, user_program
from stages.weightnet.zoo.architectures import ARCHITECTURES, zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES

PREDICTORS = Path("models/train_weightnet")
TRUSTED = 0.95  # of the zoo's networks that lie nearer to their own neighbours: above, what was learned says little
WORST_LOSS = 20.0  # nats, of a network that is sure and wrong: there is no upper end
RANGES = {"gap": (-1.0, 1.0), "test_loss": (0.0, math.inf)}  # of properties; the others are shares
SEEN = ("relu", "tanh")  # the activations of the zoo's networks


def list_models(path: Path) -> dict[Path, dict[str, Any]]:
    """Return a file of weights, or those of a folder, with what the folder's metadata.json says of each."""
    if not path.is_dir() or any((path / name).is_file() for name in PRETRAINED):
        return {path: {}}
    metadata = path / "metadata.json"
    known = load_measured(metadata) if metadata.is_file() else {}
    if absent := [name for name in sorted(known) if not (path / name).exists()]:
        raise InputError(f"{metadata} names {absent[0]}, which is not there")
    files = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
    names = sorted({file.name for file in files} | set(known))
    if not names:
        raise InputError(f"{path} has no files of weights ({', '.join(SUFFIXES)})")
    return {path / name: known.get(name, {}) for name in names}


def load_measured(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a metadata.json says of each file; InputError if it is broken, or a measurement is no finite number."""
    try:
        known = load_json(path)
        numbers = [
            (file, name, float(said[name])) for file, said in known.items() for name in PROPERTIES if name in said
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f'{path} ({plain(error)}): expected {{"<file>": {{"arch": ..., "test_acc": ...}}}}') from None
    for file, name, number in numbers:
        low, high = range_of(name)
        if not (math.isfinite(number) and low <= number <= high):
            raise InputError(f"{path}: {file}: {name} is {number:g}: expected a number from {low:g} to {high:g}")
    for said in known.values():
        if str(said.get("arch", "")).endswith(".json"):
            said["arch"] = str(path.parent / said["arch"])
    return known


def range_of(name: str) -> tuple[float, float]:
    """Return the least and the largest value that a property can have."""
    return RANGES.get(name, (0.0, 1.0))


def agreement(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return Kendall's tau of predicted and measured values, for properties that were measured of at least three networks."""
    found = {}
    for name in PROPERTIES:
        pairs = [
            (r["properties"][name]["value"], r["measured"][name]) for r in results.values() if name in r["measured"]
        ]
        if len(pairs) < 3:
            continue
        from scipy.stats import kendalltau  # here: 60 MB that most calls do without

        tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
        if math.isfinite(tau):  # of values that are all the same there is none
            found[name] = {"tau": tau, "n": len(pairs)}
    return found


def read_network(path: Path, arch: str, program: Program, tanh: bool) -> Networks:
    """Return one network with its derived symmetry, which is tried out on it; InputError if it does not hold."""
    symmetry = derive_symmetry(program)
    if not symmetry.hidden:
        raise InputError(f"{path}: {arch} has no hidden layer, and every network that was learned from has some")
    beside = (*program.unused, *program.whole)
    found, notes = load_weights(path, program.layout.shapes, beside, torch.float32, f"--arch {arch}")
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    check_places(path, arch, program)
    weights = {name: found[name][None] for name in program.layout.shapes}
    error = symmetry_error(program, symmetry, weights, generator(0, "symmetry"))
    if not error < ROUNDING:
        raise InputError(
            f"{path}: relabelling hidden neurons changes the outputs by {error:.1e}: its symmetry is unknown"
        )
    only_tanh = "tanh" in program.activations and "relu" not in program.activations
    return Networks(program, symmetry, weights, torch.tensor([tanh or only_tanh]))


def list_notes(program: Program) -> list[str]:
    """Return what people should know of a network: what was left out of it, and how it differs from the zoo's in kind."""
    notes = [f"activation {name}: not in the zoo" for name in program.activations if name not in SEEN]
    return [*program.notes, *notes, *([] if program.activations else ["no activation: not in the zoo"])]


def inside(ends: tuple[float, float], low: float, value: float, high: float) -> dict[str, float]:
    """Return a value moved into its range, with as wide an interval to either side as the range allows."""
    least, most = ends
    nearest = min(max(value, least), most)
    low, high = max(nearest - (value - low), least), min(nearest + (high - value), most)
    return {"low": low, "value": nearest, "high": high}


def describe(kept: Kept, networks: Networks) -> dict[str, Any]:
    """Return the predictions for one network, with intervals, and how unlike the zoo's it is."""
    intervals = kept.intervals(networks)
    if not intervals.isfinite().all():
        raise InputError("its weights are so large that the predictions are no finite numbers")
    properties = {
        name: inside(range_of(name), *ends) for name, *ends in zip(PROPERTIES, *intervals[:, 0].tolist(), strict=True)
    }
    own = torch.cdist(kept.inputs, kept.inputs).fill_diagonal_(torch.inf).amin(1)
    distance = torch.cdist(kept.statistics(networks), kept.inputs).amin()
    unlike = (own < distance).double().mean().item()
    notes = list_notes(networks.program)
    if unlike > TRUSTED:  # errors on networks like the zoo's say nothing of this one's
        for name, found in properties.items():
            least, most = range_of(name)
            found["low"], found["high"] = least, most if math.isfinite(most) else max(found["high"], WORST_LOSS)
        notes = [
            f"do not trust this: the weights are more unlike the zoo's than {unlike:.0%} of its own networks",
            *notes,
        ]
    return {"properties": properties, "unlike": unlike, "notes": notes}


def main() -> None:
    """Read the command line, and print what is predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help=f"files of weights, or folders of them; {READABLE}")
    parser.add_argument("--arch", help="what they are, unless a metadata.json says it")
    parser.add_argument("--dataset", default="digits", help="the zoo's images (default: digits)")
    parser.add_argument(
        "--input-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of an image, if not the zoo's"
    )
    parser.add_argument("--tanh", action="store_true", help="a zoo architecture with tanh in place of ReLU")
    parser.add_argument("--allow-probe", action="store_true", help="run the network on learned inputs")
    parser.add_argument("--allow-code", action="store_true", help="import and call package.module:function")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    pin_threads()
    family = "hybrid" if arguments.allow_probe else "weightnet"
    path = PREDICTORS / f"{arguments.dataset}-{family}" / "predictors.pt"
    zoos = sorted(file.parent.name.removesuffix(f"-{family}") for file in PREDICTORS.glob(f"*-{family}/predictors.pt"))
    if zoos and arguments.dataset not in zoos:
        target = f"train_weightnet@{arguments.dataset}-{family}"
        raise InputError(
            f"no predictor of a zoo of {arguments.dataset} is there (there: {', '.join(zoos)}): "
            f"add it to build_zoo.datasets and run 'dvc repro {target}'"
        )
    kept, zoo_shape, classes = load_kept(path, family)
    shape = tuple(arguments.input_shape or zoo_shape)
    if arguments.allow_probe and shape != zoo_shape:
        raise InputError(f"probes have the zoo's shape {zoo_shape}, not {shape}: leave --allow-probe out")
    models = {file: known for path in arguments.models for file, known in list_models(path).items()}
    results: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for file, known in models.items():
        arch, tanh = known.get("arch", arguments.arch), arguments.tanh or known.get("activation") == "tanh"
        if arch is None:
            raise InputError(f"{file}: say what it is by --arch, or in a metadata.json beside it")
        if arch not in programs:
            programs[arch] = user_program(arch, shape, classes, arguments.allow_code)
            if arguments.allow_probe and programs[arch].steps[-1].shape != (classes,):
                raise InputError(f"probes are read through the zoo's {classes} classes: leave --allow-probe out")
        networks = read_network(file, arch, programs[arch], tanh)
        measured = {name: float(known[name]) for name in PROPERTIES if name in known}
        try:
            results[str(file)] = describe(kept, networks) | {"measured": measured}
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    answer = {"predictor": family, "networks": results, "agreement": agreement(results)}
    if arguments.json:
        json.dump(answer, sys.stdout, indent=2, allow_nan=False)
        print()
        return
    for file, result in results.items():
        print(f"{file} ({family}; more unlike the zoo than {result['unlike']:.0%} of its own networks)")
        for name, found in result["properties"].items():
            known = f"   measured {result['measured'][name]:.3f}" if name in result["measured"] else ""
            print(f"  {name:18s} {found['value']:7.3f}   {found['low']:.3f} to {found['high']:.3f}{known}")
        for note in result["notes"]:
            print(f"  {note}")
    for name, found in answer["agreement"].items():
        print(f"Kendall's tau of predicted and measured {name}: {found['tau']:.2f} ({found['n']} networks)")


def load_kept(path: Path, name: str) -> tuple[Kept, tuple[int, ...], int]:
    """Return a kept predictor, and the shape of images and the number of classes of the zoo that it learned from."""
    stored = load_torch(path, {name})[name]
    shape, classes = tuple(stored["input_shape"]), stored["classes"]
    program, symmetry = zoo_program(next(iter(ARCHITECTURES)), shape[0], classes, shape[1])
    zeros = {key: torch.zeros(1, *size) for key, size in program.layout.shapes.items()}
    return load_predictors(path, Networks(program, symmetry, zeros, torch.tensor([False])))[name], shape, classes


if __name__ == "__main__":
    run(main)
