"""Which neurons of a network may be relabelled: python -m stages.weightnet.symmetry --arch torchvision:convnext_tiny

Prints each group of neurons with its size, and every axis of every tensor that is permuted with it; --json gives the same for programs
(merging, pruning, graph networks): for each group the tensors, axes and indices [start + step * i, ... + block) of its neuron i.
--arch is what `stages.weightnet.predict` takes; images are those of --input-shape (3 224 224 for torchvision and timm, else 1 8 8).

--align a b reads two files of weights and brings the neurons of b into the order of a (weight matching). With --dataset it says how far
the loss on the straight line between them rises on its test images, before and after; otherwise how far the weights are apart.
--save writes b in a's order.

The network's steps are compared with the module's own, and the symmetry is tried out by relabelling every group, before it is printed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stages.common.checkpoints import load_weights
from stages.common.files import atomic_path
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.weightnet.build_zoo import Params
from stages.weightnet.tracing.alignment import align, distance, loss_barrier
from stages.weightnet.tracing.program import ROUNDING, Program, Weights
from stages.weightnet.tracing.symmetry import Symmetry, derive_symmetry, permute, symmetry_error
from stages.weightnet.user_networks import check_places, user_program
from stages.weightnet.zoo.architectures import ARCHITECTURES
from stages.weightnet.zoo.reading import zoo_images

CLASSES = 10  # of an architecture of the zoo


def tried(arch: str, program: Program, weights: Weights | None = None) -> Symmetry:
    """Return the symmetry of a program that was tried out on weights, by default on random ones; InputError if it does not hold."""
    symmetry = derive_symmetry(program)
    random = generator(0, "symmetry")
    if weights is None:
        weights = {name: 0.5 + torch.rand(1, *shape, generator=random) for name, shape in program.layout.shapes.items()}
        for name, value in weights.items():
            if value.dim() > 2:
                weights[name] = (value - 1) / value[0, 0].numel() ** 0.5
    error = symmetry_error(program, symmetry, weights, random)
    if not error < ROUNDING:
        raise InputError(
            f"--arch {arch}: relabelling hidden neurons changes the outputs by {error:.1e}: its symmetry is unknown"
        )
    return symmetry


def describe(symmetry: Symmetry) -> dict[str, Any]:
    """Return a symmetry as plain values: the groups, and what of each tensor is permuted with each."""
    groups: dict[str, dict[str, Any]] = {}
    for group, size in symmetry.sizes.items():
        parent = symmetry.blocks.get(group)
        groups[group] = {"size": size, "permuted": group in symmetry.free, "tensors": []}
        if parent is not None:
            groups[group] |= {"blocks": symmetry.parents[parent], "blocks_move_as": parent}
    for axis in symmetry.axes:
        for part in axis.parts:
            step = part.block if part.step is None else part.step
            found = {"tensor": axis.tensor, "axis": axis.axis, "start": part.start, "step": step, "block": part.block}
            groups[part.group]["tensors"].append(found | ({"groups": axis.blocks} if axis.blocks > 1 else {}))
    return groups


def read_pair(paths: list[Path], arch: str, program: Program) -> list[Weights]:
    """Return two networks' weights, [1, ...] each."""
    pair = []
    for path in paths:
        found, notes = load_weights(
            path, program.layout.shapes, (*program.unused, *program.whole), torch.float32, f"--arch {arch}"
        )
        for note in notes:
            print(f"{path}: {note}", file=sys.stderr)
        check_places(path, arch, program)
        pair.append({name: found[name][None] for name in program.layout.shapes})
    return pair


def measured(program: Program, pair: list[Weights], dataset: str | None) -> tuple[str, float]:
    """Return what is measured between two networks, and its value: the loss barrier on a data set's test images, else a distance."""
    if dataset is None:
        return "distance of the weights, over the length of the first's", distance(*pair)
    params = Params.load("build_zoo", dataset, next(iter(ARCHITECTURES))).images
    images, labels = zoo_images(dataset, params, torch.device("cpu")).test
    if tuple(images.shape[1:]) != program.input_shape:
        raise InputError(
            f"images of {dataset} are {tuple(images.shape[1:])}, and the network's {program.input_shape}: --input-shape"
        )
    return f"loss barrier on test images of {dataset}, in nats", loss_barrier(program, pair[0], pair[1], images, labels)


def print_aligned(arguments: argparse.Namespace, program: Program) -> None:
    """Align the second network to the first, say what changed, and write it where it is asked for."""
    first, second = read_pair(arguments.align, arguments.arch, program)
    symmetry = tried(arguments.arch, program, first)
    orders = align(first, second, symmetry, generator(0, "alignment"))
    moved = permute(second, symmetry, orders)
    what, before = measured(program, [first, second], arguments.dataset)
    after = measured(program, [first, moved], arguments.dataset)[1]
    if arguments.save:
        with atomic_path(arguments.save) as temporary:
            save_file({name: value[0].contiguous() for name, value in moved.items()}, temporary)
    if arguments.json:
        print(json.dumps({"measure": what, "before": before, "after": after}, allow_nan=False))
    else:
        print(f"{what}: {before:.4f} as they are, {after:.4f} with neurons in one order")


def main() -> None:
    """Read the command line, and print the symmetry or what an alignment changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", required=True, help="what the network is")
    parser.add_argument(
        "--input-shape", type=int, nargs="+", metavar="N", help="of an image: C H W, H W, or a number in a row"
    )
    parser.add_argument("--allow-code", action="store_true", help="import and call package.module:function")
    parser.add_argument("--align", type=Path, nargs=2, metavar=("A", "B"), help="files of weights")
    parser.add_argument("--dataset", help="the images of the loss barrier, as the zoo's networks see them")
    parser.add_argument(
        "--save", type=Path, help="where to write the second network in the first's order (.safetensors)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    pin_threads()
    known = arguments.arch.partition(":")[0] in ("torchvision", "timm")
    shape = tuple(arguments.input_shape or ((3, 224, 224) if known else (1, 8, 8)))
    program = user_program(arguments.arch, shape, CLASSES, arguments.allow_code)
    if arguments.align:
        print_aligned(arguments, program)
        return
    symmetry = tried(arguments.arch, program)
    if arguments.json:
        json.dump({"groups": describe(symmetry), "notes": program.notes}, sys.stdout, indent=1)
        print()
        return
    print(symmetry)
    for note in program.notes:
        print(note)


if __name__ == "__main__":
    run(main)
