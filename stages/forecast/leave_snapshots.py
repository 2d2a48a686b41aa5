"""Train a small network and leave its snapshots, as anybody's loop does: something to forecast before anything else is trained.

Reads   scikit-learn's digits
Writes  FOLDER/step_<n>.pt, the state_dict every ten steps

    python -m stages.forecast.leave_snapshots run
    python -m stages.forecast.forecast_snapshots run
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from stages.common.files import atomic_path
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run

STEPS, EVERY, BATCH = 300, 10, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args().folder
    if folder.exists():
        raise InputError(f"{folder} is there already: give a new folder, so that no other snapshots are among these")
    pin_threads()
    torch.manual_seed(0)
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(STEPS):
        if step % EVERY == 0:
            with atomic_path(folder / f"step_{step}.pt") as temporary:
                torch.save(model.state_dict(), temporary)
        batch = torch.randint(len(images), (BATCH,))
        loss = cross_entropy(model(images[batch].float() / 16), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{STEPS // EVERY} snapshots of {sum(p.numel() for p in model.parameters()):,} weights are in {folder}")


if __name__ == "__main__":
    run(main)
