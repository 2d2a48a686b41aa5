"""Zoos are what they say they are, and grow."""

import numpy as np
import pytest
import torch
from reproduction import set_params
from running import start
from small_networks import RECIPE, outputs, seeded, zoo_networks
from torch.nn.functional import cross_entropy

from stages.datasets import fetch_data
from stages.weightnet import build_zoo
from stages.weightnet.build_zoo import MEASURED, plan_stacks
from stages.weightnet.evaluate_weightnet import score
from stages.weightnet.tracing.program import run_stack
from stages.weightnet.tracing.symmetry import symmetry_error
from stages.weightnet.zoo.architectures import zoo_program
from stages.weightnet.zoo.properties import fgsm, measure
from stages.weightnet.zoo.reading import load_zoo
from stages.weightnet.zoo.runs import draw_all, draw_run
from stages.weightnet.zoo.training import train_stack


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_torchvision_s_networks_can_be_members_of_a_zoo(name):
    program, symmetry = zoo_program(name, 1, 10, 32)
    assert program.steps[0].shape == (1, 32, 32)
    assert program.steps[-1].shape == (10,)
    assert {axis.tensor for axis in symmetry.axes} == set(program.layout.shapes)
    run = draw_run(f"{name}-0", 0, RECIPE)
    weights = program.layout.unflatten(draw_all(run, program, torch.zeros(9, dtype=torch.long)).weights[None])
    weights = {k: torch.rand(v.shape, generator=seeded()) + 0.5 if v.dim() == 2 else v for k, v in weights.items()}
    assert symmetry_error(program, symmetry, weights, seeded()) < 1e-9
    edge = next(edge for edge in symmetry.edges if edge.target in symmetry.hidden)
    broken = weights | {edge.tensor: weights[edge.tensor].roll(1, 1)}
    images = torch.randn(2, 1, 32, 32, generator=seeded())
    assert (run_stack(program, broken, images) - run_stack(program, weights, images)).abs().max() > 1e-3


def test_fgsm_moves_every_pixel_by_its_step_and_raises_the_loss():
    networks = zoo_networks("cnn3")
    images, labels = torch.randn(20, 1, 8, 8).double(), torch.arange(20) % 10
    attacked = fgsm(networks.program, networks.weights, images, labels, networks.tanh, 1e-3)
    torch.testing.assert_close((attacked - images).abs(), torch.full_like(attacked, 1e-3))
    before, after = outputs(networks, images), outputs(networks, attacked)
    for i in range(3):
        assert cross_entropy(after[i], labels) > cross_entropy(before[i], labels)


def grow(monkeypatch, project, runs: int) -> None:
    """Build a zoo of so many runs in the working folder, in shards of 4."""
    settings = [f"build_zoo.variants.cnn3.runs={runs}", "build_zoo.shard_runs=4"]
    set_params(project / "params.yaml", settings)
    monkeypatch.setattr(build_zoo.pictures, "draw_zoo", lambda *_: None)
    start(monkeypatch, build_zoo, dataset="digits", variant="cnn3")


def test_growing_a_zoo_trains_the_rest_only_and_shrinking_drops_it(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    trained = []
    original = build_zoo.train_stack
    monkeypatch.setattr(build_zoo, "train_stack", lambda *args: (trained.append(len(args[1])), original(*args))[1])
    grow(monkeypatch, project, 8)
    small = load_zoo("digits", "cnn3")
    assert sum(trained) == 8
    grow(monkeypatch, project, 12)
    zoo = load_zoo("digits", "cnn3")
    assert sum(trained) == 12
    assert len(zoo) == 12 * 3
    kept = [zoo.index["run"].index(name) for name in small.index["run"][::3]]
    assert torch.equal(zoo.flat(torch.tensor(kept)), small.flat(torch.arange(0, len(small), 3)))
    grow(monkeypatch, project, 8)
    assert sum(trained) == 12
    assert len(load_zoo("digits", "cnn3")) == 8 * 3


def test_networks_of_a_zoo_are_those_of_its_shards_whatever_is_asked_for_first(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    grow(monkeypatch, project, 10)
    zoo = load_zoo("digits", "cnn3")
    assert [len(shard) for shard in zoo.shards] == [12, 12, 6]
    rows = torch.randperm(30, generator=seeded())
    assert torch.equal(zoo.flat(rows), torch.cat(zoo.shards)[rows])
    monkeypatch.setattr(build_zoo, "SHARD_WEIGHTS", 6 * zoo.program.layout.size)  # two runs
    start(monkeypatch, build_zoo, dataset="digits", variant="cnn3")
    assert [len(shard) for shard in load_zoo("digits", "cnn3").shards] == [6] * 5


def test_the_index_is_what_was_measured(built):
    zoo, images, params = built.zoo, built.images, built.params
    rows = torch.tensor([5, 17, 40])
    networks = zoo.networks(rows)
    pixels = images.test[0]
    noise = torch.randn(pixels.shape, generator=build_zoo.generator(params.seed, "noise of test images"))
    noisy = pixels + params.noise * noise
    values = (networks.tanh, images.test, noisy, params.fgsm_images, params.fgsm_step)
    for name, measured in measure(zoo.program, networks.weights, *values).items():
        # sums round otherwise in a stack of other size, by which an image at the border may change its class
        one_image = 1 / params.fgsm_images if name in ("fgsm_acc", "noise_acc", "test_acc") else 0.0
        assert measured.numpy() == pytest.approx(zoo.column(name)[rows], rel=1e-5, abs=1.01 * one_image), name
    assert zoo.column("gap") == pytest.approx(zoo.column("train_acc") - zoo.column("test_acc"), abs=1e-12)
    assert set(MEASURED) <= set(zoo.index)
    assert zoo.index["snapshot"] == ["initial", "middle", "final"] * 256
    assert len(set(zoo.index["run"])) == len(set(zoo.index["config"])) == 256
    assert set(zoo.index["seed"]) == {params.seed}


def test_a_run_trained_again_from_its_seed_is_the_network_in_the_zoo(built):
    runs = [draw_run(f"cnn3-{i}", built.params.seed, built.params.recipe) for i in range(256)]
    stack = plan_stacks(runs, built.params.shard_runs, built.params.variant.stack)[0][0]
    at = built.zoo.index["run"].index(stack[3].name)
    again = train_stack(built.zoo.program, [stack[3]], *built.images.train)[0]
    torch.testing.assert_close(again, built.zoo.flat(torch.arange(at, at + 3)), rtol=1e-3, atol=1e-4)
    assert built.zoo.index["config"][at] == stack[3].config


def test_accuracy_under_fgsm_is_no_function_of_accuracy(built):
    final = [i for i, name in enumerate(built.zoo.snapshot) if name == "final"]
    clean, attacked = (built.zoo.column(name)[final] for name in ("test_acc", "fgsm_acc"))
    assert (attacked <= clean + 0.1).all()
    alike = np.abs(clean[:, None] - clean) < 0.005  # the same number of test images, with each other
    np.fill_diagonal(alike, False)
    apart = np.abs(attacked[:, None] - attacked)[alike]
    assert (apart > 0.05).mean() > 0.2
    assert score(clean, attacked)["tau"] < 0.95
