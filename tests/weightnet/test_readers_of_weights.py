"""What predictors see of weights, and what they must not."""

from dataclasses import replace

import pytest
import torch
from small_networks import CONFIG, INVARIANT, relabelled, seeded, untrained, zoo_networks

from stages.weightnet.evaluate_weightnet import one_sided
from stages.weightnet.predictors.ensemble import Predictor
from stages.weightnet.predictors.weightnet import attention_maps, cosines
from stages.weightnet.tracing.symmetry import random_permutations
from stages.weightnet.zoo.architectures import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", INVARIANT)
def test_predictions_do_not_change_when_neurons_are_relabelled_and_do_otherwise(kind, name):
    networks = zoo_networks(name, 4)
    model, statistics = untrained(kind, networks), torch.zeros(4, 5).double()
    before = model(networks, statistics)
    spread = before.std(0).min()
    assert (model(relabelled(networks), statistics) - before).abs().max() < 1e-9 * spread
    assert (model(one_sided(networks, seeded()), statistics) - before).abs().max() > 1e-3 * spread


@pytest.mark.parametrize("name", ["cnn3", "residual"])
@pytest.mark.parametrize("kind", ["weightnet", "probe"])
def test_in_single_precision_predictions_are_invariant_up_to_rounding(kind, name):
    exact = zoo_networks(name, 16)
    networks = replace(exact, weights={k: v.float() for k, v in exact.weights.items()})
    model, statistics = untrained(kind, networks).float(), torch.zeros(16, 5)
    before = model(networks, statistics)
    assert (model(relabelled(networks), statistics) - before).abs().max() < 1e-2 * before.std(0).min()


def test_the_lazy_design_ignores_what_changes_the_function_and_sees_what_does_not():
    networks = zoo_networks("cnn3", 4)
    model, statistics = untrained("one_sided", networks), torch.zeros(4, 5).double()
    before = model(networks, statistics)
    assert (model(one_sided(networks, seeded()), statistics) - before).abs().max() < 1e-12
    assert (model(relabelled(networks), statistics) - before).abs().max() > 1e-3 * before.std()


@pytest.mark.parametrize("part", ["cross", "intra"])
def test_an_ablation_takes_away_what_it_says(part):
    networks = zoo_networks("cnn3", 4)
    model = Predictor(CONFIG | {"kind": "weightnet", part: False}, networks, 5, seed=0)
    whole = Predictor(CONFIG | {"kind": "weightnet"}, networks, 5, seed=0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    model, whole = model.double().eval(), whole.double().eval()
    model.load_state_dict(whole.state_dict())
    statistics = torch.zeros(4, 5).double()
    assert not torch.allclose(model(networks, statistics), whole(networks, statistics))


def test_the_cosines_of_a_kernel_of_three_are_all_there_are():
    basis = cosines(3).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), atol=1e-6, rtol=1e-6)
    assert cosines(1).flatten().tolist() == pytest.approx([1, 0, 0])


def test_of_large_networks_a_few_weights_are_read_at_a_time(monkeypatch):
    networks = zoo_networks("residual")
    model = untrained("weightnet", networks)
    expected = model(networks, torch.zeros(3, 5))
    monkeypatch.setattr("stages.weightnet.predictors.weightnet.PAIRS", 60)
    torch.testing.assert_close(model(networks, torch.zeros(3, 5)), expected)


def test_attention_is_a_distribution_over_the_neurons_of_a_layer_and_moves_with_them():
    networks = zoo_networks("cnn3", 2)
    model = untrained("weightnet", networks).reader
    maps, moved = attention_maps(model, networks), attention_maps(model, relabelled(networks))
    orders = random_permutations(networks.symmetry, seeded())
    for layers, others in zip(maps, moved, strict=True):
        assert set(layers) == set(networks.symmetry.sizes)
        for group, x in layers.items():
            torch.testing.assert_close(x.sum(2), torch.ones_like(x.sum(2)))
            order = orders.get(group, torch.arange(x.shape[1]))
            torch.testing.assert_close(others[group], x[:, order][:, :, order])
