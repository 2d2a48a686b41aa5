"""How far movements of weights move outputs: exact where K-FAC's assumptions hold."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from stages.common.vectors import Layout
from stages.forecast.curvature import output_factors
from stages.forecast.examples import example, network_errors
from stages.forecast.layerwise import past_features, read_layer
from stages.forecast.trajectory import Trajectory

IMAGES = torch.randn(4000, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5


def of(network: nn.Module):
    """Return the layout, the weights and the factors of a network."""
    tensors = {name: p.detach().clone() for name, p in network.named_parameters()}
    layout = Layout.of(tensors)
    weights = layout.flatten(tensors)
    return layout, weights, output_factors(network, layout, weights, IMAGES, torch.Generator().manual_seed(1))


def moved(network: nn.Module, layout: Layout, weights: torch.Tensor, movement: torch.Tensor) -> float:
    """Return the mean squared movement of the outputs, summed over them, of a small movement of the weights."""
    with torch.no_grad():
        before, after = (
            functional_call(network, layout.unflatten(w), (IMAGES,)) for w in (weights, weights + movement)
        )
    return (after - before).square().sum(1).mean().item()


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 3)),
    "one position": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()),
    "normed": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()),
    "two layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_tensors_form_is_the_movement_of_the_outputs(kind):
    """Of linear networks, whose gradients do not depend on the images: of each tensor that moves alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[kind]()
    layout, weights, factors = of(network)
    random = torch.Generator().manual_seed(2)
    for (name, where), one in zip(layout.slices.items(), factors, strict=True):
        movement = torch.zeros(layout.size)
        movement[where] = 1e-2 * torch.randn(where.stop - where.start, generator=random)
        form = (one.times(movement[None, where]) @ movement[where]).item()
        assert form == pytest.approx(moved(network, layout, weights, movement), rel=0.15), name


def test_errors_that_are_learned_for_are_those_of_the_outputs():
    """Of a linear classifier: the ratio of an example's error to that of keeping the weights is that of outputs."""
    layout = Layout({"1.weight": (3, 18)})
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 3, bias=False))
    run = Trajectory(layout, torch.randn(30, 54, generator=torch.Generator().manual_seed(0)).cumsum(0), None)
    factors = output_factors(network, layout, run.weights[20], IMAGES, torch.Generator().manual_seed(1))
    one = example(run, 20, (1, 3), 2, factors)
    coefficients = 0.1 * torch.randn(1, 2, one.cross.shape[2], 2, generator=torch.Generator().manual_seed(3))
    errors, kept = network_errors(coefficients, one)
    units = read_layer(run, 20, 0, False).units
    ahead = run.weights[20] + units.movement * (coefficients[0, 0].T @ past_features(run, 20, slice(54), units))
    for i, h in enumerate((1, 3)):
        truth = run.weights[20 + h]
        a, b = (moved(network, layout, truth, w - truth) for w in (ahead[i], run.weights[20]))
        assert (errors[0, i] / kept[0, i]).item() == pytest.approx(a / b, rel=0.1)
    plain = example(run, 20, (1, 3), 2)
    assert torch.equal(plain.read, one.read) and not torch.allclose(plain.energy, one.energy)


def test_networks_of_other_layers_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 3))
    with pytest.raises(
        ValueError, match=r"expected weights of linear layers, convolutions and batch norms alone, got 1\.weight"
    ):
        of(network)
