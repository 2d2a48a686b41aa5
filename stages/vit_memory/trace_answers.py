"""Show which stored images a memory's answers came from, and that an image which is forgotten leaves nothing behind.

The memory is shown a few of scikit-learn's digits; nothing is trained.

Reads   models/released/backbone.safetensors, a small vision transformer that has learned from drawn glyphs
Writes  a picture, if --picture names one: digits, and the stored images that the answers came from, with their weights

    python -m stages.vit_memory.trace_answers --shots 5 --picture sources.png
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from stages.common.backbone import load_backbone
from stages.common.runtime import pin_threads
from stages.common.stage import run
from stages.vit_memory import pictures
from stages.vit_memory.provenance import ImageMemory
from stages.vit_memory.remember import BACKBONE, first_of_each

SHOWN = 4  # answers
BETA = 16.0


def store(x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], places: Int[Tensor, " m"]) -> ImageMemory:
    """Return a memory of the images at `places`, each under its number."""
    memory = ImageMemory(x.shape[1], int(labels.max()) + 1, BETA)
    memory.write(x[places], labels[places], [f"image {i}" for i in places.tolist()])
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5, help="images of each digit that are stored (default: 5)")
    parser.add_argument("--picture", type=Path, help="a PNG to draw")
    options = parser.parse_args()
    pin_threads()
    digits = load_digits()
    images = torch.tensor(digits.images * 255 / 16, dtype=torch.uint8)[:, None]
    labels = torch.tensor(digits.target)
    stored = first_of_each(labels, options.shots)
    others = (~torch.isin(torch.arange(len(labels)), stored)).nonzero()[:, 0]
    x = load_backbone(BACKBONE).features(images).flatten(1)
    memory = store(x, labels, stored)
    answers = memory.answer(x[others])
    right = (answers.argmax(1) == labels[others]).float().mean()
    print(f"stored: {len(memory)} images; right on {right:.1%} of {len(others)} others")

    asked = others[:SHOWN]
    for i, answer, sources in zip(asked.tolist(), answers.argmax(1).tolist(), memory.sources(x[asked]), strict=False):
        came_from = ", ".join(f"{s.name} (a {s.label}) {s.weight:.0%}" for s in sources[:3])
        print(f"image {i}, a {labels[i]}, answered {answer}: from {came_from}")
    if options.picture:
        names = [f"a {labels[i]}, answered {answers[k].argmax()}" for k, i in enumerate(asked.tolist())]
        shown = images[asked].float() / 255, images[stored].float() / 255
        pictures.draw_attention(options.picture, *shown, {f"beta {BETA:g}": memory.attend(x[asked])}, names)
    gone = memory.sources(x[asked[:1]])[0][0].name
    memory.forget_image(gone)
    never = store(x, labels, stored[stored != int(gone.removeprefix("image "))])
    same = torch.equal(memory.answer(x[others]), never.answer(x[others]))
    print(
        f"{gone} forgotten: all answers are {'the same, bit for bit, as' if same else 'NOT those'} of a memory without it"
    )


if __name__ == "__main__":
    run(main)
