"""Fleets whose recipes vary: those that are learned from must have learned, and each hides its share of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reproduction import ROOT
from running import start
from tiny_vit import TEST, TRAIN, save_inputs

from stages.common.stage import InputError, Loader
from stages.recall import vary_recipes
from stages.recall.fleet import patchify_pools
from stages.recall.functional_vit import load_base
from stages.recall.objective import Objective


def fleets_with(learning_rate: float, train: int) -> None:
    """Have the stage make one fleet of whole networks, all at one rate."""
    params = yaml.load(Path("params.yaml").read_text(), Loader)
    own = params["vary_recipes"] | {"dataset": "tiny", "references": 20, "evaluation_images": 48}
    own["recipes"]["whole"] |= {
        "steps": [20, 20],
        "n_images": [16, 32],
        "batch_sizes": [8],
        "optimisers": ["adam"],
        "layers": ["all"],
    }
    own["fleets"] = {
        "some": {
            "recipe": "whole",
            "change": {"learning_rate": [learning_rate] * 2},
            "mask_ratio": 0.75,
            "train": train,
            "test": 2,
        }
    }
    Path("params.yaml").write_text(yaml.dump(params | {"vary_recipes": own}))


@pytest.mark.usefixtures("inputs")
def test_a_fleet_that_diverges_is_named_and_leaves_no_result(monkeypatch):
    for train in (0, 2):
        fleets_with(1e30, train)
        remedy = "lower the learning_rate of its recipe in vary_recipes"
        with pytest.raises(InputError, match=f"^fleet some: training diverged, its loss is not finite: {remedy}$"):
            start(monkeypatch, vary_recipes)
    assert not Path("models/vary_recipes").exists()
    assert not Path("reports/vary_recipes").exists()


@pytest.mark.usefixtures("inputs")
def test_fine_tunes_outside_the_ranges_alone_may_lose_what_they_knew(monkeypatch):
    def loss(_objective, networks, _frozen, _x, labels, *_):  # large of fine-tunes, which differ
        spread = networks.std(0).sum() if networks.dim() > 1 else 0.0
        return torch.full((len(labels),), 1.0 + 1e9 * spread)

    monkeypatch.setattr(vary_recipes, "held_out_loss", loss)
    fleets_with(2e-3, train=0)
    start(monkeypatch, vary_recipes)
    fleets_with(2e-3, train=2)
    with pytest.raises(
        InputError, match=r"^fleet some: training diverged, its loss is \S+ and was 2.08 untrained: lower"
    ):
        start(monkeypatch, vary_recipes)


@pytest.fixture
def params(tmp_path: Path, monkeypatch) -> vary_recipes.Params:
    """Parameters of a fleet of twelve, in a folder with a base."""
    monkeypatch.chdir(tmp_path)
    save_inputs("classify_masked")
    values = yaml.load((ROOT / "params.yaml").read_text(), Loader)["vary_recipes"]
    values |= {"dataset": "tiny", "references": 8, "evaluation_images": 8, "stack": 4}
    values["recipes"]["whole"] |= {"steps": [2, 4], "n_images": [16, 32], "batch_sizes": [8]}
    values["fleets"]["whole"] |= {"train": 10, "test": 2}
    return vary_recipes.Params(**values)


def drawn(params: vary_recipes.Params) -> list[vary_recipes.WideFineTune]:
    fleet = params.fleets["whole"]
    return vary_recipes.draw_fleet(
        "0/whole", {"train": fleet.train, "test": fleet.test}, params.recipe_of("whole"), TRAIN
    )


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_a_fleet_hides_its_share_and_each_fine_tune_stands_in_its_own_place(params, ratio):
    fine_tunes = drawn(params)
    base = load_base(vary_recipes.BASES / "tiny/backbone.safetensors")
    images = patchify_pools(base, TRAIN, TEST, params.references, params.evaluation_images)
    fleet = vary_recipes.build(fine_tunes, ratio, base, images, params.stack, Path("work/whole/1"), {})
    hidden = fleet.truth["recipe"][:, fleet.metadata["recipe"].index("mask ratio")]
    assert hidden.tolist() == [ratio] * len(fine_tunes)
    for place, one in enumerate(fine_tunes):
        alone = vary_recipes.finish([one], Objective(base, "labels", ratio), images)
        assert np.allclose(fleet.change[place], alone["change"][0], rtol=1e-3, atol=1e-7), place
        other = vary_recipes.finish([one], Objective(base, "labels", 0.75 - ratio), images)
        assert not np.allclose(fleet.change[place], other["change"][0], rtol=1e-3, atol=1e-7), place
    assert torch.equal(torch.from_numpy(fleet.test), torch.tensor([one.test for one in fine_tunes]))


def test_a_fleet_whose_training_may_stop_early_says_with_what_patience_and_after_how_many_steps(params):
    recipe = params.recipe_of("whole")
    early = recipe.stopping.model_copy(update={"patience": [0, 1], "every": 1})
    many = recipe.model_copy(update={"stopping": early, "distinct": (0.2, 0.5), "steps": (6, 12)})
    base = load_base(vary_recipes.BASES / "tiny/backbone.safetensors")
    images = patchify_pools(base, TRAIN, TEST, params.references, params.evaluation_images)
    fine_tunes = vary_recipes.draw_fleet("0/whole", {"train": 10, "test": 2}, many, TRAIN)
    fleet = vary_recipes.build(fine_tunes, 0.75, base, images, params.stack, Path("work/whole/2"), {})
    of = dict(zip(fleet.metadata["recipe"], fleet.truth["recipe"].T, strict=True))
    assert of["patience"].tolist() == [f.training.patience for f in fine_tunes]
    never = of["patience"] == 0
    assert np.array_equal(of["log steps kept"][never], of["log steps"][never])
    assert (of["log steps kept"] <= of["log steps"]).all() and (of["log steps kept"] < of["log steps"]).any()
    assert (fleet.truth["log2_distinct"] < fleet.truth["log2_size"]).all()


@pytest.mark.usefixtures("inputs")
def test_a_fleet_of_none_is_not_made(monkeypatch):
    fleets_with(2e-3, train=0)
    params = yaml.load(Path("params.yaml").read_text(), Loader)
    params["vary_recipes"]["fleets"]["none"] = params["vary_recipes"]["fleets"]["some"] | {"test": 0}
    Path("params.yaml").write_text(yaml.dump(params))
    start(monkeypatch, vary_recipes)
    assert [path.name for path in Path("models/vary_recipes").iterdir()] == ["some.safetensors"]
