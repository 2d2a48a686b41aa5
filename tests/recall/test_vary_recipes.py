"""Fleets whose recipes vary: those that are learned from must have learned."""

from pathlib import Path

import pytest
import yaml
from running import start

from stages.common.stage import InputError, Loader
from stages.recall import vary_recipes


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
        "some": {"recipe": "whole", "change": {"learning_rate": [learning_rate] * 2}, "train": train, "test": 2}
    }
    Path("params.yaml").write_text(yaml.dump(params | {"vary_recipes": own}))


@pytest.mark.usefixtures("inputs")
def test_a_fleet_that_diverges_is_named_and_leaves_no_result(monkeypatch):
    for train in (0, 2):
        fleets_with(1e30, train)
        remedy = "lower learning_rate of vary_recipes.recipes.whole, or of the fleet's change"
        with pytest.raises(InputError, match=f"^fleet some: training diverged, its loss is not finite: {remedy}$"):
            start(monkeypatch, vary_recipes)
    assert not Path("models/vary_recipes").exists()
    assert not Path("reports/vary_recipes").exists()


@pytest.mark.usefixtures("inputs")
def test_fine_tunes_outside_the_ranges_alone_may_lose_what_they_knew(monkeypatch):
    def loss(_objective, networks, *_):  # large of fine-tunes, which differ
        return 1.0 + 1e9 * networks.std(0).sum() + 0 * networks[:, 0]

    monkeypatch.setattr(vary_recipes, "held_out_loss", loss)
    fleets_with(2e-3, train=0)
    start(monkeypatch, vary_recipes)
    fleets_with(2e-3, train=2)
    with pytest.raises(
        InputError, match=r"^fleet some: training diverged, its loss is \S+ and was 2.08 untrained: lower"
    ):
        start(monkeypatch, vary_recipes)
