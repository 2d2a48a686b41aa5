"""What another processor does to a run, made stronger: every process with this folder on PYTHONPATH rounds differently.

WEIGHTLENS_PERTURB=SEED   what torch draws (first weights, noise, images) is multiplied by 1 - RELATIVE |e|, e normal
WEIGHTLENS_THREADS=N      operations have N threads, whatever a stage asks for: other parts of sums, so other roundings

Python imports a module of this name when it starts. Nothing in the project reads these variables.
"""

import importlib.abc
import importlib.util
import os
import sys

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


class AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports torch as it is, and then changes it."""

    def find_spec(self, name, *_):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        if seed := os.environ.get("WEIGHTLENS_PERTURB"):
            perturb(module, int(seed))
        if threads := os.environ.get("WEIGHTLENS_THREADS"):
            use_threads(module, int(threads))


if {"WEIGHTLENS_PERTURB", "WEIGHTLENS_THREADS"} & os.environ.keys():
    sys.meta_path.insert(0, AfterTorch())
