"""What optimisers left beside the weights of checkpoints, as forecasters read it: the direction of each weight's next step.

A checkpoint numbers the parameters in the order in which the optimiser was handed them, and rarely names them. They are told by their
names if these are there; by their places, where one group has as many as the network has tensors; else by their shapes. What could be
meant in two ways is refused: a wrong direction looks like any other. So are several tensors of one shape in safetensors, which are
sorted by name.

Axes: t snapshots, p weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from stages.common.containers import TORCH, ZIP, read_file, read_start, shown
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.regimes import State, direction

# in the folder of one checkpoint, as transformers and accelerate save it:
BESIDE = ("model", "pytorch_model", "adapter_model")
COMPANIONS = ("optimizer.pt", "optimizer.bin")
DEPTH = 3  # of dictionaries and lists in which an optimiser is looked for
MOMENTS = ("momentum_buffer", "exp_avg")
SMALLEST = 1e-30  # of a tensor's directions: those of 0 stay 0

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """What an optimiser keeps of one parameter. group: the settings that it shares; place: of this group; name: "" if it has none."""

    state: State
    group: State
    place: int
    name: str

    @property
    def moment(self) -> Tensor | None:
        """The first moment of its gradients, of its own shape; None if there is none."""
        moments = [self.state[name] for name in MOMENTS if isinstance(self.state.get(name), Tensor)]
        return moments[0] if moments else None

    def direction(self) -> Tensor:
        """Return `regimes.direction`; InputError if it is none that forecasters know."""
        moment = self.moment
        square = self.state.get("exp_avg_sq")
        if moment is None or (
            "exp_avg" in self.state and not (isinstance(square, Tensor) and square.shape == moment.shape)
        ):
            kept = ", ".join(map(str, self.state)) or "nothing"
            raise InputError(f"expected the moments of Adam, or the momentum of SGD or Muon, got {kept}")
        try:
            return direction(moment, self.state, self.group).float()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"its group lacks what Adam needs ({error})") from None


def optimizers_in(value: Any, depth: int = DEPTH) -> Iterator[State]:
    """Yield the states of optimisers in what a checkpoint holds, such as {"model": ..., "optimizer": optimizer.state_dict()}."""
    if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
        yield dict(value)
    elif depth and isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from optimizers_in(inner, depth - 1)


def is_torch(path: Path) -> bool:
    """Whether a file is one of torch.save, which keeps a state_dict's order."""
    return read_start(path).startswith((ZIP, TORCH))


def states_beside(path: Path) -> list[State]:
    """Return the states of optimisers in a checkpoint, or in the file for them in its folder."""
    found = list(optimizers_in(read_file(path))) if is_torch(path) else []
    for name in COMPANIONS if path.name.split(".")[0] in BESIDE and not found else ():
        if (path.parent / name).is_file():
            found += optimizers_in(read_file(path.parent / name))
    return found


def parameters_of(optimizers: list[State]) -> list[Parameter]:
    """Return what optimisers keep of their parameters, in their order; InputError if that has another form than torch's."""
    parameters, place = [], 0
    try:
        for optimizer in optimizers:
            for group in optimizer["param_groups"]:
                keys = list(group["params"])
                names = group.get("param_names") or [key if isinstance(key, str) else "" for key in keys]
                for key, name in zip(keys, names, strict=True):
                    parameters.append(Parameter(dict(optimizer["state"].get(key, {})), group, place, name))
                place += 1
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError("expected state and param_groups as torch's optimisers have them") from None
    return parameters


def match(parameters: list[Parameter], shapes: Mapping[str, Shape], ordered: bool) -> dict[str, Parameter]:
    """Return of each tensor what the optimisers keep; those of which they keep nothing are left out. InputError if that is ambiguous.

    ordered: whether the tensors are in the network's order.
    """
    by_name = {p.name: p for p in parameters}
    if set(by_name) >= set(shapes):
        pairs = {name: by_name[name] for name in shapes}
    elif ordered and len(parameters) == len(shapes) and len({p.place for p in parameters}) == 1:
        pairs = dict(zip(shapes, parameters, strict=True))
    else:
        return match_shapes(parameters, shapes, ordered)
    for name, p in pairs.items():
        if p.moment is not None and p.moment.shape != shapes[name]:
            raise InputError(f"{shown(name)} is {shapes[name]}, but {tuple(p.moment.shape)} in the optimiser's state")
    return {name: p for name, p in pairs.items() if p.state}


def match_shapes(parameters: list[Parameter], shapes: Mapping[str, Shape], ordered: bool) -> dict[str, Parameter]:
    """Return of each tensor the parameter of its shape: in their order, where a shape has as many of both, all in one group."""
    pairs = {}
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name, other in shapes.items() if other == shape]
        alike = [p for p in parameters if p.moment is not None and p.moment.shape == shape]
        groups = len({p.place for p in alike})
        if alike and (len(alike) != len(names) or groups > 1):
            told = f"{len(names)} tensors are {shape}, and {len(alike)} parameters in {groups} groups"
            raise InputError(f"{told}: which is which is not said")
        if len(alike) > 1 and not ordered:
            told = f"{len(names)} tensors are {shape}, sorted by name"
            raise InputError(f"{told}: which is which only files of torch.save say")
        pairs |= dict(zip(names, alike, strict=False))
    return pairs


def read_directions(paths: list[Path], layout: Layout) -> Float[Tensor, "t p"] | None:
    """Return the directions of all weights at all snapshots, each tensor's in its root mean square; None if the last one has no optimiser.

    0 where an optimiser keeps nothing: before its first step, and of what it does not train. InputError if directions cannot be told.
    """
    if not states_beside(paths[-1]):
        return None
    ordered = is_torch(paths[0])  # whose order is the layout's
    rows = torch.zeros(len(paths), layout.size, dtype=torch.float16)
    for row, path in zip(rows, tqdm(paths, "read optimisers' states", disable=None), strict=True):
        try:
            optimizers = states_beside(path)
            if not optimizers:
                raise InputError("there is none, as there is with the last snapshot")
            pairs = match(parameters_of(optimizers), layout.shapes, ordered)
            for name, p in pairs.items():
                way = p.direction().flatten()
                row[layout.slices[name]] = way / way.square().mean().sqrt().clamp(min=SMALLEST)
        except InputError as error:
            raise InputError(f"{path}: its optimiser's state cannot be read: {error}") from None
    if not rows[-1].any():
        raise InputError(f"{paths[-1]}: its optimiser keeps no direction, as Adam and SGD with momentum do")
    if not rows.isfinite().all():
        raise InputError(f"{paths[-1].parent}: optimisers' states have values that are not finite")
    return rows
