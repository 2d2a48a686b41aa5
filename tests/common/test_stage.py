"""params.yaml is the only source of values, and a user sees all mistakes in it at once."""

from pathlib import Path

import pytest
from pydantic import PositiveInt

from stages.common.stage import InputError, StageParams, lookup


class Variant(StageParams):
    noise: float


class Params(StageParams):
    epochs: PositiveInt
    rate: float
    variant: Variant


@pytest.fixture(autouse=True)
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(
        "train:\n  datasets: [a, b]\n  epochs: 3\n  rate: 1e-3\n"
        "  variants:\n    plain: {noise: 0.0}\n    noisy: {noise: 0.1}\n"
        "  overrides:\n    a: {}\n    b: {epochs: 5, variants: {noisy: {noise: 0.2}}}\n"
    )
    return path


def test_overrides_change_one_item_alone():
    assert Params.load("train", "a", "noisy") == Params(epochs=3, rate=1e-3, variant=Variant(noise=0.1))
    assert Params.load("train", "b", "noisy") == Params(epochs=5, rate=1e-3, variant=Variant(noise=0.2))
    assert Params.load("train", "b", "plain").variant.noise == 0.0


def test_every_problem_is_reported_at_once(yaml):
    yaml.write_text(yaml.read_text().replace("epochs: 3", "epoch: 3").replace("rate: 1e-3", "rate: fast"))
    with pytest.raises(InputError) as error:
        Params.load("train", "a", "plain")
    assert sorted(str(error.value).splitlines()) == [
        "params.yaml: train.epoch: Extra inputs are not permitted",
        "params.yaml: train.epochs: Field required",
        "params.yaml: train.rate: Input should be a valid number, unable to parse string as a number",
    ]


def test_out_of_range_is_named_with_its_full_key(yaml):
    yaml.write_text(yaml.read_text().replace("epochs: 5", "epochs: -5"))
    with pytest.raises(InputError, match=r"^params.yaml: train.overrides.b.epochs: Input should be greater than 0$"):
        Params.load("train", "b", "plain")


def test_an_override_of_what_is_not_there_is_refused(yaml):
    original = yaml.read_text()
    for wrong in ("epoch: 5", "variants: {noisi: {noise: 0.2}}", "variants: {noisy: {noize: 0.2}}"):
        yaml.write_text(original.replace("epochs: 5", wrong).replace(", variants: {noisy: {noise: 0.2}}", ""))
        with pytest.raises(InputError, match=r"train.overrides.b.*(epoch|noisi|noize) changes nothing"):
            Params.load("train", "b", "plain")


def test_unknown_items_and_files_are_named(yaml):
    with pytest.raises(InputError, match=r"params.yaml: train.overrides.c is missing \(there: a, b\)"):
        Params.load("train", "c", "plain")
    with pytest.raises(InputError, match=r"train.variants.unheard-of is missing \(there: noisy, plain\)"):
        Params.load("train", "a", "unheard-of")
    yaml.write_text("train: [")
    with pytest.raises(InputError, match="not valid YAML"):
        lookup("train")
    yaml.unlink()
    with pytest.raises(InputError, match=r"run from the project's top folder"):
        lookup("train")
