"""The stages of the ViT with memory, on a folder of images, and with the backbone that is in git."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reproduction import ROOT, set_params
from running import start
from safetensors.torch import load_file, save_file

from stages.common.backbone import load_backbone
from stages.common.drawings import Glyphs
from stages.common.randomness import generator
from stages.datasets import fetch_data
from stages.vit_memory import extract_features, train_few_shot
from stages.vit_memory.few_shot import FROZEN
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
    set_params(project / "params.yaml", SETTINGS)
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


def test_a_cnn_with_a_file_of_weights_goes_through_on_held_out_images(folder, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    save_file(model.state_dict(), folder / "cnn.safetensors")
    networks = "extract_features.networks.efficientnet_lite0"
    settings = ["extract_features.backbone=cnn.safetensors", "extract_features.network=efficientnet_lite0"]
    settings += [f"{networks}.name=resnet10t", f"{networks}.image_size=32", f"{networks}.layers=[-2,head]"]
    settings += ["extract_features.overrides.rafdb.train_images=36", "extract_features.base_images=20"]
    settings += ["extract_features.layer_episodes.n_way=3", "extract_features.layer_episodes.n_shot=1"]
    settings += ["train_few_shot.overrides.rafdb.n_way=2", "train_few_shot.n_shot=1", "train_few_shot.episodes=3"]
    set_params(folder / "params.yaml", settings)
    for stage in (fetch_data, extract_features, train_few_shot):
        start(monkeypatch, stage, dataset="rafdb")
    about = json.loads((folder / "reports/extract_features/rafdb/network.json").read_text())
    assert about["sha256"] == hashlib.sha256((folder / "cnn.safetensors").read_bytes()).hexdigest()
    assert about["layer"] == max(about["layer_acc"], key=about["layer_acc"].get)
    assert set(about["layer_acc"]) == {"-2", "head"}
    features = load_file(folder / "models/extract_features/rafdb/features.safetensors")
    images = load_file(folder / "data/rafdb.safetensors")["train_images"]
    assert len(features["train"]) == 36
    assert torch.equal(features["base_images"], images[36:56])  # none of what is learned from
    methods = json.loads((folder / "reports/train_few_shot/rafdb/summary.json").read_text())["methods"]
    assert set(methods) == set(FROZEN)  # nothing trains through a CNN


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
