"""The stage that trains bilinear classifiers: what its params become, and that a kill costs no finished run."""

from pathlib import Path

import pytest
import yaml
from running import start

from stages.bilinear import train_bilinear as stage
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


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stage_that_was_killed_trains_only_the_rest_and_ends_with_the_same_bytes(digits, monkeypatch):
    monkeypatch.setattr(stage, "parallel_map", lambda function, items, *_: list(map(function, items)))
    original, trained = stage.train_run, []

    def train_run(config):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(config["run_dir"])
        return original(config)

    monkeypatch.setattr(stage, "train_run", train_run)
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, stage, dataset="digits")
    assert not stage.MODELS.exists()  # nothing that is half there
    again = []
    monkeypatch.setattr(stage, "train_run", lambda config: again.append(config["run_dir"]) or original(config))
    start(monkeypatch, stage, dataset="digits")
    params = yaml.safe_load((digits / "params.yaml").read_text())["train_bilinear"]
    assert len(trained) + len(again) == len(set(trained + again)) == len(params["variants"]) * len(params["seeds"])
    resumed = contents(stage.MODELS) | contents(stage.REPORTS)
    assert not any((digits / ".work/train_bilinear/digits").iterdir())

    for run_dir in trained[:2]:  # written without having waited
        folder = digits / "alone"
        original(config_of(run_dir)).write(folder)
        written = {
            name: value for name, value in resumed.items() if name.startswith(str(Path(*Path(run_dir).parts[2:])))
        }
        assert list(contents(folder).values()) == list(written.values())


def config_of(run_dir: str) -> dict:
    """Return the config of the run that is kept in a folder."""
    dataset, variant, seed = Path(run_dir).parts[-3:]
    return Params.load("train_bilinear", dataset).config(dataset, variant, int(seed.removeprefix("seed")))
