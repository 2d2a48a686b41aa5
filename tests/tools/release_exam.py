"""Make a released exam of one that was trained: python tests/tools/release_exam.py mnist

Reads models/train_weightnet/<dataset>-exam/predictors.pt and data/<dataset>.safetensors, writes models/released/<dataset>-exam.pt and
the sum in its card: the drawn inputs in halves, and beside them the data set's mean image, by which batch norms tell of pixels.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from stages.common.checkpoints import load_torch, save_torch
from stages.common.files import load_json, save_json
from stages.common.images import load_images
from stages.common.work import fingerprint
from stages.weightnet.pixels import PIXELS


def release(dataset: str) -> Path:
    """Write the released file, and return its path."""
    state = load_torch(Path(f"models/train_weightnet/{dataset}-exam/predictors.pt"), {"exam"})
    exam, (mean, std) = state["exam"], PIXELS[dataset]
    exam["exam"]["inputs"] = exam["exam"]["inputs"].half()
    train, _ = load_images(dataset, torch.device("cpu"))
    image = train.pixels().mean(0, keepdim=True)
    exam["mean_image"] = ((interpolate(image, size=exam["input_shape"][1:], mode="area")[0] - mean) / std).half()
    path = Path(f"models/released/{dataset}-exam.pt")
    save_torch(path, state)
    card = path.with_suffix(".json")
    if card.is_file():
        save_json(card, load_json(card) | {"sha256": fingerprint(path)})
    return path


if __name__ == "__main__":
    print(release(sys.argv[1]))
