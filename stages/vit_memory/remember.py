"""Show what a memory does, before anything is trained: it is shown a few images of each digit, and answers for all others.

Reads   models/released/backbone.safetensors, a small vision transformer that has learned from drawn glyphs; scikit-learn's digits
Writes  nothing; prints how often the nearest memory is right, beside the same of bare pixels, and what is left of a digit forgotten

    python -m stages.vit_memory.remember --shots 5
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from stages.common.backbone import load_backbone
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.vit_memory.hopfield import ClassMemory

BACKBONE = Path("models/released/backbone.safetensors")
FORGOTTEN = 3


def first_of_each(labels: Int[Tensor, " n"], shots: int) -> Int[Tensor, " m"]:
    """Return the places of the first `shots` images of each class; InputError if a class has no others."""
    places = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    if not 1 <= shots < min(map(len, places)):
        raise InputError(f"--shots: expected 1 to {min(map(len, places)) - 1} images of each class, got {shots}")
    return torch.cat([place[:shots] for place in places])


def remember(x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> ClassMemory:
    """Return a memory of examples: one pattern a class, written without a gradient step."""
    memory = ClassMemory(x.shape[1], int(labels.max()) + 1, mode="class_prototype")
    memory.write(x, labels)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5, help="images of each digit that are written (default: 5)")
    shots = parser.parse_args().shots
    pin_threads()
    digits = load_digits()
    images = torch.tensor(digits.images * 255 / 16, dtype=torch.uint8)[:, None]
    labels = torch.tensor(digits.target)
    shown = first_of_each(labels, shots)
    others = ~torch.isin(torch.arange(len(labels)), shown)
    features = load_backbone(BACKBONE).features(images).flatten(1)
    print(f"written: {shots} images of each digit; asked for {int(others.sum())} others")
    for name, x in (("pixels", images.flatten(1).float()), ("features", features)):
        memory = remember(x[shown], labels[shown])
        right = memory.attend(x[others]).argmax(1) == labels[others]
        print(f"nearest memory of {name}: right on {right.float().mean():.1%}")
    memory.forget(FORGOTTEN)
    left = int((memory.attend(features).argmax(1) == FORGOTTEN).sum())
    print(f"digit {FORGOTTEN} forgotten: answered {left} times")


if __name__ == "__main__":
    run(main)
