"""Networks that users name: torchvision's, timm's, .json files of layers, functions of their own."""

import argparse
import importlib
import inspect
import json
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from stages.common.checkpoints import load_weights
from stages.common.files import load_json
from stages.common.randomness import generator
from stages.common.stage import InputError
from stages.weightnet.as_classifier import TRIED, Shape, as_classifier, border_of, how_given
from stages.weightnet.tracing.program import ROUNDING, Program, trace
from stages.weightnet.tracing.recording import plain
from stages.weightnet.tracing.symmetry import derive_symmetry, symmetry_error
from stages.weightnet.zoo.architectures import ARCHITECTURES, build_network
from stages.weightnet.zoo.networks import Networks

T = TypeVar("T")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command that reads users' networks asks of them."""
    parser.add_argument("--allow-code", action="store_true", help="import and call package.module:function")
    parser.add_argument(
        "--pixels",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("MEAN", "STD"),
        help="mean and deviation of the pixels that the networks were trained on (default: 0 1, as the zoo's; in an exam: found out)",
    )


def build_user_network(arch: str, shape: tuple[int, ...], classes: int, allow_code: bool) -> nn.Module:
    """Return an untrained network of the architecture that `arch` names; what others' code raises is not translated."""
    if arch.endswith(".json"):
        return build_from_spec(Path(arch))
    origin, _, name = arch.rpartition(":")
    if not origin:
        return build_network(arch, shape[0], classes, shape[1])
    if origin == "torchvision":
        return importlib.import_module("torchvision.models").get_model(name, weights=None)
    if origin == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=False)
    if not allow_code:
        raise InputError(f"--arch {arch} runs code of yours: allow it by --allow-code")
    return build_by_code(arch, origin, name)


def build_by_code(arch: str, origin: str, name: str) -> nn.Module:
    """Return the network that others' code holds, or makes when it is called without arguments; origin: a module, or its file."""
    if origin.endswith(".py"):
        sys.path.insert(0, str(Path(origin).parent))  # of the process that runs it
        origin = Path(origin).stem
    made = getattr(importlib.import_module(origin), name)
    if not isinstance(made, nn.Module):
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            how = "give them defaults, or name a function that returns the network"
            raise InputError(f"--arch {arch} is called without arguments ({plain(error)}): {how}") from None
        except ValueError:  # a function whose arguments are not known
            pass
        made = made()
    if not isinstance(made, nn.Module):
        raise InputError(f"--arch {arch} is a {type(made).__name__}: expected a torch.nn.Module, or what returns one")
    return made


def build_classifier(
    arch: str, shape: Shape, classes: int, allow_code: bool, takes: Shape | None
) -> tuple[nn.Module, list[str]]:
    """Return the same for images of `shape`, whatever it takes (`as_classifier`), and notes for people; a zoo's takes its images."""
    module = build_user_network(arch, shape, classes, allow_code)
    if ":" not in arch and not arch.endswith(".json"):
        return module.eval(), []
    module = as_classifier(module, shape, classes, takes)
    return module, how_given(module, shape)


def user_program(arch: str, shape: Shape, classes: int, allow_code: bool, takes: Shape | None = None) -> Program:
    """Return the program of the architecture that `arch` names, for images of `shape`; InputError if there is none.

    takes: the shape in which the network is given them, if not as they are; None: found out.
    """

    def follow() -> Program:
        module, notes = build_classifier(arch, shape, classes, allow_code, takes)
        program = trace(module, shape)
        return replace(program, notes=(*program.notes, *notes))

    return follow() if arch in ARCHITECTURES else in_own_process(follow, arch)


def bordered_program(
    arch: str, shape: Shape, classes: int, allow_code: bool, takes: Shape | None = None
) -> tuple[Program, int] | None:
    """Return the program for images with a border that makes them as large as the network takes them, and how wide that is.

    None if no border that people use does. Arguments as `user_program` has them.
    """

    def follow() -> tuple[Program, int] | None:
        module, _ = build_classifier(arch, shape, classes, allow_code, takes)
        border = border_of(module, shape)
        channels, height, width = shape
        return (trace(module, (channels, height + 2 * border, width + 2 * border)), border) if border else None

    return in_own_process(follow, arch)


def zoos_that_fit(
    arch: str, zoos: dict[str, tuple[Shape, int]], allow_code: bool, takes: Shape | None = None
) -> list[str]:
    """Return the zoos whose images and classes a network takes, as they are; if there are none, in another shape.

    zoos: the shape of an image and the number of classes by name; takes: the shape that the network was made for, if that is known.
    """

    def fits(shape: Shape, classes: int, given: Shape | None) -> bool:
        try:
            module, _ = build_classifier(arch, shape, classes, allow_code, given)
            outputs = module(torch.zeros(TRIED, *shape))
        except Exception:  # others' code may raise anything
            return False
        return isinstance(outputs, torch.Tensor) and outputs.shape == (TRIED, classes)

    def try_all() -> list[str]:
        build_user_network(arch, *next(iter(zoos.values())), allow_code)  # what it raises is told
        exactly = [name for name, (shape, k) in zoos.items() if takes in (None, shape) and fits(shape, k, shape)]
        return exactly or [name for name, (shape, k) in zoos.items() if fits(shape, k, takes)]

    return in_own_process(try_all, arch)


def in_own_process(compute: Callable[[], T], arch: str) -> T:
    """Return what is computed with others' code, in a process of its own; InputError if that fails, whatever it does.

    What it imports (torchvision: 160 MB) ends with the process, and so do crashes.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")  # a new interpreter would import torch again
    child = fork.Process(target=_send_result, args=(receive, send, compute, arch))
    child.start()
    send.close()
    try:
        result = receive.recv()
    except (EOFError, OSError):
        result = InputError(f"--arch {arch}: its code ended the process that ran it")
    finally:
        child.kill()  # it may have threads that go on
        child.join()
    if isinstance(result, InputError):
        raise result
    return result


def _send_result(receive: Connection, send: Connection, compute: Callable[[], T], arch: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is reported once, by the parent
    receive.close()
    try:
        with redirect_stdout(sys.stderr):  # what others' code prints is no answer of ours
            result: T | InputError = compute()
    except InputError as error:
        result = error
    except Exception as error:  # others' code may raise anything
        result = InputError(f"--arch {arch}: {plain(error)}")
    send.send(result)


def load_unique(path: Path) -> dict[str, Any]:
    """Return the mapping of a .json file whose keys come once each; InputError if it is missing, broken, or names one twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
            raise InputError(f"{path} names {twice[0]} twice")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it says of each file what it is and what was measured") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({plain(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f'{path}: expected {{"<file>": {{"arch": ..., "test_acc": ...}}}}')
    return value


LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        *(nn.Conv2d, nn.Linear, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d, nn.ReflectionPad2d, nn.Upsample),
        *(nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU6, nn.Hardswish, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.PReLU),
        *(nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.LogSoftmax, nn.Softmax),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    )
}


def build_from_spec(path: Path) -> nn.Module:
    """Return the untrained network that a .json file describes; InputError if it does not."""
    try:
        layers = [(layer.pop("kind"), layer) for layer in load_json(path)["layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} describes no network ({plain(error)}): expected layers, each with its kind") from None
    if unknown := [kind for kind, _ in layers if kind not in LAYERS]:
        raise InputError(f"{path}: no layer {unknown[0]} is known (there: {', '.join(LAYERS)})")
    try:
        return nn.Sequential(*(LAYERS[kind](**options) for kind, options in layers))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {plain(error)}") from None


def read_network(path: Path, arch: str, program: Program, tanh: bool, run: bool = False) -> Networks:
    """Return one network with its derived symmetry; InputError if that does not hold, unless the network is only to be run."""
    symmetry = derive_symmetry(program)
    if not (symmetry.hidden or run):
        raise InputError(f"{path}: {arch} has no hidden layer, and every network that was learned from has some")
    beside = (*program.unused, *program.whole)
    found, notes = load_weights(path, program.layout.shapes, beside, torch.float32, f"--arch {arch}")
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    check_places(path, arch, program)
    weights = {name: found[name][None] for name in program.layout.shapes}
    if not run:
        error = symmetry_error(program, symmetry, weights, generator(0, "symmetry"))
        if not error < ROUNDING:
            raise InputError(
                f"{path}: relabelling hidden neurons changes the outputs by {error:.1e}: its symmetry is unknown"
            )
    only_tanh = "tanh" in program.activations and "relu" not in program.activations
    return Networks(program, symmetry, weights, torch.tensor([tanh or only_tanh]))


def check_places(path: Path, arch: str, program: Program) -> None:
    """Compare the tables of places that a program was read with with those of a file, if it has them; InputError if they differ."""
    state = load_weights(path)[0] if program.whole else {}
    for name, expected in program.whole.items():
        for key, value in state.items():
            if (key == name or key.endswith(f".{name}")) and value.tolist() != expected:
                raise InputError(
                    f"{path}: {key} holds other places than --arch {arch} has by itself: its steps are unknown"
                )
