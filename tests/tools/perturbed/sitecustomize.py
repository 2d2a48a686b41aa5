"""What another processor does to a run, made stronger: every process with this folder on PYTHONPATH rounds differently.

WEIGHTLENS_PERTURB=SEED   what torch draws (first weights, noise, images) is multiplied by 1 - RELATIVE |e|, e normal
WEIGHTLENS_THREADS=N      operations have N threads, whatever a stage asks for: other parts of sums, so other roundings

Python imports a module of this name when it starts. Nothing in the project reads these variables.
"""

import os
import sys

from after_import import AfterImport

RELATIVE = 1e-6  # some ten times the rounding of single precision


def perturb(torch, seed: int) -> None:
    """Make torch's sources of random numbers return slightly smaller ones; the streams themselves stay as they are."""
    noise = torch.Generator().manual_seed(seed)
    normal = torch.Tensor.normal_

    def smaller(drawn):
        if not (drawn.is_floating_point() and drawn.device.type == "cpu"):
            return drawn
        with torch.no_grad():
            factor = normal(torch.empty(drawn.shape, dtype=drawn.dtype), generator=noise).abs_().mul_(-RELATIVE).add_(1)
            return drawn.mul_(factor)

    def patch(owner, name: str) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: smaller(original(*args, **options)))

    for name in ("normal_", "uniform_"):
        patch(torch.Tensor, name)
    for name in ("rand", "randn", "normal"):
        patch(torch, name)


def use_threads(torch, threads: int) -> None:
    """Pin torch to `threads`, and leave it there."""
    torch.set_num_threads(threads)
    torch.set_num_threads = lambda _: None


def change(torch) -> None:
    """Do what the environment asks for."""
    if seed := os.environ.get("WEIGHTLENS_PERTURB"):
        perturb(torch, int(seed))
    if threads := os.environ.get("WEIGHTLENS_THREADS"):
        use_threads(torch, int(threads))


if {"WEIGHTLENS_PERTURB", "WEIGHTLENS_THREADS"} & os.environ.keys():
    sys.meta_path.insert(0, AfterImport("torch", change))
