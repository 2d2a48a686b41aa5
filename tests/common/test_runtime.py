"""Work side by side in forked processes gives what work one after the other gives, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError

CPU = torch.device("cpu")
FORKS = sys.platform == "linux" and not torch.cuda.is_available() and (os.cpu_count() or 1) > 1
needs_forks = pytest.mark.skipif(not FORKS, reason="threads do the work here")


def learn(seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network after a step, by a generator of its own."""
    random = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(8, 3, bias=False)
    model.weight.data = torch.randn(3, 8, generator=random)
    model(torch.randn(16, 8, generator=random)).square().mean().backward()
    return model, model.weight.data - 0.1 * model.weight.grad


def test_results_are_those_of_one_after_the_other_in_the_items_order():
    pin_threads()  # as workers are
    scale = torch.tensor(3.0)  # in a closure, which cannot be pickled
    found = parallel_map(lambda seed: (learn(seed)[0], scale * learn(seed)[1]), range(7), CPU)
    for seed, (model, stepped) in enumerate(found):
        assert torch.equal(model.weight, learn(seed)[0].weight)
        assert torch.equal(stepped, scale * learn(seed)[1])
    assert parallel_map(learn, [], CPU) == []


@needs_forks
def test_items_run_in_several_processes_and_a_call_within_an_item_in_its_own():
    def within(_: int) -> tuple[int, list[int]]:
        time.sleep(0.1)  # long enough that one process does not take all
        return os.getpid(), parallel_map(lambda _: os.getpid(), range(3), CPU)

    found = parallel_map(within, range(8), CPU)
    assert len({pid for pid, _ in found} - {os.getpid()}) > 1
    assert all(inner == [pid] * 3 for pid, inner in found)


def test_the_users_mistake_in_an_item_is_the_callers_error():
    def fail(item: int) -> int:
        if item == 2:
            raise InputError("epochs must be positive")
        return item

    with pytest.raises(InputError, match=r"^epochs must be positive$"):
        parallel_map(fail, range(4), CPU)


@needs_forks
def test_a_killed_worker_is_an_error_that_says_so():
    with pytest.raises(InputError, match="a process was killed"):
        parallel_map(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(2), CPU)


@needs_forks
def test_workers_end_when_their_parent_is_killed():
    code = "import time, torch; from stages.common.runtime import parallel_map\n"
    code += "parallel_map(lambda _: time.sleep(600), range(2), torch.device('cpu'))"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        watched, workers = psutil.Process(parent.pid), []
        while len(workers) < 2 and parent.poll() is None:
            time.sleep(0.1)
            workers = watched.children()
        time.sleep(0.5)  # until they have said that they die with it
        parent.kill()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=10)[1] == []
