"""The stage that trains bilinear classifiers: what its params become."""

import pytest

from stages.bilinear.train_bilinear import Params
from stages.common.stage import InputError


@pytest.mark.usefixtures("project")
def test_a_runs_config_is_made_of_params_and_its_seed():
    params = Params.load("train_bilinear", "digits")
    config = params.config("digits", "two_layer", 7)
    assert config["seed"] == 7
    assert config["run_dir"] == "models/train_bilinear/digits/two_layer/seed7"
    assert config["dataset"] == {"name": "digits", "validation_fraction": 0.15, "split_seed": 0}
    assert config["model"] == {"n_layer": 2, "d_hidden": 16, "bias": False, "residual": False}
    assert config["train"]["input_noise"] == params.variants["two_layer"].input_noise
    assert config["train"]["epochs"] == 2
    assert (
        not {"gradient_clip", "noise_bank", "mirror"} & config["train"].keys()
    )  # as checkpoints were before there were such values
    values = params.model_dump() | {"gradient_clip": 1.0}
    clipped = Params.parse(values, lambda path: f"train_bilinear.{'.'.join(path)}")
    assert clipped.config("digits", "two_layer", 7)["train"]["gradient_clip"] == 1.0


@pytest.mark.usefixtures("project")
def test_a_seed_that_is_named_twice_is_an_error():
    values = Params.load("train_bilinear", "digits").model_dump()
    with pytest.raises(InputError, match=r"train_bilinear.seeds: .*a seed is named twice"):
        Params.parse(values | {"seeds": [1, 1]}, lambda path: f"train_bilinear.{'.'.join(path)}")
