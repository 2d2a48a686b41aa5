"""Where and how torch runs: device, threads, precision."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from stages.common.stage import InputError, one_line

T = TypeVar("T")
R = TypeVar("R")
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


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

    Small models do not gain from more; parallelism is one model a process (`parallel_map`).
    """
    torch.set_num_threads(1)


def parallel_map(
    function: Callable[[T], R], items: Sequence[T], device: torch.device, progress: str | None = None, kept: int = 0
) -> list[R]:
    """Return function(item) of all items in order: side by side on the cores, or one after the other on an accelerator.

    Each core has a process of its own, forked from this one: nothing is imported or sent again, and small operations do not
    wait for each other's interpreter lock. So a function changes nothing here, but by what it returns and the files it writes.
    Threads take their place where a fork is not safe (not Linux, or CUDA). An item must draw from generators of its own; then
    the results do not depend on how many cores there are. progress: the label of a progress bar over items, which begins at those
    that were `kept` of an earlier run. InputError if a process was killed, as the system does when memory runs out.
    """
    count = (os.cpu_count() or 1) if device.type == "cpu" else 1
    if len(items) < 2 or multiprocessing.parent_process() is not None:
        count = 1  # within an item, the cores have theirs already
    forks = count > 1 and sys.platform == "linux" and not torch.cuda.is_available()  # whose threads a fork would break
    pool = fork_workers(count, function, items) if forks else ThreadPoolExecutor(count, initializer=pin_threads)
    results = map(pickle.loads, pool.map(_compute, range(len(items)))) if forks else pool.map(function, items)
    try:
        done = list(tqdm(results, progress, kept + len(items), initial=kept, disable=None if progress else True))
    except BrokenProcessPool:
        raise InputError("a process was killed while it computed: is there enough memory?") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C nobody wants the rest
        raise
    pool.shutdown()  # the workers' seconds count as this process's from here on
    return done


def fork_workers(count: int, function: Callable[[Any], Any], items: Sequence[Any]) -> ProcessPoolExecutor:
    """Return processes that know `function` and `items` by being forked from this one: both may be what cannot be pickled."""
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(count, fork, initializer=_start_worker, initargs=(function, items))


_work: tuple[Callable[[Any], Any], Sequence[Any]]  # of a worker: its function and all items


def _start_worker(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Make this forked process one that computes items, and ends when the one that forked it does, however that ends."""
    global _work
    _work = function, items
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pin_threads()


def _compute(place: int) -> bytes:
    """Return the result of one item, pickled here: tensors that travel by themselves would take a file handle each."""
    function, items = _work
    return pickle.dumps(function(items[place]))


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
