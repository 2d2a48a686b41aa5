"""Read mutated files with every tool's loader: python tests/tools/fuzz.py [--count 2000] [--seed 0]

Each file ends in weights or in an InputError of one clean line. A traceback, a file left behind, or memory beyond 2 GB over what the
process takes at first, is a failure. Prints outcomes by tool and by mutation, CPU seconds and memory.
"""

import argparse
import io
import random
import re
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from stages.common.stage import InputError

LIMIT = 2 * 1024**3  # bytes
State = dict[str, Tensor]


def as_torch(value: object) -> bytes:
    """Return the bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_legacy(value: object) -> bytes:
    """Return the bytes of torch.save as before version 1.6."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[State], bytes]] = {
    "a.pt": as_torch,
    "a.ckpt": lambda state: as_torch({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}),
    "a.pth": as_legacy,
    "a.safetensors": lambda state: save_safetensors({k: v.contiguous() for k, v in state.items()}),
}


def flipped(data: bytes, draw: random.Random, end: int | None = None) -> bytes:
    """Flip up to eight bits, before `end`."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(len(data), end or len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def in_pickle(data: bytes, draw: random.Random) -> bytes:
    """Flip bits of the pickle in a zip archive, with checksums that agree; of other files flip some at the start."""
    if not data.startswith(b"PK"):
        return flipped(data, draw, 600)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, flipped(content, draw) if entry.filename.endswith("data.pkl") else content)
    return out.getvalue()


def truncated(data: bytes, draw: random.Random) -> bytes:
    """Cut the file off."""
    return data[: draw.randrange(len(data))]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """Take a piece out, put it in elsewhere, or put in noise."""
    start, to = sorted(draw.randrange(len(data)) for _ in range(2))
    piece = draw.choice((b"", data[start : start + 64], draw.randbytes(16)))
    return data[:start] + piece + data[draw.choice((start, to)) :]


def renamed(state: State, draw: random.Random) -> State:
    """Give some tensors other names."""
    name = draw.choice(list(state))
    other = draw.choice((f"module.{name}", name[::-1], "", f"\x1b[1m{name}", "x" * 5000, f"{name}.num_batches_tracked"))
    return {(other if key == name else key): tensor for key, tensor in state.items()}


def retyped(state: State, draw: random.Random) -> State:
    """Give a tensor another type, or values that are none."""
    name, kinds = (
        draw.choice(list(state)),
        (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2),
    )
    odd = draw.choice((*kinds, "nan", "inf", "huge"))
    tensor = state[name].clone()
    if isinstance(odd, str):
        tensor = tensor.double()
        tensor.flatten()[draw.randrange(tensor.numel())] = {"nan": torch.nan, "inf": torch.inf, "huge": 1e300}[odd]
    return state | {name: tensor.to(odd) if isinstance(odd, torch.dtype) else tensor}


def reshaped(state: State, draw: random.Random) -> State:
    """Give a tensor another shape, take one out, or add one."""
    name = draw.choice(list(state))
    tensor, how = state[name], draw.randrange(5)
    if how == 0:
        return {key: value for key, value in state.items() if key != name}
    if how == 1:
        return state | {"another.weight": tensor.clone()}
    return state | {name: (tensor.flatten(), tensor[None], tensor[..., :0])[how - 2]}


BYTES = (flipped, in_pickle, truncated, spliced)
TENSORS = (renamed, retyped, reshaped)


def mutated(state: State, seed: int) -> tuple[str, str, bytes]:
    """Return what was done to a network's file, the file's name and its bytes."""
    draw = random.Random(seed)
    name = draw.choice(list(FORMATS))
    if draw.randrange(len(BYTES) + len(TENSORS)) < len(TENSORS):
        change = draw.choice(TENSORS)
        return change.__name__, name, FORMATS[name](change(state, draw))
    harm = draw.choice(BYTES)
    return harm.__name__, name, harm(FORMATS[name](state), draw)


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """Return how reading a file ends: in weights, a refusal, or a failure and which."""
    try:
        read(path)
    except InputError as error:
        text = str(error)
        clean = text.isprintable() and "Error" not in text and not re.search(r"0x[0-9a-f]{6}|Traceback", text)
        return "refused" if clean else f"FAILED: message {text!r}"
    except BaseException as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "read"


def tools(folder: Path) -> Iterator[tuple[str, State, Callable[[Path], object]]]:
    """Yield each tool's name, a network that it reads, and its loader."""
    from tiny_vit import CONFIG, autoencoder, base_of

    from stages.bilinear.model import build_image_classifier
    from stages.bilinear.training import CHECKPOINT_KEYS, load_checkpoint
    from stages.common.backbone import load_backbone, save_backbone
    from stages.forecast.forecast_snapshots import read_trajectory
    from stages.recall.audit import read_change
    from stages.weightnet.user_networks import read_network, user_program
    from stages.weightnet.zoo.architectures import build_network

    program = user_program("cnn3", (1, 8, 8), 10, False)
    network = dict(build_network("cnn3", 1, 10, 8).state_dict())
    yield "predict", network, lambda path: read_network(path, "cnn3", program, False)

    first = folder / "first.pt"
    torch.save(network, first)
    yield "forecast_snapshots", network, lambda path: read_trajectory([first, path])

    model = autoencoder()
    base = base_of(model)
    yield "audit", {k: v + 0.01 for k, v in base.trained.items()}, lambda path: read_change(path, base)

    options = {"d_input": 16, "d_hidden": 4, "d_output": 3, "n_layer": 1, "bias": True, "residual": False}
    weights = dict(build_image_classifier(options, 0).state_dict())
    missing = {key: 0 for key in CHECKPOINT_KEYS if key != "model_state_dict"}
    yield "load_checkpoint", weights | missing, load_checkpoint

    whole = folder / "backbone.safetensors"
    save_backbone(whole, model.vit, CONFIG, dict(base.decoder))
    yield (
        "load_backbone",
        {"": torch.from_file(str(whole), size=whole.stat().st_size, dtype=torch.uint8)},
        load_backbone,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = list(tools(folder))
        kept = set(folder.iterdir())
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        counted: Counter[tuple[str, str, str]] = Counter()
        for i in range(arguments.count):
            tool, state, read = loaders[i % len(loaders)]
            how, file, data = mutated_of(tool, state, arguments.seed * arguments.count + i)
            path = folder / file
            path.write_bytes(data)
            found = outcome(read, path)
            path.unlink()
            if left := set(folder.iterdir()) - kept:
                found = f"FAILED: left {sorted(left)}"
            if found.startswith("FAILED"):
                print(f"{tool} {how} {file} {i}: {found[:400]}")
            counted[tool, how, found.partition(":")[0]] += 1
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in (0, 1):
        for what in sorted({key[place] for key in counted}):
            parts = Counter(
                {
                    k: sum(n for key, n in counted.items() if key[place] == what and key[2] == k)
                    for k in ("read", "refused", "FAILED")
                }
            )
            print(f"{what:20s}", "  ".join(f"{k} {n}" for k, n in parts.items()))
    print(
        f"{arguments.count} files, {time.process_time() - start:.1f} CPU s, memory {before / 1024:.0f} to {after / 1024:.0f} MB at most"
    )
    sys.exit(any(key[2] == "FAILED" for key in counted))


def mutated_of(tool: str, state: State, seed: int) -> tuple[str, str, bytes]:
    """Return a mutated file of a tool's own kind: of two tools, files that this project wrote."""
    draw = random.Random(seed)
    if tool == "load_backbone":
        change = draw.choice(BYTES)
        return change.__name__, "a.safetensors", change(state[""].numpy().tobytes(), draw)
    if tool == "load_checkpoint":
        change = draw.choice(BYTES)
        value = {key: item for key, item in state.items() if not isinstance(item, Tensor)}
        value["model_state_dict"] = {key: item for key, item in state.items() if isinstance(item, Tensor)}
        return change.__name__, "a.pt", change(draw.choice((as_torch, as_legacy))(value), draw)
    return mutated(state, seed)


if __name__ == "__main__":
    main()
