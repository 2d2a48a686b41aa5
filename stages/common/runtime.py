"""Where and how torch runs: device, threads, precision."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from tqdm import tqdm

from stages.common.stage import InputError, one_line

T = TypeVar("T")
R = TypeVar("R")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` is cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {one_line(error)}") from None


def pick_device() -> torch.device:
    """Return the device of WEIGHTLENS_DEVICE, by default CUDA's where there is one, else the processor.

    It is no parameter: moving to another machine must not make DVC recompute what it has. Apple's GPU is refused: it has no
    float64, in which accuracies and decompositions are computed.
    """
    device = resolve_device(os.environ.get("WEIGHTLENS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise InputError("WEIGHTLENS_DEVICE=mps has no float64: use cpu or cuda")
    return device


def pin_threads() -> None:
    """Give every operation one thread: the number of threads changes sums, so weights, so every hash downstream.

    Small models do not gain from more; parallelism is one model a Python thread (`parallel_map`).
    """
    torch.set_num_threads(1)


def parallel_map(
    function: Callable[[T], R], items: Sequence[T], device: torch.device, progress: str | None = None, kept: int = 0
) -> list[R]:
    """Return function(item) of all items in order: side by side on the cores, or one after the other on an accelerator.

    Python threads do: torch releases the interpreter lock in every operation. (Forked processes took 10 to 30 % less time, but
    MKL's allocator can hang in them.) An item must draw from generators of its own; then the results do not depend on how many
    cores there are. progress: the label of a progress bar over items, which begins at those that were `kept` of an earlier run.
    """
    pool = ThreadPoolExecutor((os.cpu_count() or 1) if device.type == "cpu" else 1, initializer=pin_threads)
    try:
        results = pool.map(function, items)
        return list(tqdm(results, progress, kept + len(items), initial=kept, disable=None if progress else True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C nobody wants the rest


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return the precision in which matrices are multiplied: float32 on processors, so that all of them give the same but for
    rounding; bfloat16 on accelerators that have it.

    WEIGHTLENS_PRECISION=float32 and =bfloat16 force either, and =auto takes bfloat16 on processors, too, that multiply it
    natively. It is no parameter: results of either precision have the same key in DVC's cache.
    """
    precision = os.environ.get("WEIGHTLENS_PRECISION") or ("float32" if device.type == "cpu" else "auto")
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"WEIGHTLENS_PRECISION={precision}: expected auto, float32 or bfloat16")
    native = has_native_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        torch.cpu.get_capabilities().get(k, False) for k in ("avx512_bf16", "amx_bf16", "bf16")
    )
