"""Relabelling hidden neurons leaves what every classifier computes as it is, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weightnet.classifiers import CLASSIFIERS, ResNetCifar
from weightnet.test_program import PAIRS, SHAPE, Body

from stages.common.stage import InputError
from stages.weightnet.tracing import neurons
from stages.weightnet.tracing.program import Program, Weights, run_stack, trace
from stages.weightnet.tracing.symmetry import Symmetry, derive_symmetry, permute, random_permutations, rescale


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def followed(model: nn.Module) -> tuple[Program, Symmetry, Weights]:
    """A program with its symmetry and weights in float64 of which no two are the same."""
    program = trace(model, SHAPE)
    weights = {
        name: torch.rand(1, *shape, generator=seeded()).double() + 0.5 for name, shape in program.layout.shapes.items()
    }
    for weight in weights.values():
        if weight.dim() > 2:
            weight.sub_(1).div_(weight[0, 0].numel() ** 0.5)
    return program, derive_symmetry(program), weights


def change(model: nn.Module, alone: str | None = None) -> float:
    """How far a relabelling moves the outputs, over their size; alone: of one tensor's axis only."""
    program, symmetry, weights = followed(model)
    permutations = random_permutations(symmetry, seeded())
    images = torch.randn(4, *SHAPE, generator=seeded()).double()
    moved = permute(weights, symmetry, permutations)
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in permutations.values())
    if alone is not None:
        moved = {**weights, alone: moved[alone]}
    before, after = run_stack(program, weights, images), run_stack(program, moved, images)
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_relabelling_a_classifier_s_neurons_leaves_its_function(name):
    torch.manual_seed(0)
    model = CLASSIFIERS[name]()
    program, symmetry, _ = followed(model)
    assert max(symmetry.sizes[group] for group in symmetry.free) > 1
    assert change(model) < 1e-9
    first = next(edge for edge in symmetry.edges if edge.target in symmetry.free and symmetry.sizes[edge.target] > 1)
    assert change(model, first.tensor) > 1e-6
    over_neurons = {axis.tensor for axis in symmetry.axes}
    assert {shape for name, shape in program.layout.shapes.items() if name not in over_neurons} <= {(), (1,)}


@pytest.mark.parametrize("name", PAIRS)
def test_relabelling_leaves_the_function_whatever_the_option(name):
    assert max(change(model) for model in PAIRS[name]) < 1e-9


@pytest.mark.parametrize("model", [*(CLASSIFIERS[name] for name in CLASSIFIERS), *PAIRS.values()])
def test_rescaling_neurons_that_only_relus_act_on_leaves_the_function(model):
    for one in model if isinstance(model, tuple) else (model(),):
        program, symmetry, weights = followed(one)
        factors = {
            group: torch.rand(1, symmetry.sizes[group], generator=seeded()).double() + 0.5
            for group in symmetry.hidden
            if group not in symmetry.rigid
        }
        images = torch.randn(4, *SHAPE, generator=seeded()).double()
        before = run_stack(program, weights, images)
        after = run_stack(program, rescale(weights, symmetry, factors), images)
        assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_every_column_of_a_layer_that_reads_a_result_twice_is_an_edge_s():
    symmetry = derive_symmetry(trace(Body(lambda _, x: torch.cat([x, x], 1), 16), SHAPE))
    columns = [edge.columns for edge in symmetry.edges if edge.tensor == "head.weight"]
    assert columns == [slice(0, 8), slice(8, 16)]


def test_shortcuts_without_weights_tie_the_channels_that_they_join_and_leave_the_others_free():
    symmetry = derive_symmetry(trace(ResNetCifar("A", 1), SHAPE))
    rows = next(axis for axis in symmetry.axes if axis.tensor == "layer2.0.conv2.weight" and axis.axis == 0)
    assert [(part.group, part.start, part.size) for part in rows.parts] == [
        ("layer2.0.conv2[0:4]", 0, 4),
        ("conv1", 4, 8),
        ("layer2.0.conv2[12:16]", 12, 4),
    ]
    whole = derive_symmetry(trace(ResNetCifar("B", 1), SHAPE))
    assert whole.sizes["layer2.0.conv2"] == 16


class Odd(nn.Module):
    """Layers with the names of the groups that are never permuted; some channels of the input are read by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output, self.head = nn.Conv2d(2, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.input(x[:, 1:])), F.relu(self.output(x[:, :1]))], 1).amax((2, 3)))


def test_channels_of_the_input_are_never_permuted_and_layers_may_have_any_name():
    symmetry = derive_symmetry(trace(Odd(), SHAPE))
    assert symmetry.sizes == {"input[0:1]": 1, "input[1:3]": 2, "input (layer)": 8, "output (layer)": 8, "output": 10}
    assert symmetry.hidden == symmetry.free == ["input (layer)", "output (layer)"]
    assert change(Odd()) < 1e-9


def test_neurons_that_a_constant_tells_apart_are_not_permuted():
    ramp = torch.linspace(0, 1, 8).view(8, 1, 1)
    assert derive_symmetry(trace(Body(lambda _, x: x * ramp), SHAPE)).free == []
    assert derive_symmetry(trace(Body(lambda _, x: x * torch.full((8, 1, 1), 3.0)), SHAPE)).free == ["conv"]


def test_a_kind_of_step_without_a_rule_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(neurons.RULES, "gelu")
    with pytest.raises(InputError, match=r"step act .gelu.: neurons cannot be followed through gelu"):
        derive_symmetry(trace(Body(lambda s, x: s.act(x), act=nn.GELU()), SHAPE))


def test_a_network_of_one_layer_has_no_hidden_neurons():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(14), nn.Flatten(1), nn.ReLU())
    assert derive_symmetry(trace(model, SHAPE)).hidden == []


def test_a_symmetry_is_printed_as_a_table():
    lines = str(derive_symmetry(trace(CLASSIFIERS["LeNet, view"](), SHAPE))).splitlines()
    assert lines[:3] == ["input: 3 neurons", "conv1: 6 neurons", "conv2: 16 neurons"]
    assert "fc1.weight    axis 0: fc1, axis 1: conv2 x 4" in lines
    assert "fc3.bias      axis 0: output" in lines
