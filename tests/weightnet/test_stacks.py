"""A stack of networks computes what each network computes, and relabelled networks are the same networks."""

import pytest
import torch
from small_networks import NETWORKS, SHAPE, Depthwise, build, outputs, random_weights, relabelled, seeded
from torch import Tensor, nn

from stages.common.stage import InputError
from stages.weightnet.evaluate_weightnet import one_sided
from stages.weightnet.predictors.data import augmented
from stages.weightnet.tracing.program import run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry, symmetry_error
from stages.weightnet.zoo.architectures import zoo_program
from stages.weightnet.zoo.networks import Networks


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_stack_computes_what_each_network_computes(kind):
    model = build(kind)
    program = trace(model, (1, 8, 8))
    model = model.double().eval()
    weights = random_weights(program.layout.shapes)
    images, own = torch.randn(5, 1, 8, 8).double(), torch.randn(3, 5, 1, 8, 8).double()
    shared, each = run_stack(program, weights, images), run_stack(program, weights, own)
    for i in range(3):
        model.load_state_dict({name: tensor[i] for name, tensor in weights.items()}, strict=False)  # it counts batches
        torch.testing.assert_close(shared[i], model(images))
        torch.testing.assert_close(each[i], model(own[i]))


@pytest.mark.parametrize("kind", NETWORKS)
def test_relabelling_neurons_leaves_the_function_and_a_single_layer_s_does_not(kind):
    program = trace(build(kind), (1, 8, 8))
    symmetry = derive_symmetry(program)
    networks = Networks(program, symmetry, random_weights(program.layout.shapes), torch.zeros(3, dtype=torch.bool))
    images = torch.randn(5, 1, 8, 8).double()
    moved = relabelled(networks)
    assert all(
        not torch.equal(moved.weights[a.tensor], networks.weights[a.tensor]) for a in symmetry.axes if a.role == "reads"
    )
    torch.testing.assert_close(outputs(moved, images), outputs(networks, images), rtol=1e-9, atol=1e-9)
    assert (outputs(one_sided(networks, seeded()), images) - outputs(networks, images)).abs().max() > 1e-3
    assert symmetry_error(program, symmetry, networks.weights, seeded()) < 1e-9


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("tanh", [False, True])
def test_rescaling_relu_and_flipping_tanh_leave_the_function(kind, tanh):
    program = trace(build(kind), (1, 8, 8))
    symmetry = derive_symmetry(program)
    networks = Networks(program, symmetry, random_weights(program.layout.shapes), torch.full((3,), tanh))
    images = torch.randn(5, 1, 8, 8).double()
    moved = augmented(networks, 0.3, seeded())
    assert any(not torch.equal(moved.weights[k], networks.weights[k]) for k in networks.weights)
    torch.testing.assert_close(outputs(moved, images), outputs(networks, images), rtol=1e-9, atol=1e-9)
    if kind is Depthwise:
        assert symmetry.rigid >= {"stem", "wide"}  # SiLU
    if kind == "cnn3":
        assert not symmetry.rigid


def test_a_draw_of_0_flips_no_neuron_to_nothing(monkeypatch):
    program, symmetry = zoo_program("cnn3", *SHAPE)
    networks = Networks(program, symmetry, random_weights(program.layout.shapes), torch.tensor([True, False, True]))
    images = torch.randn(5, 1, 8, 8).double()
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(shape))
    moved = augmented(networks, 0.3, seeded())
    torch.testing.assert_close(outputs(moved, images), outputs(networks, images), rtol=1e-9, atol=1e-9)


def test_a_residual_stream_is_one_group_and_groups_of_a_norm_are_kept():
    _, symmetry = zoo_program("residual", *SHAPE)
    writers = {a.tensor for a in symmetry.axes if a.axis == 0 and a.parts[0].group == "stem"}
    assert {"stem.weight", "first.3.weight", "second.3.weight", "first.4.bias"} <= writers
    blocks = derive_symmetry(trace(Depthwise(), (1, 8, 8)))
    assert {group: blocks.parents[parent] for group, parent in blocks.blocks.items()} == {"stem": 2}


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x.flatten(1), 1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1) + 0


class Twice(nn.Module):
    """What a convolution gives is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.flatten(self.b(torch.relu(x) + x), 1))


def test_what_is_read_twice_is_not_overwritten():
    program = trace(Twice(), (1, 8, 8))
    weights, images = random_weights(program.layout.shapes), torch.randn(2, 1, 8, 8, generator=seeded()).double()
    y = torch.conv2d(images, weights["a.weight"][0], weights["a.bias"][0])
    y = torch.conv2d(torch.relu(y) + y, weights["b.weight"][0], weights["b.bias"][0])
    expected = y.flatten(1) @ weights["head.weight"][0].T + weights["head.bias"][0]
    got = run_stack(program, weights, images, torch.tensor([False] * 3))
    torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unsupported(), "cumsum, which is not supported"),
        (Branching(), "Branching cannot be traced: step sum: it acts across the images of a batch"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)), "norm without running statistics"),
        (nn.Sequential(nn.Conv2d(1, 4, 3)), r"gives \[4, 6, 6\] for an image: expected one number for each class"),
        (Hidden(), "Hidden has no layers: its outputs depend on none of its weights"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(model, message):
    with pytest.raises(InputError, match=message):
        trace(model, (1, 8, 8))


def test_dropouts_of_several_layers_are_torch_s():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 16), nn.Dropout())
    program = trace(nn.Sequential(*model, nn.Linear(16, 10)), (1, 8, 8))
    weights, images = random_weights(program.layout.shapes), torch.randn(5, 1, 8, 8, generator=seeded()).double()
    masks = [2.0 * (torch.rand(3, 5, width, generator=seeded(width)) < 0.5) for width in program.numbers_of("dropout")]
    got = run_stack(program, weights, images, dropout=masks)
    for i in range(3):
        x = images.flatten(1)
        for layer, mask in zip((1, 3), masks, strict=True):
            x = (x @ weights[f"{layer}.weight"][i].T + weights[f"{layer}.bias"][i]) * mask[i]
        torch.testing.assert_close(got[i], x @ weights["5.weight"][i].T + weights["5.bias"][i])
