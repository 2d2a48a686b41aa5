"""Weights on disk: checkpoints of our own, and everybody's weights: which tensors of a file they are, and whether they fit a network.

A file is told by its content (`containers`), and no code of it is run. What was chosen is said in notes, for callers to print.
"""

import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from stages.common.containers import (
    ALLOWANCE,
    DICTIONARY,
    ArrayShell,
    Shell,
    listed,
    read_file,
    read_start,
    shown,
    whole_model,
)
from stages.common.files import atomic_path, remedy
from stages.common.stage import InputError

READABLE = """weights are read from files of torch.save (.pt .pth .th .bin .tar .ckpt) and .safetensors, from an index of shards,
from a folder of save_pretrained, and from hf://owner/name/file or hf-hub:owner/name; they may lie under state_dict, model, net"""

SUFFIXES = (".pt", ".pth", ".th", ".bin", ".tar", ".ckpt", ".safetensors")
PRETRAINED = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "open_clip_model.safetensors",
)
AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema")
NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
COUNTERS = (
    *("num_batches_tracked", "position_ids", "relative_position_index", "relative_coords_table", "attn_mask"),
    *("n_averaged", "total_ops", "total_params"),
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAVE = "save model.state_dict() with torch.save"
HUB = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)|hf[-_]hub:([^/@]+/[^/@]+)(?:@(.+))?")

State = dict[str, Tensor]
Checkpoint = dict[str, Any]  # tensors and plain values by name, as torch.save writes them
Shapes = Mapping[str, tuple[int, ...]]
Fetch = Callable[[str], Path]  # a file's place by its name


def save_torch(path: Path, value: Checkpoint) -> None:
    """Write a dictionary of tensors and plain values; `load_torch` reads it."""
    buffer = io.BytesIO()  # not the file: torch would store its name inside, and fail obscurely on a full disk
    torch.save(value, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_torch(path: Path, keys: set[str], map_location: str | torch.device = "cpu") -> Checkpoint:
    """Return a dictionary that has `keys`, by unpickling nothing but tensors and plain values.

    InputError if the file is missing, damaged, or holds something else.
    """
    value = read_file(path, map_location, shells=False)
    if not isinstance(value, dict) or not value.keys() >= keys:
        got = listed(value) or "nothing" if isinstance(value, dict) else type(value).__name__
        expected = ", ".join(sorted(keys)) or "names and values"
        raise InputError(f"{shown(path)} is no such checkpoint: expected {expected}, got {got}{remedy(path, '-f ')}")
    return value


def remembered_torch(path: Path, keys: set[str], compute: Callable[[], Checkpoint]) -> Checkpoint:
    """Return the dictionary in `path`, which has `keys`; if it is not there, compute it and keep it there."""
    if not path.is_file():
        save_torch(path, compute())
    return load_torch(path, keys)


def load_weights(
    source: Path | str,
    expected: Shapes | None = None,
    beside: Collection[str] = (),
    dtype: torch.dtype | None = None,
    what: str = "the network",
) -> tuple[State, list[str]]:
    """Return the named weights of a file, a folder or a repository of the hub, in `dtype` or their own, and notes on what was taken.

    With `expected` they are those of a network (`what`), in its order, and those whose names begin as `beside` says. InputError if
    there are none, if they do not fit, or if they are no real, dense and finite numbers.
    """
    path, fetch = _locate(source)
    start = read_start(path)
    if start.lstrip()[:1] == b"{" and b"\0" not in start[:8]:  # where safetensors keep a length
        state, notes = _read_shards(path, fetch), []
    else:
        state, notes = _choose(path, read_file(path))
        _check_size(path, state)
    for name, tensor in state.items():
        if fault := _fault_of_kind(tensor):
            raise InputError(f"{shown(path)}: {shown(name)} {fault}")
    if expected is not None:
        state, more = fit_names(state, expected, str(path), beside, what)
        notes += more
    _check_real(path, state, expected)
    return {name: _in_dtype(path, name, tensor, dtype) for name, tensor in state.items()}, notes


def fit_names(
    weights: Mapping[str, Tensor],
    expected: Shapes,
    source: str,
    beside: Collection[str] = (),
    what: str = "the network",
) -> tuple[State, list[str]]:
    """Return a network's tensors out of `weights`, in its order, those beside it, and a note if a prefix was taken off their names.

    InputError if tensors are missing, of other shapes, or in excess: counters are left out, and names that begin as one of `beside` kept.
    """
    prefix = _prefix(weights, expected, source)
    named = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    source = shown(source)
    if len(named) < len(weights):
        raise InputError(
            f"{source} has tensors of the same names with '{shown(prefix)}' and without: save one of them by itself"
        )
    excess = {
        name: tensor
        for name, tensor in named.items()
        if name not in expected and not name.startswith(tuple(beside)) and not name.endswith(COUNTERS)
    }
    if missing := [name for name in expected if name not in named]:
        near = difflib.get_close_matches(missing[0], list(excess or named), n=3, cutoff=0)
        there = listed(f"{name} {tuple(named[name].shape)}" for name in near) or "nothing"
        raise InputError(
            f"{source} has no {missing[0]} {tuple(expected[missing[0]])} of {what}, {len(missing)} of {len(expected)} tensors are missing; "
            f"nearest in the file: {there}{_remedy_of_names(excess)}"
        )
    if wrong := [name for name, shape in expected.items() if tuple(named[name].shape) != tuple(shape)]:
        more = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        raise InputError(
            f"{source}: {wrong[0]}: expected {tuple(expected[wrong[0]])}, got {tuple(named[wrong[0]].shape)}{more}: "
            "name the network that the file is of"
        )
    if excess:
        raise InputError(
            f"{source} has {len(excess)} tensors more than {what}: {listed(excess)}{_remedy_of_names(excess)}"
        )
    notes = [f"the prefix '{shown(prefix)}' is taken off the names"] if prefix else []
    kept = {name: tensor for name, tensor in named.items() if name not in expected and not name.endswith(COUNTERS)}
    return {name: named[name] for name in expected} | kept, notes


def _remedy_of_names(excess: Collection[str]) -> str:
    if any(".parametrizations." in name or name.endswith(("weight_g", "weight_v")) for name in excess):
        return ": call torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) before you save"
    if any(name.endswith(("_orig", "_mask")) for name in excess):
        return ": call torch.nn.utils.prune.remove(module, 'weight') before you save"
    if any("lora_" in name for name in excess):
        return ": merge the adapters into the weights (merge_and_unload) before you save"
    return ": name the network that the file is of, or save the network's own tensors under its own names"


def _prefix(weights: Mapping[str, Tensor], expected: Shapes, source: str) -> str:
    """Return what stands before the expected names in the file; nothing if that makes fewer than half of them fit.

    InputError if several networks fit.
    """
    if not expected or all(name in weights for name in expected):
        return ""
    fitting: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        fitting.update(".".join(parts[:k]) + "." for k in range(1, len(parts)) if ".".join(parts[k:]) in expected)
    if not fitting:
        return ""
    whole = [prefix for prefix, count in fitting.items() if count == len(expected)]
    if len(whole) > 1:
        raise InputError(f"{shown(source)} holds several such networks, {listed(whole)}: save one of them by itself")
    best, count = max(fitting.items(), key=lambda item: item[1])
    return best if count > max(len(expected) / 2, sum(name in weights for name in expected)) else ""


def _locate(source: Path | str) -> tuple[Path, Fetch]:
    """Return the file that `source` means, and how to get at those beside it; the hub's are downloaded."""
    if hub := HUB.fullmatch(str(source)):
        repository, revision, file, named, named_revision = hub.groups()
        if file:
            fetch = partial(_beside, repository, revision, PurePosixPath(file).parent)
            try:
                return fetch(PurePosixPath(file).name), fetch
            except FileNotFoundError as error:
                raise InputError(str(error)) from None
        fetch = partial(_download, named, named_revision)
        for name in PRETRAINED:
            try:
                return fetch(name), fetch
            except FileNotFoundError:
                continue
        raise InputError(
            f"{shown(source)} has none of {', '.join(PRETRAINED)}: name the file, hf://{shown(named)}/<file>"
        )
    if re.match(r"hf:|hf[-_]hub:", str(source)):
        raise InputError(f"{shown(source)}: expected hf://owner/name/file or hf-hub:owner/name")
    path = Path(source)
    if not path.is_dir():
        return path, lambda name: path.parent / name
    found = [name for name in PRETRAINED if (path / name).is_file()]
    found = found or sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] != ".")
    if not found:
        raise InputError(f"{shown(path)} is a folder without weights: expected one of {', '.join(PRETRAINED)}")
    if len(found) > 1 and found[0] not in PRETRAINED:
        raise InputError(f"{shown(path)} holds several files of weights ({listed(found)}): name one of them")
    return path / found[0], lambda name: path / name


def _beside(repository: str, revision: str | None, folder: PurePosixPath, name: str) -> Path:
    return _download(repository, revision, str(folder / name))


def _download(repository: str, revision: str | None, file: str) -> Path:
    """Return where the hub's file lies after a download; FileNotFoundError if the repository has none such."""
    import huggingface_hub  # here: 0.3 s that most do without
    from huggingface_hub import errors

    what = f"hf://{shown(repository)}/{shown(file)}"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError:
        why = "its owner grants access: ask for it there, and log in by 'hf auth login'"
    except errors.RepositoryNotFoundError:
        why = "there is no such repository, or it is private: check the name, and log in by 'hf auth login'"
    except errors.RevisionNotFoundError:
        why = f"there is no revision {shown(revision)}: leave it out"
    except errors.LocalEntryNotFoundError:
        why = "no connection, and it was not downloaded before: connect, or set HF_HOME"
    except errors.HFValidationError:
        why = "that is no name of a repository: expected owner/name"
    except (errors.EntryNotFoundError, FileNotFoundError):
        raise FileNotFoundError(f"{what} is not there: check the name") from None
    except Exception as error:  # of the network, the proxy, the disk
        why = f"{type(error).__name__}: connect, or set HF_HOME"
    raise InputError(f"{what} cannot be had ({why})")


def _read_shards(path: Path, fetch: Fetch) -> State:
    """Return the tensors of all shards of an index; InputError if one is missing, or has not what the index says."""
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{shown(path)} is no index of shards: expected a weight_map of names and files") from None
    if odd := [file for file in files if not isinstance(file, str) or PurePosixPath(file).name != file]:
        raise InputError(f"{shown(path)} names the shard {shown(odd[0])}: expected files of its own folder")
    state: State = {}
    for file in files:
        try:
            shard = fetch(file)
        except FileNotFoundError:
            shard = path.parent / file
        if not shard.is_file():
            raise InputError(f"{shown(path)} names the shard {shown(file)}, which is missing: download it too")
        found, _ = _choose(shard, read_file(shard))
        _check_size(shard, found)
        named = [name for name, place in places.items() if place == file]
        if absent := [name for name in named if name not in found]:
            raise InputError(
                f"{shown(shard)} has no {listed(absent)}, which {path.name} says it has: download both again"
            )
        state |= {name: found[name] for name in named}
    return state


def _choose(path: Path, value: Any) -> tuple[State, list[str]]:
    """Return the state_dict in what a file holds, and a note if it lay under a key; InputError if there is none, or several."""
    if isinstance(value, Shell) and not isinstance(value, ArrayShell):
        raise whole_model(path, value.origin)
    if not isinstance(value, Mapping):
        kind = "a tensor" if isinstance(value, Tensor | ArrayShell) else f"a {type(value).__name__}"
        raise InputError(f"{shown(path)} holds {kind} without names: {SAVE}, which names every tensor")
    if not value:
        raise InputError(f"{shown(path)} holds an empty dictionary: {SAVE}")
    if (state := _named(value)) is not None:
        return state, []
    found: dict[str, State] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            state = _named(inner)
            for deeper in NESTED if state is None else ():
                state = _named(inner[deeper]) if isinstance(inner.get(deeper), Mapping) else state
            if state:
                found[str(key)] = state
    plain = next((key for key in NESTED if key in found), None)
    if averaged := next((key for key in AVERAGED if key in found), None):
        return _averaged_or_plain(found, averaged, plain)
    if plain is None and len(found) == 1:
        (plain,) = found
    if plain is not None:
        return found[plain], [f"the weights are those under '{shown(plain)}'"]
    if found:
        raise InputError(f"{shown(path)} holds several networks ({listed(found)}): save one of them by itself")
    return _beside_values(path, value), ["what is no tensor is left out"]


def _averaged_or_plain(found: dict[str, State], averaged: str, plain: str | None) -> tuple[State, list[str]]:
    """Return the moving average, as timm does, unless it lacks tensors of the plain weights or was never filled; and a note."""
    if plain is None:
        return found[averaged], [f"the weights are the moving average under '{averaged}'"]
    names = {name.removeprefix("module.") for name in found[averaged]}
    lacks = [name for name in found[plain] if name.removeprefix("module.") not in names]
    if lacks:
        return found[plain], [
            f"the weights are those under '{plain}': the average under '{averaged}' lacks {listed(lacks)}"
        ]
    real = [tensor for tensor in found[averaged].values() if tensor.is_floating_point() and not _fault_of_kind(tensor)]
    if real and not any(tensor.numel() and tensor.any() for tensor in real):
        return found[plain], [f"the weights are those under '{plain}': the average under '{averaged}' is all zeros"]
    return found[averaged], [
        f"the weights are the moving average under '{averaged}', as timm takes them; for those under '{plain}' save them alone"
    ]


def _named(value: Mapping[Any, object]) -> State | None:
    """Return a mapping's tensors if it consists of names and tensors (or arrays), but for states of other kinds; else None."""
    state = {}
    for name, tensor in value.items():
        if isinstance(tensor, ArrayShell):
            tensor = tensor.tensor
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return None
        state[name] = tensor.detach()
    return state or None


def _beside_values(path: Path, value: Mapping[Any, object]) -> State:
    """Return the tensors of a dictionary that holds other values too; InputError if they are no network's."""
    shells = {key: item for key, item in value.items() if isinstance(item, Shell) and not isinstance(item, ArrayShell)}
    models = [key for key in (*NESTED, *AVERAGED) if key in shells]
    if models:
        raise whole_model(path, shells[models[0]].origin)
    if {"state", "param_groups"} <= value.keys():
        raise InputError(f"{shown(path)} is an optimiser's state, not weights: {SAVE}")
    if any("_packed_params" in str(key) for key in value):
        raise InputError(f"{shown(path)} is quantised: save the state_dict of the network before it is quantised")
    simple = bool | int | float | str | bytes | None
    tensors = _named({key: item for key, item in value.items() if not isinstance(item, simple)}) or {}
    if any("." in name or name in ("weight", "bias") for name in tensors):
        return tensors
    whole = [item.origin for item in shells.values() if not DICTIONARY.search(item.origin)]
    kinds = (f"{key} ({type(item).__name__})" for key, item in value.items() if not isinstance(item, Shell))
    got = listed(kinds) or f"objects of {listed(whole)}"
    raise InputError(f"{shown(path)} is no state_dict: expected names and tensors, got {got}: {SAVE}")


def _check_size(path: Path, state: State) -> None:
    """InputError if tensors claim more than the file can hold: one value may be spread over any shape."""
    size, claimed = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > size + ALLOWANCE // 8:  # checks and conversion take several times as much
        raise InputError(
            f"{shown(path)} would unfold from {size} bytes to {claimed}: not read; save tensors that are not expanded"
        )


def _fault_of_kind(tensor: Tensor) -> str | None:
    """Return why a tensor holds no real numbers that can be reckoned with, and what to do."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized:
        return f"is quantised ({kind}): save the state_dict of the network before it is quantised"
    if tensor.is_meta:
        return "has no values (device meta): load the weights into the network before you save it"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is not dense ({str(tensor.layout).removeprefix('torch.')}): save tensor.to_dense()"
    if tensor.is_complex():
        return f"is complex ({kind}): save torch.view_as_real(tensor), or its two parts by themselves"
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        return f"has values of {kind}: save tensor.float(), with its scale applied"
    return None


def _check_real(path: Path, state: State, expected: Shapes | None) -> None:
    """InputError if weights are integers, or any values are not finite. Integers may stand beside weights, as counters and masks do."""
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    for name, tensor in state.items():
        if tensor.is_floating_point():
            wrong = tensor.numel() - int(tensor.isfinite().sum())
            if wrong and not name.endswith("mask"):  # of attention, minus infinity is meant
                raise InputError(
                    f"{shown(path)}: {shown(name)} has values that are not finite (NaN or infinite: {wrong} of {tensor.numel()}): "
                    "take a snapshot from before the training diverged"
                )
        elif (expected is not None and name in expected) or not floating or name.endswith(("weight", "bias")):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{shown(path)}: {shown(name)} holds integers ({kind}): save it in floating point, with its scale applied"
            )


def _in_dtype(path: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of floating point in `dtype`; InputError if its values do not fit into that."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not converted.isfinite().all() and tensor.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{shown(path)}: {shown(name)} has values too large for {kind}: take a network of ordinary weights"
        )
    return converted
