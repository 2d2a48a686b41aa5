"""The stages of the ViT with memory, on a folder of images, and with the backbone that is in git."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dvc.utils.hydra import apply_overrides
from PIL import Image
from reproduction import ROOT
from running import start
from safetensors.torch import load_file

from stages.common.backbone import load_backbone
from stages.common.drawings import Glyphs
from stages.common.randomness import generator
from stages.datasets import fetch_data
from stages.vit_memory import extract_features, train_few_shot
from stages.vit_memory.pretrain_backbone import EVALUATION, Params, nearest_mean_accuracy

RELEASED = Path("models/released")
EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
SETTINGS = [  # what the data set's own overrides ask for is for a GPU
    "extract_features.datasets=[rafdb]",
    "extract_features.backbone=models/released/backbone.safetensors",
    "train_few_shot.overrides.rafdb.steps=1",
]


@pytest.fixture
def folder(project):
    """A project whose faces are glyphs of 100 pixels, one glyph an emotion."""
    labels, random = torch.arange(7).repeat_interleave(12), generator(0, "faces")
    for i, image in enumerate(Glyphs(7, seed=5).draw(labels, 100, random)[:, 0]):
        place = project / "rafdb" / ("train" if i % 12 < 8 else "test") / EMOTIONS[labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).convert("RGB").save(place / f"{i}.png")
    apply_overrides(project / "params.yaml", SETTINGS)
    (project / RELEASED).mkdir(parents=True)
    shutil.copy(ROOT / RELEASED / "backbone.safetensors", project / RELEASED)
    return project


def test_a_folder_of_faces_goes_through_and_its_classes_are_told_apart(folder, monkeypatch):
    for stage in (fetch_data, extract_features, train_few_shot):
        start(monkeypatch, stage, dataset="rafdb")
    with Image.open(folder / "rafdb/train/angry/0.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    images, labels = (load_file(folder / "data/rafdb.safetensors")[f"train_{what}"] for what in ("images", "labels"))
    assert labels[(images == pixels).flatten(1).all(1)].tolist() == [0]  # angry comes first
    shots = json.loads((folder / "reports/train_few_shot/rafdb/summary.json").read_text())
    assert shots["chance"] == 1 / 7
    assert min(shots["methods"][m]["acc"]["mean"] for m in ("linear_probe", "memory_head", "nearest_mean")) > 0.75


def test_the_released_backbone_is_as_small_and_as_good_as_it_says():
    params = Params.load("pretrain_backbone", variant="glyphs")
    card = json.loads((ROOT / RELEASED / "backbone.json").read_text())
    path = ROOT / RELEASED / "backbone.safetensors"
    unseen, learn, test = EVALUATION
    labels = torch.arange(unseen * (learn + test)) % unseen
    random = generator(params.seed, "unseen glyphs")
    images = Glyphs(params.classes + unseen, params.seed).draw(params.classes + labels, 32, random)
    backbone, known = load_backbone(path), torch.arange(len(labels)) < unseen * learn
    measured = nearest_mean_accuracy(backbone.features(images)[:, 0], labels, known)
    assert abs(measured - card["scores"]["glyph_acc"]["backbone"]) < 0.005
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card["sha256"]
    assert path.stat().st_size < 1e6
