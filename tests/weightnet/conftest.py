"""A small zoo that tests share."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from reproduction import ROOT, set_params
from running import start

from stages.common.images import load_images
from stages.datasets import fetch_data
from stages.weightnet import build_zoo
from stages.weightnet.zoo.reading import Images, Zoo, load_zoo, zoo_images


@dataclass(frozen=True)
class Built:
    """A zoo with what it was made of."""

    zoo: Zoo
    images: Images
    params: build_zoo.Params


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A real zoo, trained shortly: 256 runs of cnn3 on small digits."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("zoo")
        shutil.copy(ROOT / "params.yaml", folder)
        runs, images, steps = "variants.cnn3.runs=256", "images.test_images=200", "recipe.steps=[10,60]"
        settings = [f"build_zoo.{setting}" for setting in (runs, images, steps, "fgsm_images=100")]
        set_params(folder / "params.yaml", settings)
        patch.chdir(folder)
        patch.setenv("WEIGHTLENS_DEVICE", "cpu")
        patch.delenv("RAY_ADDRESS", raising=False)
        load_images.cache_clear()
        start(patch, fetch_data, dataset="digits")
        start(patch, build_zoo, dataset="digits", variant="cnn3")
        params = build_zoo.Params.load("build_zoo", "digits", "cnn3")
        found = Built(load_zoo("digits", "cnn3"), zoo_images("digits", params.images, torch.device("cpu")), params)
        load_images.cache_clear()
        return found
