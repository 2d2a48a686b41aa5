"""The world of runs: what is drawn, and that a run is what its recipe says."""

from pathlib import Path

import pytest
import torch
from reproduction import ROOT, set_params
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parameters_to_vector

from stages.common.files import save_arrays
from stages.common.vectors import Layout
from stages.forecast import learn_world, train_world
from stages.forecast.learn_world import summarise
from stages.forecast.released import load_released
from stages.forecast.train_world import Params, draw_recipes, train_run
from stages.forecast.world import (
    NETWORKS,
    Recipe,
    build_network,
    build_optimizers,
    directions_of,
    load_world_run,
    world_input,
)

VARIANTS = ("outputs", "with_state")  # learned for outputs, of weights alone; for weights, with the optimiser's state


@pytest.fixture
def params(tmp_path, monkeypatch) -> Params:
    """A smaller world than that of params.yaml, whose place is an empty folder."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    small = ["train_world.steps=[80,90]", "train_world.train_images=64", "train_world.image_sizes=[8]"]
    small += ["learn_world.datasets=[digits,mnist]", "learn_world.strides=[1,2,3]", "learn_world.origins=2"]
    small += ["learn_world.reference_images=20", "learn_world.function_origins=2", "learn_world.curvature_images=8"]
    for variant in VARIANTS:
        small += [f"learn_world.variants.{variant}.steps=5", f"learn_world.variants.{variant}.d_model=4"]
    set_params(tmp_path / "params.yaml", small)
    monkeypatch.chdir(tmp_path)
    return Params.load("train_world", "digits")


def draw(params: Params, dataset: str) -> dict[str, Recipe]:
    return draw_recipes(dataset, **params.model_dump(exclude={"train_images", "test_images"}))


def test_every_network_is_trained_with_every_optimiser_within_the_ranges(params):
    recipes = draw(params, "digits")
    assert {(r.network, r.optimizer) for r in recipes.values()} == {
        (n, o) for n in NETWORKS for o in params.learning_rates
    }
    for r in recipes.values():
        low, high = params.learning_rates[r.optimizer]
        assert low <= r.learning_rate <= high
        assert r.steps % params.snapshot_every == 0
    assert recipes == draw(params, "digits")
    assert recipes != draw(params, "mnist")


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_serve_any_image_and_are_drawn_by_their_seed(network):
    recipe = Recipe(
        network=network,
        width=4,
        image_size=12,
        optimizer="adam",
        learning_rate=1e-3,
        schedule="cosine",
        batch_size=4,
        steps=5,
        seed=1,
    )
    for channels, pixels in ((1, 8), (3, 12)):
        x = torch.randn(2, channels, pixels, pixels)
        nets = [build_network(recipe.model_copy(update={"seed": seed}), channels, 7) for seed in (1, 1, 2)]
        a, b, c = (net.eval()(x) for net in nets)
        assert a.shape == (2, 7)
        assert torch.equal(a, b) and not torch.equal(a, c)
        for optimizer in ("adam", "adamw", "sgd", "muon"):
            made = build_optimizers(nets[0], recipe.model_copy(update={"optimizer": optimizer}))
            held = [p for o in made for group in o.param_groups for p in group["params"]]
            assert sorted(map(id, held)) == sorted(map(id, nets[0].parameters()))


def test_images_are_standardised_by_channel():
    x = world_input(torch.rand(20, 3, 8, 8) * torch.tensor([1, 2, 3])[:, None, None], 12)
    assert x.shape == (20, 3, 12, 12)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-5)


def test_a_run_ends_where_its_recipe_trains_to(params):
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    recipe = draw(params, "digits")["perceptron-adam-0"]
    run = train_run(recipe, (images, labels), (images, labels), 10, 5)
    assert run["weights"].shape[0] == recipe.steps // 5 + 1
    first = torch.cat([p.flatten() for p in build_network(recipe, 1, 10).parameters()])
    assert torch.equal(torch.from_numpy(run["weights"][0]), first.detach())
    shorter = train_run(
        recipe.model_copy(update={"steps": 20, "schedule": "constant"}), (images, labels), (images, labels), 10, 5
    )
    longer = train_run(
        recipe.model_copy(update={"steps": 30, "schedule": "constant"}), (images, labels), (images, labels), 10, 5
    )
    assert (shorter["weights"] == longer["weights"][:5]).all()
    assert run["state"].shape == run["weights"].shape and not run["state"][0].any() and run["state"][1:].any(1).all()


def test_the_world_is_trained_and_learned_from(params, monkeypatch):  # noqa: ARG001 (its folder)
    """Both stages, end to end, on next to nothing."""
    random = torch.Generator().manual_seed(0)
    for dataset in ("digits", "mnist"):
        arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_images"] = torch.randint(256, (70, 1, 8, 8), generator=random).byte().numpy()
            arrays[f"{split}_labels"] = torch.randint(3, (70,), generator=random).numpy()
        save_arrays(Path(f"data/{dataset}.safetensors"), arrays, {"classes": ["a", "b", "c"]})
        monkeypatch.setattr("sys.argv", ["train_world", "--dataset", dataset])
        train_world.main()
    for variant in VARIANTS:
        with_state = variant == "with_state"
        run, recipe = load_world_run(train_world.MODELS / "digits" / "residual-muon-0.safetensors", with_state)
        assert recipe.optimizer == "muon" and len(run) == recipe.steps // 5 + 1
        assert (run.state is not None) == with_state
        monkeypatch.setattr("sys.argv", ["learn_world", "--variant", variant])
        learn_world.main()
        model, _, card = load_released(learn_world.MODELS / variant / "forecaster.safetensors")
        assert card["learned_from"]["runs"] == 32 and card["config"]["with_state"] == with_state
        assert model.predict(run, 7).isfinite().all()
        assert {name: list(gains) for name, gains in model.gains.items()} == {"weights": [5, 10], "average": [5, 10]}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_what_is_kept_of_an_optimiser_is_the_direction_of_its_next_step(params, optimizer):
    """In the order of the weights, though Muon shares them with AdamW; where the gradient is 0 from now on, the step goes that way."""
    recipe = draw(params, "digits")[f"residual-{optimizer}-0"].model_copy(update={"schedule": "constant"})
    network = build_network(recipe, 1, 3)
    optimizers = build_optimizers(network, recipe)
    assert not directions_of(network, optimizers).any()
    for i in range(4):
        network(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i))).square().sum().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    before, kept = parameters_to_vector(network.parameters()).detach(), directions_of(network, optimizers)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers:
        for group in one.param_groups:
            group["weight_decay"] = 0.0
        one.step()
    moved = parameters_to_vector(network.parameters()).detach() - before
    for p, d, m in zip(
        network.parameters(),
        *(Layout.of(dict(network.named_parameters())).unflatten(x).values() for x in (kept, moved)),
        strict=True,
    ):
        assert p.shape == d.shape
        assert cosine_similarity(d.flatten(), -m.flatten(), dim=0) > (
            0.5 if optimizer == "muon" and p.dim() == 2 else 0.98
        )


def test_a_summary_counts_what_is_worse_than_keeping_the_weights():
    kinds = ("dataset", "network", "optimizer", "all")
    rows = [
        {"held_out": k, "h": 1, "raw": raw, "shrunk": 0.5, "logits": None if raw > 1 else raw}
        for k in kinds
        for raw in (0.5, 1.5)
    ]
    summary = summarise(rows)
    assert summary["all"]["1"] == {"mean": 1.0, "median": 1.0, "worst": 1.5, "above_1": 0.5}
    assert summary["all_shrunk"]["1"]["above_1"] == 0
    assert summary["all_logits"]["1"]["mean"] == 0.5  # where the run goes on so far
