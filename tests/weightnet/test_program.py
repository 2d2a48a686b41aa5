"""What is run of a network is what its own module computes, to rounding, and no option is lost on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weightnet.classifiers import CLASSIFIERS

from stages.common.stage import InputError
from stages.weightnet.tracing import operations
from stages.weightnet.tracing.program import SOFTMAX, Program, Weights, run_stack, trace

SHAPE = (3, 16, 16)


def drawn(model: nn.Module, program: Program) -> Weights:
    """The weights of a module, of which no number is special, in float64: given to it, too."""
    random = torch.Generator().manual_seed(7)
    model.double().eval()
    for name, value in model.state_dict().items():
        if name in program.layout.shapes:
            value.mul_(torch.rand(value.shape, generator=random, dtype=torch.float64) + 0.5)
            value.add_(0.1 * torch.rand(value.shape, generator=random, dtype=torch.float64))
    return {name: value[None] for name, value in model.state_dict().items() if name in program.layout.shapes}


def difference(model: nn.Module, last: str | None = None) -> float:
    """How far what is run is from the module's own, over its size."""
    program = trace(model, SHAPE)
    weights = drawn(model, program)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected, got = model(images), run_stack(program, weights, images)[0]
    if last is not None:
        got = getattr(F, last)(got, dim=-1)
    return ((got - expected).abs().max() / expected.abs().max()).item()


def classifier_difference(model: nn.Module) -> float:
    """The same, of logits: a softmax at the module's end is left out of what is run, and said in a note."""
    notes = trace(model, SHAPE).notes
    last = next((kind for kind in SOFTMAX for note in notes if note.startswith(f"{kind} at the end left out")), None)
    return difference(model, last)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_ordinary_classifier_is_computed_as_its_module_computes_it(name):
    torch.manual_seed(0)
    model = CLASSIFIERS[name]()
    assert classifier_difference(model) < 1e-9


class Body(nn.Module):
    """A convolution, `function` of the module and its result, and a linear layer."""

    def __init__(self, function, width: int = 8, **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.head, self.function = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(width, 10), function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self, self.conv(x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def layer(module: nn.Module) -> Body:
    return Body(lambda self, x: self.layer(x), layer=module)


def in_place_and_read_again(_self: Body, x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    return y + x


def added_in_place(_self: Body, x: Tensor) -> Tensor:
    before = x.clone()
    x += torch.tanh(x)
    x.mul_(2)
    return x - before


PAIRS = {  # with an option, and without
    "slope": (layer(nn.LeakyReLU(0.3)), layer(nn.LeakyReLU())),
    "slope of a function": (Body(lambda _, x: F.leaky_relu(x, 0.3)), Body(lambda _, x: F.leaky_relu(x))),
    "alpha": (layer(nn.ELU(0.3)), layer(nn.ELU())),
    "alpha of CELU": (layer(nn.CELU(0.3)), layer(nn.CELU())),
    "form of GELU": (layer(nn.GELU("tanh")), layer(nn.GELU())),
    "beta": (layer(nn.Softplus(3.0)), layer(nn.Softplus())),
    "limits": (layer(nn.Hardtanh(-0.2, 0.3)), layer(nn.Hardtanh())),
    "clamp": (Body(lambda _, x: x.clamp(min=0.1)), Body(lambda _, x: x.clamp(min=0))),
    "slopes of channels": (layer(nn.PReLU(8)), layer(nn.PReLU())),
    "count_include_pad": (layer(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), layer(nn.AvgPool2d(3, 2, 1))),
    "divisor_override": (layer(nn.AvgPool2d(3, 2, 1, divisor_override=5)), layer(nn.AvgPool2d(3, 2, 1))),
    "ceil_mode of a mean": (layer(nn.AvgPool2d(3, 2, ceil_mode=True)), layer(nn.AvgPool2d(3, 2))),
    "ceil_mode": (layer(nn.MaxPool2d(3, 2, ceil_mode=True)), layer(nn.MaxPool2d(3, 2))),
    "dilation of a pool": (layer(nn.MaxPool2d(3, 2, dilation=2)), layer(nn.MaxPool2d(3, 2))),
    "padding of a function": (Body(lambda _, x: F.max_pool2d(x, 3, 2, 1)), Body(lambda _, x: F.max_pool2d(x, 3, 2))),
    "dilation": (layer(nn.Conv2d(8, 8, 3, padding=1, dilation=2)), layer(nn.Conv2d(8, 8, 3, padding=1))),
    "padding same": (layer(nn.Conv2d(8, 8, 4, padding="same")), layer(nn.Conv2d(8, 8, 4))),
    "padding mode": (
        layer(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
        layer(nn.Conv2d(8, 8, 3, padding=1)),
    ),
    "stride": (layer(nn.Conv2d(8, 8, 3, stride=(1, 2))), layer(nn.Conv2d(8, 8, 3))),
    "groups": (layer(nn.Conv2d(8, 8, 3, groups=4)), layer(nn.Conv2d(8, 8, 3))),
    "eps": (layer(nn.BatchNorm2d(8, eps=0.5)), layer(nn.BatchNorm2d(8))),
    "groups of a norm": (layer(nn.GroupNorm(4, 8)), layer(nn.GroupNorm(2, 8))),
    "axes of a norm": (layer(nn.LayerNorm((8, 16, 16))), layer(nn.LayerNorm((16, 16)))),
    "alpha of a sum": (Body(lambda _, x: torch.add(x, x.tanh(), alpha=3)), Body(lambda _, x: torch.add(x, x.tanh()))),
    "order of a difference": (Body(lambda _, x: 1 - x), Body(lambda _, x: x - 1)),
    "order of a quotient": (Body(lambda _, x: 1 / (2 + x * x)), Body(lambda _, x: (2 + x * x) / 1)),
    "constants": (Body(lambda _, x: (x - 0.3) / 0.2), Body(lambda _, x: x)),
    "in place": (Body(in_place_and_read_again), Body(lambda _, x: F.relu(x) + x)),
    "sums in place": (Body(added_in_place), Body(lambda _, x: x.tanh() * 2)),
    "keepdim": (Body(lambda _, x: x - x.mean((2, 3), keepdim=True)), Body(lambda _, x: x - x.mean(1, keepdim=True))),
    "both halves": (
        Body(lambda _, x: torch.cat([x, x], 1), 16),
        Body(lambda _, x: torch.cat([x, torch.zeros_like(x)], 1), 16),
    ),
    "parts": (Body(lambda _, x: x.split([3, 5], 1)[1], 5), Body(lambda _, x: x.split([5, 3], 1)[0], 5)),
    "border": (Body(lambda _, x: F.pad(x, (1, 1), value=2.0)), Body(lambda _, x: F.pad(x, (1, 1)))),
    "constant kernels": (
        Body(lambda _, x: F.conv2d(x, torch.arange(9.0).view(1, 1, 3, 3).to(x).expand(8, 1, 3, 3), groups=8)),
        Body(lambda _, x: F.conv2d(x, torch.arange(72.0).view(8, 1, 3, 3).to(x), groups=8)),
    ),
    "mode of a border": (
        Body(lambda _, x: F.pad(x, (2, 1, 0, 0), mode="reflect")),
        Body(lambda _, x: F.pad(x, (2, 1))),
    ),
    "way of resizing": (
        Body(lambda _, x: F.interpolate(x, size=(3, 5), mode="bilinear", align_corners=True)),
        Body(lambda _, x: F.interpolate(x, size=(3, 5), mode="bilinear")),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_option_that_changes_the_function_is_kept(name):
    with_it, without = PAIRS[name]
    assert difference(with_it) < 1e-9
    assert difference(without) < 1e-9
    same = {k: v for k, v in with_it.state_dict().items() if v.shape == without.state_dict().get(k, v).shape}
    without.load_state_dict(same, strict=False)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    assert (with_it(images) - without(images)).abs().max() > 1e-5


class Counting(nn.Module):
    """Every call gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.calls = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.conv(x).mean((2, 3)) * self.calls)


class Positional(nn.Module):
    """The third image of a batch is not treated like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(x if len(x) < 3 else x * 2)


def through_a_view(_self: Body, x: Tensor) -> Tensor:
    rows = x.flatten(2)
    x.relu_()
    return rows.mean(2)


class Longer(Counting):
    """The second call does more."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.conv(x).mean((2, 3))
        return torch.relu(self.head(x)) if self.calls > 1 else self.head(x)


def attends_to_another(self: Body, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return self.attention(x, x.tanh(), x)[0].mean(1)


REFUSED = {
    "longer": (Longer(), "it gives other results for the same images when it is called again"),
    "noise": (
        Body(lambda _, x: x + torch.rand(16)),
        "it gives other results for the same images when it is called again",
    ),
    "state": (Counting(), "it gives other results for the same images when it is called again"),
    "batch": (Positional(), "step mul: forward takes another way for other images or weights"),
    "values": (Body(lambda _, x: x if x.mean((1, 2, 3))[0] > 0 else -x), "single images of a batch are taken"),
    "truth": (Body(lambda _, x: x if (x.mean((1, 2, 3)) * 1).any() else -x), "any, which is not supported"),
    "number": (Body(lambda _, x: x * x.mean((1, 2, 3)).tolist()[0]), "must not depend on the values of an image"),
    "numpy": (Body(lambda _, x: torch.as_tensor(x.numpy())), "must not depend on the values of an image"),
    "view": (Body(through_a_view), "step mean: it reads what was changed in place since, through another view of it"),
    "always dropping": (Body(lambda _, x: F.dropout(x)), "pass training=self.training"),
    "half": (Body(lambda _, x: x.half().float()), "half, which is not supported"),
    "batch as channels": (Body(lambda _, x: x.view(-1, 8, 8, 8)), "what it returns mixes the images of a batch"),
    "convolved parts": (
        Body(lambda s, x: s.layer(x.view(-1, 8, 8, 8)), layer=nn.Conv2d(8, 8, 3)),
        "step layer .conv2d.: it is given a batch whose images are cut into parts",
    ),
    "recurrent over the batch": (
        Body(lambda s, x: s.layer(x.mean(1))[0][:, -1], layer=nn.LSTM(16, 8)),
        "step layer .getitem.: single images of a batch are taken",
    ),
    "recurrent from elsewhere": (
        Body(
            lambda s, x: s.layer(x.mean(1), torch.ones(1, len(x), 8).double())[0][:, -1],
            layer=nn.GRU(16, 8, batch_first=True),
        ),
        "GRU that does not start from zeros is not supported",
    ),
    "transposed": (
        layer(nn.ConvTranspose2d(8, 8, 3)),
        "step layer .conv_transpose2d.: conv_transpose2d, which is not sup",
    ),
    "orthogonal": (layer(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))), "tril, which is not sup"),
    "attention": (
        Body(attends_to_another, attention=nn.MultiheadAttention(8, 2, batch_first=True)),
        "MultiheadAttention to what is not its query is not supported",
    ),
    "script": (layer(torch.jit.script(nn.ReLU())), "made outside of torch's functions"),
    "batch statistics": (layer(nn.BatchNorm2d(8, track_running_stats=False)), "layer .batch_norm.: a norm without"),
    "two results": (Body(lambda _, x: (x, x)), "cannot run on images"),
    "other size": (nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), "is that their shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_one_image_and_the_weights_is_refused_by_name_in_one_line(name):
    model, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as refusal:
        trace(model, SHAPE)
    text = str(refusal.value)
    assert text.startswith(f"{type(model).__name__} cannot be traced: ")
    assert not {"\n", "\x1b"} & set(text) and " at 0x" not in text


@pytest.mark.parametrize(
    ("kind", "wrong", "step"),
    [
        ("relu6", lambda x: F.relu(x), "act"),
        ("tanh", lambda x: x.tanh() * (1 + 1e-8), "second"),
    ],
)
def test_a_step_that_is_run_wrongly_is_the_one_that_is_named(monkeypatch, kind, wrong, step):
    model = Body(lambda self, x: self.second(self.act(4 * x)), act=nn.ReLU6(), second=nn.Tanh())
    assert difference(model) < 1e-9
    monkeypatch.setitem(operations.POINTWISE, kind, wrong)
    with pytest.raises(InputError, match=rf"cannot be traced: step {step} .*what is run differs from the module's own"):
        trace(model, SHAPE)


def test_tracing_leaves_a_module_and_the_random_numbers_as_they_were():
    torch.manual_seed(3)
    model = Body(lambda self, x: self.layer(x), layer=nn.BatchNorm2d(8)).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    trace(model, SHAPE)
    assert model.training
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_forward_does_not_use_are_named_and_left_out():
    program = trace(CLASSIFIERS["normalised input"](), SHAPE)
    assert program.unused == ("auxiliary.weight", "auxiliary.bias")
    assert program.notes == ("not used by forward, left out: auxiliary",)
    assert not set(program.layout.shapes) & set(program.unused)
    many = Body(lambda _, x: x, **{f"spare{i}": nn.Linear(2, 2) for i in range(7)})
    assert trace(many, SHAPE).notes == (
        "not used by forward, left out: spare0, spare1, spare2, spare3, spare4 and 2 more",
    )


def test_a_network_keeps_its_input_whether_it_reads_it_or_not():
    program = trace(Body(lambda _, x: x), SHAPE)
    assert program.input_shape == SHAPE
    with pytest.raises(InputError, match="has no layers"):
        trace(nn.Flatten(), SHAPE)
