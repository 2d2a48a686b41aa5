"""Groups of neurons of networks with attention, windows, groups and shuffles: what may be relabelled, and that it may."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from weightnet.modern import MODERN
from weightnet.test_program import SHAPE, classifier_difference
from weightnet.test_symmetry import followed, seeded

from stages.weightnet.tracing.groups import first_of_tied
from stages.weightnet.tracing.program import run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry, permute, random_permutations, without_groups


def moved_by(model: nn.Module, orders: dict[str, Tensor] | None = None) -> float:
    """How far a relabelling, by default one of every group, moves the outputs, over their size."""
    program, symmetry, weights = followed(model)
    orders = random_permutations(symmetry, seeded()) if orders is None else orders
    images = torch.randn(4, *SHAPE, generator=seeded()).double()
    before, after = (run_stack(program, w, images) for w in (weights, permute(weights, symmetry, orders)))
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", MODERN)
def test_a_classifier_is_computed_as_its_module_computes_it_and_relabelling_leaves_its_function(name):
    torch.manual_seed(0)
    model = MODERN[name]()
    assert classifier_difference(model) < 1e-9
    _, symmetry, _ = followed(model)
    orders = random_permutations(symmetry, seeded())
    assert moved_by(model, orders) < 1e-9
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    for group in symmetry.free:  # each is really moved
        if symmetry.sizes[group] > 1 and group not in {*symmetry.blocks, *symmetry.blocks.values()}:
            assert moved_by(model, {group: torch.arange(symmetry.sizes[group]).roll(1)}) < 1e-9


@pytest.mark.parametrize("name", ["tiny ViT", "fused attention", "torch's encoder", "windows"])
def test_heads_move_as_wholes_and_within_one_queries_go_with_keys(name):
    torch.manual_seed(0)
    model = MODERN[name]()
    _, symmetry, _ = followed(model)
    assert set(symmetry.free) == set(symmetry.hidden)
    pairs = [group for group, parent in symmetry.blocks.items() if group in symmetry.sizes]
    parents = {symmetry.blocks[group] for group in pairs}
    assert len(pairs) == 2 * len(parents)  # queries with keys, and values
    queries, values = pairs[:2]
    size, heads = symmetry.sizes[queries], symmetry.parents[symmetry.blocks[queries]]
    swap = torch.arange(size).view(heads, -1).roll(1, 0).flatten()
    table = {symmetry.blocks[queries]: torch.arange(heads).roll(1)}  # it may be of the heads alone
    assert moved_by(model, {queries: swap, values: swap} | table) < 1e-9
    assert moved_by(model, {queries: swap}) > 1e-6
    across = torch.arange(size)
    across[[0, size - 1]] = across[[size - 1, 0]]
    assert moved_by(model, {values: across}) > 1e-6


def test_the_stream_of_a_transformer_is_one_group_with_its_token_and_positions():
    symmetry = derive_symmetry(trace(MODERN["tiny ViT"](), SHAPE))
    stream = {(axis.tensor, axis.axis) for axis in symmetry.axes if axis.parts[0].group == "patches"}
    assert {("token", 2), ("positions", 2), ("gamma", 0), ("attention.out.weight", 0), ("mlp.2.bias", 0)} <= stream
    assert symmetry.sizes == {
        **{"input": 3, "patches": 12, "attention.q": 12, "attention.v": 12, "mlp.0": 24, "output": 10}
    }
    assert set(symmetry.blocks) == {"attention.q", "attention.v"}


def test_groups_of_a_convolution_move_as_wholes_with_those_that_they_read():
    model = MODERN["grouped"]()
    _, symmetry, _ = followed(model)
    assert symmetry.blocks["reduce"] == symmetry.blocks["groups"]
    assert symmetry.parents[symmetry.blocks["reduce"]] == 4
    assert symmetry.blocks["deep"] == "expand"  # each channel is read by two of the next
    swap = torch.arange(12).view(4, 3).roll(1, 0).flatten()
    assert moved_by(model, {"reduce": swap, "groups": swap}) < 1e-9
    assert moved_by(model, {"reduce": swap}) > 1e-6
    assert moved_by(model, {"expand": torch.arange(16).roll(1)}) > 1e-6
    assert "in 4 blocks that move as" in str(symmetry)


def test_a_kernel_in_groups_is_a_kernel_with_zeros():
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=False).double()
    x = torch.randn(2, 6, 9, 9).double()
    whole = without_groups(conv.weight[None], 2)[0]
    torch.testing.assert_close(torch.conv2d(x, whole), conv(x))


def test_shuffled_channels_are_groups_whose_neurons_lie_apart():
    _, symmetry, _ = followed(MODERN["shuffle"]())
    (read,) = [axis for axis in symmetry.axes if axis.tensor == "head.weight" and axis.axis == 1]
    assert any(part.step not in (None, 1) for part in read.parts)
    assert min(symmetry.sizes[part.group] for part in read.parts) > 1
    places = torch.cat([part.places.flatten() for part in read.parts])
    assert places.sort().values.tolist() == list(range(16))


def test_an_outer_product_pins_keys_and_queries_and_leaves_values_free():
    _, symmetry, _ = followed(MODERN["linear attention"]())
    assert "patches" in symmetry.free
    assert sum(symmetry.sizes[group] for group in symmetry.fixed if group.startswith("qkv")) == 16


def test_tied_neurons_have_the_first_of_them_as_root():
    random = np.random.default_rng(0)
    pairs = random.integers(0, 300, (2, 200))
    roots = first_of_tied(pairs, 300)
    known = {i: {i} for i in range(300)}
    for a, b in pairs.T.tolist():
        joined = known[a] | known[b]
        for neuron in joined:
            known[neuron] = joined
    assert roots.tolist() == [min(known[i]) for i in range(300)]
