"""The clock of all benchmarks."""

import time

import torch


def clock(device: torch.device) -> float:
    """Return processor seconds, or those that passed until the GPU was done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
