"""What fine-tunes hide of images is drawn apart from all else, and each trains as its own share says."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reproduction import ROOT
from tiny_vit import TEST, TRAIN, save_inputs

from stages.common.stage import Loader
from stages.recall import vary_recipes
from stages.recall.fleet import patchify_pools
from stages.recall.functional_vit import load_base
from stages.recall.objective import Objective


@pytest.fixture
def params(tmp_path: Path, monkeypatch) -> vary_recipes.Params:
    """Parameters of a fleet of twelve, in a folder with a base."""
    monkeypatch.chdir(tmp_path)
    save_inputs("classify_masked")
    values = yaml.load((ROOT / "params.yaml").read_text(), Loader)["vary_recipes"]
    values |= {"dataset": "tiny", "references": 8, "evaluation_images": 8, "stack": 4, "mask_ratios": [0.75, 0.0]}
    values["recipes"]["whole"] |= {"steps": [2, 4], "n_images": [16, 32], "batch_sizes": [8]}
    values["fleets"]["whole"] |= {"train": 10, "test": 2}
    return vary_recipes.Params(**values)


def test_each_fine_tune_hides_its_own_share_and_stands_in_its_own_place(params):
    fine_tunes = vary_recipes.draw_fleet("whole", params, TRAIN)
    base = load_base(vary_recipes.BASES / "tiny/backbone.safetensors")
    images = patchify_pools(base, TRAIN, TEST, params.references, params.evaluation_images)
    fleet = vary_recipes.build("whole", fine_tunes, params, base, images)
    hidden = fleet.truth["recipe"][:, fleet.metadata["recipe"].index("mask ratio")]
    assert set(hidden.tolist()) == {0.75, 0.0}
    assert hidden.tolist() == vary_recipes.hidden_shares(fine_tunes, [0.75, 0.0])
    for place, one in enumerate(fine_tunes):
        alone = vary_recipes.finish([one], Objective(base, "labels", float(hidden[place])), images)
        assert np.allclose(fleet.change[place], alone["change"][0], rtol=1e-3, atol=1e-7), place
        other = vary_recipes.finish([one], Objective(base, "labels", 0.75 - float(hidden[place])), images)
        assert not np.allclose(fleet.change[place], other["change"][0], rtol=1e-3, atol=1e-7), place
    assert torch.equal(torch.from_numpy(fleet.test), torch.tensor([one.test for one in fine_tunes]))


def test_of_one_share_all_hide_it(params):
    fine_tunes = vary_recipes.draw_fleet("whole", params, TRAIN)
    assert vary_recipes.hidden_shares(fine_tunes, [0.5]) == [0.5] * len(fine_tunes)
