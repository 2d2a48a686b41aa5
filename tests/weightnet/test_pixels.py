"""How pixels were scaled: by a batch norm's running mean, by the weights of black pixels, by answers; what is open stays open."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_networks import seeded
from torch import nn
from torch.nn.functional import cross_entropy, pad

from stages.weightnet.as_classifier import as_classifier, border_of
from stages.weightnet.pixels import (
    MARGIN,
    UNSCALED,
    black,
    black_value,
    hull,
    norm_error,
    plausible,
    told_by_weights,
    usual_scalings,
    what_is_said,
    what_is_said_of_borders,
)
from stages.weightnet.predict import Asked, OnPixels, find_marks
from stages.weightnet.tracing.program import bordered_input, rescaled_input, run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry
from stages.weightnet.zoo.networks import Networks

MEAN, STD = 0.1307, 0.3081
SCALINGS = usual_scalings("mnist")


def images(n=512):
    """Pixels from 0 to 1, those at the edges always black, in the zoo's units, around another mean image than a uniform one."""
    x = torch.rand(n, 1, 8, 8, generator=seeded()) * torch.linspace(0.2, 1, 8)
    x[:, :, :, :3] = 0
    return (x - MEAN) / STD


def as_networks(module: nn.Module) -> Networks:
    program = trace(module.eval(), (1, 8, 8))
    weights = {
        name: value.detach()[None] for name, value in module.state_dict().items() if name in program.layout.shapes
    }
    return Networks(program, derive_symmetry(program), weights, torch.tensor([False]))


CONVOLUTION = (nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
LINEAR = (nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


@pytest.mark.parametrize("layers", [CONVOLUTION, LINEAR], ids=["conv", "linear"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_batch_norm_s_running_mean_is_what_the_mean_image_gives(layers, name):
    module, x, (mean, std) = nn.Sequential(*layers), images(), SCALINGS[name]
    for layer in module:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0  # what it saw last is all that it keeps
    module.train()(x * std + mean)
    networks = as_networks(module)
    assert told_by_weights(networks, SCALINGS, x.mean(0)) == ([name], "batch norm")
    assert (norm_error(networks, x.mean(0)) < 1e-5) == (name == "standardised")


def test_behind_what_is_not_linear_a_batch_norm_tells_nothing():
    module = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 10))
    assert norm_error(as_networks(module), images().mean(0)) == math.inf
    assert norm_error(as_networks(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), images().mean(0)) == math.inf


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("name", SCALINGS)
def test_weights_of_black_pixels_move_by_black_times_what_biases_do(adam, name):
    torch.manual_seed(0)
    x, (mean, std) = images(64), SCALINGS[name]
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    before = [p.detach().clone() for p in module[1].parameters()]
    optimizer = torch.optim.Adam(module.parameters(), 1e-3) if adam else torch.optim.SGD(module.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(module(x * std + mean), torch.arange(64) % 10).backward()
        optimizer.step()
    weight, bias = (p.detach() - old for p, old in zip(module[1].parameters(), before, strict=True))
    black = -MEAN / STD * std + mean
    if adam and abs(black) > 1e-6:  # Adam sees signs alone; and of black that is rounding's, too
        black = math.copysign(1, black)
    if not adam or abs(black) == 1:
        torch.testing.assert_close(weight[:, 0], black * bias, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "black"), [("standardised", -MEAN / STD), ("from -1 to 1", -1.0), ("from 0 to 1", 0.0)]
)
def test_black_is_told_by_weights_that_have_moved_with_their_biases(name, black):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    torch.nn.init.uniform_(module[1].weight, -1 / 8, 1 / 8, generator=seeded())
    torch.nn.init.uniform_(module[1].bias, -1 / 8, 1 / 8, generator=seeded(1))
    mean_image = images().mean(0)
    assert math.isnan(black_value(as_networks(module), mean_image))  # nothing has moved
    moved = 0.1 * torch.randn(256, generator=seeded(2))
    with torch.no_grad():
        module[1].bias += moved
        module[1].weight += black * moved[:, None]
    assert black_value(as_networks(module), mean_image) == pytest.approx(black, abs=0.15)
    left, told_by = told_by_weights(as_networks(module), SCALINGS, mean_image)
    assert name in left and told_by == "weights of black pixels"
    assert ("from 0 to 1" in left) == ("from 0 to 255" in left) == (black == 0)


def test_of_a_first_convolution_black_pixels_tell_nothing():
    module = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    assert math.isnan(black_value(as_networks(module), images().mean(0)))
    assert told_by_weights(as_networks(module), SCALINGS, images().mean(0)) == (list(SCALINGS), "answers")
    assert told_by_weights(None, SCALINGS, images().mean(0)) == (list(SCALINGS), "answers")


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_about_as_plausible_is_left_open_and_said(apart):
    deviations = {
        "standardised": 3.0,
        "from 0 to 1": 1.0,
        "from -1 to 1": math.exp(MARGIN + (0.01 if apart else -0.01)),
    }
    ridge = SimpleNamespace(deviation=lambda marks: marks, predict=torch.zeros_like)
    examiner = SimpleNamespace(skill=0, scale={"target_mean": torch.zeros(1), "target_std": torch.ones(1)}, ridge=ridge)
    names = plausible(examiner, {name: torch.full((1, 1), value) for name, value in deviations.items()})
    assert names == ["from 0 to 1"] + ["from -1 to 1"] * (not apart)
    said = what_is_said(names, SCALINGS, "answers")
    assert ("taken to be from 0 to 1, by its answers" in said) == apart
    assert said.endswith("say which by --pixels 0.1307 0.3081, or -0.7386 0.6162") != apart


def test_a_hull_holds_the_intervals_of_all_and_the_value_of_the_first():
    center, half = torch.randn(3, 6, generator=seeded()), torch.rand(3, 6, generator=seeded())
    low, value, high = hull(torch.stack([center - half, center, center + half]))
    assert (low <= center - half).all() and (high >= center + half).all() and torch.equal(value, center[0])


def test_pixels_that_are_told_are_not_looked_for(monkeypatch):
    monkeypatch.setattr("stages.weightnet.predict.mark", lambda _, ends: torch.tensor([[ends]]))
    known, examiner = SimpleNamespace(dataset="mnist", mean_image=None), SimpleNamespace(exam=None)
    marks, said = find_marks(known, Asked(pixels=(3.0, 2.0)), examiner, lambda *ends: ends)
    assert marks.tolist() == [[3.0, 2.0]] and not said
    known.dataset = "mine"
    assert find_marks(known, Asked(), examiner, lambda *ends: ends)[0].tolist() == [list(UNSCALED)]


def test_an_image_with_a_border_is_what_a_network_of_larger_ones_was_given():
    module = nn.Sequential(*CONVOLUTION[:-1], nn.Linear(6 * 6 * 6, 10)).eval().double()
    x, (mean, std) = images(5).double(), SCALINGS["from 0 to 1"]
    expected = module(pad(x * std + mean, [2] * 4))  # black is 0 there, as ToTensor leaves it
    program = trace(module, (1, 12, 12))
    weights = {name: module.state_dict()[name][None] for name in program.layout.shapes}
    bordered = bordered_input(rescaled_input(program, mean, std), 2, black("mnist"))
    assert bordered.input_shape == (1, 8, 8)
    torch.testing.assert_close(run_stack(bordered, weights, x)[0], expected)
    torch.testing.assert_close(OnPixels(module, mean, std, 2, black("mnist"))(x), expected)
    assert black("mine") is None


@pytest.mark.parametrize("side, border", [(28, 0), (32, 2), (64, 0)])
def test_a_border_is_looked_for_where_images_are_a_little_larger(side, border):
    module = as_classifier(nn.Sequential(nn.Flatten(), nn.Linear(side * side, 10)), (1, 28, 28), 10)
    assert border_of(module, (1, 28, 28)) == border


@pytest.mark.parametrize("bordered", [False, True])
def test_of_resized_and_bordered_images_the_more_plausible_is_taken(monkeypatch, bordered):
    monkeypatch.setattr("stages.weightnet.predict.mark", lambda _, uncertain: torch.tensor([[uncertain]]))
    known = SimpleNamespace(dataset="mnist", mean_image=images().mean(0))
    ridge = SimpleNamespace(deviation=lambda marks: marks, predict=torch.zeros_like)
    scale = {"target_mean": torch.zeros(1), "target_std": torch.ones(1)}
    examiner = SimpleNamespace(exam=None, skill=0, scale=scale, ridge=ridge)
    sure, unsure = (lambda *_: 1.0), (lambda *_: math.exp(MARGIN + 0.01))
    resized, other = (unsure, sure) if bordered else (sure, unsure)
    marks, notes = find_marks(known, Asked(pixels=(0.0, 1.0)), examiner, resized, None, (other, None, 2))
    assert marks.tolist() == [[1.0]] and notes == [what_is_said_of_borders([bordered])]
    marks, notes = find_marks(known, Asked(pixels=(0.0, 1.0)), examiner, sure, None, (sure, None, 2))
    assert len(marks) == 2 and "not told apart" in notes[0]
