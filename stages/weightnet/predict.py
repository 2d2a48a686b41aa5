"""Predict how good networks are from their weights: python -m stages.weightnet.predict model.safetensors --arch cnn3

A model is a .safetensors file, a .pt file of tensors, or a folder of them. --arch says what it is: an architecture of the zoo;
torchvision:<name> or timm:<name>; or, with --allow-code, package.module:function, which is called without arguments. By default
weights alone are read. --allow-probe also runs the network on inputs that were learned (images of the zoo's shape only).

The symmetry is derived from the network and tried out on it first. Prints a table, or JSON with --json: each property with an
interval that held 90 % of the validation networks, and how far the weights lie from those that were learnt from: the share of
the zoo's networks that lie nearer to their own neighbours (above 0.95, do not trust the prediction).
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.common.checkpoints import load_torch
from stages.common.command import InputError, one_line, run
from stages.common.runtime import generator, pin_threads
from stages.weightnet.networks import ARCHITECTURES, build_network, zoo_program
from stages.weightnet.predictors import Kept, load_predictors
from stages.weightnet.program import trace
from stages.weightnet.properties import PROPERTIES
from stages.weightnet.symmetry import Networks, derive_symmetry, symmetry_error
from stages.weightnet.targets import from_scale

PREDICTORS = Path("models/train_weightnet")
COVERAGE = 0.9
ROUNDING = 1e-9  # relative, in float64: more than this is not the same function


def build_user_network(arch: str, shape: tuple[int, ...], classes: int, allow_code: bool) -> nn.Module:
    """Return an untrained network of the architecture that `arch` names; InputError if there is none."""
    origin, _, name = arch.rpartition(":")
    try:
        if not origin:
            if arch not in ARCHITECTURES:
                raise InputError(f"--arch {arch}: the zoo has {', '.join(ARCHITECTURES)}")
            return build_network(arch, shape[0], classes, shape[1])
        if origin == "torchvision":
            return importlib.import_module("torchvision.models").get_model(name, weights=None)
        if origin == "timm":
            return importlib.import_module("timm").create_model(name, pretrained=False)
        if not allow_code:
            raise InputError(f"--arch {arch} runs code of yours: allow it by --allow-code")
        return getattr(importlib.import_module(origin), name)()
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"--arch {arch}: {one_line(error)}") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; pickled code is never run. InputError if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise InputError(f"{path} cannot be read as weights ({one_line(error)[:120]})") from None
    return loaded.get("state_dict", loaded)


def read_network(path: Path, arch: str, model: nn.Module, shape: tuple[int, ...], tanh: bool) -> Networks:
    """Return one network with its derived symmetry, which is tried out on it; InputError if it does not hold."""
    program = trace(model, shape)
    symmetry = derive_symmetry(program)
    found = load_weights(path)
    for name, expected in program.shapes.items():
        got = tuple(found[name].shape) if name in found else "nothing"
        if got != expected:
            raise InputError(f"{path}: {name} of {arch} is {expected}, the file has {got}")
    weights = {name: found[name].float()[None] for name in program.shapes}
    error = symmetry_error(program, symmetry, weights, generator(0, "symmetry"))
    if not error < ROUNDING:
        raise InputError(
            f"{path}: relabelling hidden neurons changes the outputs by {error:.1e}: its symmetry is unknown"
        )
    return Networks(program, symmetry, weights, torch.tensor([tanh]))


def describe(kept: Kept, networks: Networks) -> dict[str, Any]:
    """Return the predictions for one network, with intervals, and how unlike the zoo's it is."""
    center = kept.standardised(networks)
    width = kept.errors[min(len(kept.errors) - 1, round(COVERAGE * len(kept.errors)))]
    mean, std = kept.scale["target_mean"], kept.scale["target_std"]
    ends = [from_scale((center + sign * width) * std + mean)[0] for sign in (-1, 0, 1)]
    properties = {
        name: {"low": low.item(), "value": value.item(), "high": high.item()}
        for name, low, value, high in zip(PROPERTIES, *ends, strict=True)
    }
    own = torch.cdist(kept.inputs, kept.inputs).fill_diagonal_(torch.inf).amin(1)
    distance = torch.cdist(kept.statistics(networks), kept.inputs).amin()
    return {"properties": properties, "unlike": (own < distance).double().mean().item()}


def main() -> None:
    """Read the command line, and print what is predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="files of weights, or folders of them")
    parser.add_argument("--arch", required=True, help="what they are")
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
    kept, zoo_shape, classes = load_kept(path, family)
    shape = tuple(arguments.input_shape or zoo_shape)
    if arguments.allow_probe and shape != zoo_shape:
        raise InputError(f"probes have the zoo's shape {zoo_shape}, not {shape}: leave --allow-probe out")
    files = [f for m in arguments.models for f in (sorted(m.glob("*.safetensors")) if m.is_dir() else [m])]
    if not files:
        raise InputError(f"{arguments.models[0]} has no .safetensors files")
    model = build_user_network(arguments.arch, shape, classes, arguments.allow_code)
    results = {}
    for file in files:
        networks = read_network(file, arguments.arch, model, shape, arguments.tanh)
        results[str(file)] = describe(kept, networks) | {"predictor": family}
    if arguments.json:
        json.dump(results, sys.stdout, indent=2, allow_nan=False)
        print()
        return
    for file, result in results.items():
        print(f"{file} ({family}; more unlike the zoo than {result['unlike']:.0%} of its own networks)")
        for name, found in result["properties"].items():
            print(f"  {name:18s} {found['value']:7.3f}   {found['low']:.3f} to {found['high']:.3f}")


def load_kept(path: Path, name: str) -> tuple[Kept, tuple[int, ...], int]:
    """Return a kept predictor, and the shape of images and the number of classes of the zoo that it learned from."""
    stored = load_torch(path, {name})[name]
    shape, classes = tuple(stored["input_shape"]), stored["classes"]
    program, symmetry = zoo_program(ARCHITECTURES[0], shape[0], classes, shape[1])
    zeros = {key: torch.zeros(1, *size) for key, size in program.shapes.items()}
    return load_predictors(path, Networks(program, symmetry, zeros, torch.tensor([False])))[name], shape, classes


if __name__ == "__main__":
    run(main)
