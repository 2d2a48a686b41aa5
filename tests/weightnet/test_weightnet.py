"""Relabelled networks are the same networks; a stack trains like each alone; what the zoo's index says is what was measured."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from benchmark_zoo import train_alone
from dvc.utils.hydra import apply_overrides
from reproduction import ROOT
from running import start
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.common.checkpoints import save_torch
from stages.common.images import load_images
from stages.common.stage import InputError
from stages.datasets import fetch_data
from stages.weightnet import build_zoo, evaluate_weightnet, predict, train_weightnet
from stages.weightnet.build_zoo import MEASURED, plan_stacks
from stages.weightnet.evaluate_weightnet import by_architecture, learning_curve, one_sided, score
from stages.weightnet.predictors.data import Data, Member, augmented, hyperparameters, prepare, statistics_of
from stages.weightnet.predictors.ensemble import Ensemble, Predictor
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.simple import boost, nearest
from stages.weightnet.predictors.splits import ALL, Split, Task, TaskParams, plan_tasks, split_zoos
from stages.weightnet.predictors.statistics import pooled_statistics, range_of_statistics
from stages.weightnet.predictors.targets import from_scale, to_scale
from stages.weightnet.predictors.weightnet import attention_maps, cosines
from stages.weightnet.tracing.convolution import convolve
from stages.weightnet.tracing.program import Weights, run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry, permute, random_permutations, symmetry_error
from stages.weightnet.train_weightnet import Job, train_and_predict
from stages.weightnet.train_weightnet import Params as TrainParams
from stages.weightnet.zoo.architectures import ARCHITECTURES, build_network, zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES, REFERENCES, fgsm, measure
from stages.weightnet.zoo.reading import Images, Zoo, load_zoo, zoo_images
from stages.weightnet.zoo.runs import Recipe, draw_all, draw_run, fit_to
from stages.weightnet.zoo.training import train_stack

SHAPE = (1, 10, 8)  # channels, classes, pixels of a side
RECIPE = Recipe(
    learning_rate=(1e-3, 1e-2),
    sgd_factor=3.0,
    weight_decay=(1e-4, 1e-1),
    init_scale=(0.5, 2.0),
    train_fraction=(0.2, 1.0),
    label_noise=(0.0, 0.6),
    dropout=(0.0, 0.5),
    steps=(3, 9),
    batch_size=8,
)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(shapes, n=3) -> Weights:
    """Weights of n networks in float64, none of them zero: variances positive."""
    return {
        name: torch.rand(n, *shape, dtype=torch.float64) + 0.5
        if name.endswith("running_var")
        else 0.5 * torch.randn(n, *shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def zoo_networks(name: str, n=3) -> Networks:
    program, symmetry = zoo_program(name, *SHAPE)
    return Networks(program, symmetry, random_weights(program.layout.shapes, n), torch.arange(n) % 2 == 1)


def outputs(networks: Networks, images: Tensor) -> Tensor:
    return run_stack(networks.program, networks.weights, images, networks.tanh)


def relabelled(networks: Networks) -> Networks:
    moved = permute(networks.weights, networks.symmetry, random_permutations(networks.symmetry, seeded()))
    return replace(networks, weights=moved)


class Dense(nn.Module):
    """What densely connected networks do: concatenate what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1), nn.Conv2d(7, 5, 1)
        self.norm, self.pool, self.head = nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.Linear(5 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.cat([x, torch.relu(self.b(x))], 1)
        return self.head(torch.flatten(self.pool(self.c(torch.relu(self.norm(x)))), 1))


class Depthwise(nn.Module):
    """What mobile networks do: a depthwise convolution inside a residual block, and hidden activations that are not ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.wide, self.deep, self.narrow = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 6, 1)
        self.grouped, self.act, self.head = nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.narrow(self.act(self.deep(self.wide(x))))
        return self.head(self.grouped(x).mean((2, 3)))


class Normed(nn.Module):
    """Batch norms, which normalise by the batch in training and by running statistics afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.a(x)))
        return self.head(torch.relu(self.second(self.b(x)) + x).mean((2, 3)))


NETWORKS = [*ARCHITECTURES, Dense, Depthwise, Normed]


def build(kind) -> nn.Module:
    return build_network(kind, *SHAPE) if isinstance(kind, str) else kind()


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


@pytest.fixture
def empties_are_nan():
    """Memory that is not initialised holds NaNs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("side", "taps", "stride", "padding"),
    [
        (8, (3, 3), (2, 2), (1, 1)),
        (4, (3, 3), (2, 2), (1, 1)),
        (2, (3, 3), (2, 2), (1, 1)),
        (9, (5, 5), (1, 1), (2, 2)),
        (6, (1, 1), (1, 1), (0, 0)),
        (9, (2, 2), (3, 3), (1, 1)),
        (12, (5, 5), (2, 2), (0, 0)),
        (9, (3, 1), (1, 2), (1, 0)),
        (9, (2, 3), (2, 1), (0, 1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("empties_are_nan")
def test_convolutions_and_their_gradients_are_torch_s(side, taps, stride, padding, channels, shared):
    n, c, d = 2, channels, 4
    x = torch.randn(1 if shared else n, 5, side, side, c, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, d, c, *taps, dtype=torch.float64, requires_grad=True)
    y = convolve(x, weight, stride, padding)
    expected = torch.stack(
        [
            torch.conv2d(x[min(i, len(x) - 1)].permute(0, 3, 1, 2), weight[i], stride=stride, padding=padding)
            for i in range(n)
        ]
    ).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    got, reference = (torch.autograd.grad((v * direction).sum(), (x, weight)) for v in (y, expected))
    for a, b in zip(got, reference, strict=True):
        torch.testing.assert_close(a, b)


def training_data() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 1, 8, 8, generator=seeded()).double(), torch.randint(10, (64,), generator=seeded(1))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, Normed])
def test_a_stack_trains_as_torch_s_optimisers_train_each_alone(kind):
    images, labels = training_data()
    program = trace(build(kind), (1, 8, 8))
    drawn = [draw_run(f"it-{i}", 0, RECIPE) for i in range(4)]
    runs = [replace(run, dropout=0.0, tanh=False, sgd=i % 2 == 1) for i, run in enumerate(drawn)]
    assert len({run.steps for run in runs}) > 1
    stacked = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        model = train_alone(build(kind), run, program, images, labels)
        final = program.layout.unflatten(stacked[i, 2:3])
        for name, expected in model.state_dict().items():
            if expected.is_floating_point():
                torch.testing.assert_close(final[name][0], expected, rtol=1e-9, atol=1e-11)


def test_what_a_network_has_no_place_for_is_not_drawn():
    drawn = replace(draw_run("it-0", 0, RECIPE), tanh=True, dropout=0.3)
    for kind, expected in {"cnn3": (True, 0.3), "resnet18": (True, 0.0), "mobilenet_v2": (False, 0.3)}.items():
        run = fit_to(drawn, zoo_program(kind, *SHAPE)[0])
        assert (run.tanh, run.dropout) == expected, kind


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


def test_a_run_does_not_depend_on_the_others_of_its_stack():
    images, labels = training_data()
    program, _ = zoo_program("cnn3", *SHAPE)
    runs = [draw_run(f"cnn3-{i}", 0, RECIPE) for i in range(6)]
    assert {bool(run.dropout) for run in runs} == {run.tanh for run in runs} == {False, True}
    together = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        alone = train_stack(program, [run], images, labels)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(alone[0], draw_all(run, program, labels).weights.double())


CONFIG = {"d": 8, "heads": 2, "rounds": 2, "cross": True, "intra": True, "probes": 8, "properties": len(PROPERTIES)}
INVARIANT = ["weightnet", "probe", "nfn", "canonical"]


def untrained(kind: str, networks: Networks) -> Predictor:
    return Predictor(CONFIG | {"kind": kind}, networks, 5, seed=0).double().eval()


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


def test_scales_of_properties_are_inverted():
    values = torch.rand(20, len(PROPERTIES)) * 0.9 + 0.05
    torch.testing.assert_close(from_scale(to_scale(values)), values)


def test_scores_of_perfect_reversed_and_constant_predictions():
    truth = torch.rand(50, generator=seeded()).numpy()
    assert score(truth, truth) == {"tau": pytest.approx(1), "rho": pytest.approx(1), "r2": pytest.approx(1)}
    assert score(truth, -truth)["tau"] == pytest.approx(-1)
    assert score(truth, 0 * truth)["tau"] == 0


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
    apply_overrides(project / "params.yaml", settings)
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


@dataclass(frozen=True)
class Built:
    """A zoo with what it was made of."""

    zoo: Zoo
    images: Images
    params: build_zoo.Params


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A real zoo, trained shortly: 256 runs of cnn3 on small digits."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("zoo")
        shutil.copy(ROOT / "params.yaml", folder)
        runs, images, steps = "variants.cnn3.runs=256", "images.test_images=200", "recipe.steps=[10,60]"
        settings = [f"build_zoo.{setting}" for setting in (runs, images, steps, "fgsm_images=100")]
        apply_overrides(folder / "params.yaml", settings)
        patch.chdir(folder)
        patch.setenv("WEIGHTLENS_DEVICE", "cpu")
        patch.delenv("RAY_ADDRESS", raising=False)
        load_images.cache_clear()
        start(patch, fetch_data, dataset="digits")
        start(patch, build_zoo, dataset="digits", variant="cnn3")
        params = build_zoo.Params.load("build_zoo", "digits", "cnn3")
        found = Built(load_zoo("digits", "cnn3"), zoo_images("digits", params.images, torch.device("cpu")), params)
        load_images.cache_clear()
        return found


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


def test_no_run_is_in_two_parts_of_a_split(built):
    zoos = {"cnn3": built.zoo, "other": built.zoo}
    split = split_zoos(zoos, ["cnn3"], ["cnn3", "other"], (0.2, 0.2), ["middle", "final"], 1.0, 0)
    parts = [part["cnn3"] for part in (split.train, split.validation, split.test)]
    for column in (built.zoo.run.tolist(), built.zoo.index["config"]):
        found = [{column[i] for i in part.tolist()} for part in parts]
        assert sum(map(len, found)) == len(set.union(*found)) == 256
    assert {built.zoo.snapshot[i] for i in parts[0]} == {"middle", "final"}
    assert {built.zoo.snapshot[i] for i in parts[2]} == {"final"}
    assert len(split.test["other"]) == 256
    less = split_zoos(zoos, ["cnn3"], ["cnn3"], (0.2, 0.2), ["middle", "final"], 0.5, 0)
    assert torch.equal(less.test["cnn3"], split.test["cnn3"])
    assert set(less.train["cnn3"].tolist()) < set(split.train["cnn3"].tolist())
    with pytest.raises(InputError, match=r"too few to split: raise build_zoo.variants.cnn3.runs"):
        split_zoos(zoos, ["cnn3"], ["cnn3"], (0.5, 0.5), ["final"], 1.0, 0)


def member(kind: str, **changes) -> Member:
    values = {"tasks": "main", "epochs": 1, "learning_rate": 4e-3, "augment": True}
    names = set(CONFIG) - {"properties"}
    return Member(kind=kind, **{k: CONFIG[k] for k in names} | values | changes)


def data_of(zoo: Zoo, split: Split, kind: str = "gbm") -> Data:
    return prepare({"cnn3": zoo}, split, kind, {("cnn3", False): statistics_of(zoo, False)}, pooled=False)


def halves(zoo: Zoo, seed: int, snapshots: list[str]) -> Split:
    """An eighth of the runs validates, a half tests."""
    return split_zoos({"cnn3": zoo}, ["cnn3"], ["cnn3"], (0.125, 0.5), snapshots, 1.0, seed)


def tau_of_accuracy(zoo: Zoo, split: Split, predicted: Tensor) -> float:
    return score(zoo.column("test_acc")[split.test["cnn3"]], predicted[:, 0].numpy())["tau"]


def test_from_shuffled_labels_nothing_is_learnt_and_from_true_ones_much(built):
    order = torch.randperm(len(built.zoo) // 3, generator=seeded()).repeat_interleave(3) * 3 + torch.arange(3).repeat(
        256
    )
    columns = {name: [built.zoo.index[name][i] for i in order.tolist()] for name in MEASURED}
    shuffled = replace(built.zoo, index=built.zoo.index | columns)
    taus: dict[str, list[float]] = {"true": [], "shuffled": []}
    for name, zoo in (("true", built.zoo), ("shuffled", shuffled)):
        for seed in range(3):
            split = halves(zoo, seed, ["final"])
            taus[name].append(tau_of_accuracy(zoo, split, boost(data_of(zoo, split), 15)[1]))
    assert abs(np.mean(taus["shuffled"])) < 0.1
    assert np.mean(taus["true"]) > 0.4


def test_a_nearest_neighbour_knows_nothing_unless_snapshots_of_a_run_are_on_both_sides(built):
    zoo = built.zoo
    honest, leaky = [], []
    for seed in range(8):
        split = halves(zoo, seed, ["middle", "final"])
        honest.append(tau_of_accuracy(zoo, split, nearest(data_of(zoo, split))[1]))
        trained = torch.tensor([i for i, name in enumerate(zoo.snapshot) if name != "initial"])
        rows = trained[torch.randperm(len(trained), generator=seeded(seed))]
        mixed = Split({"cnn3": rows[150:]}, {"cnn3": rows[:20]}, {"cnn3": rows[20:150]})
        leaky.append(tau_of_accuracy(zoo, mixed, nearest(data_of(zoo, mixed))[1]))
    assert abs(np.mean(honest)) < 0.15
    assert np.mean(leaky) > np.mean(honest) + 0.2


def test_accuracy_under_fgsm_is_no_function_of_accuracy(built):
    final = [i for i, name in enumerate(built.zoo.snapshot) if name == "final"]
    clean, attacked = (built.zoo.column(name)[final] for name in ("test_acc", "fgsm_acc"))
    assert (attacked <= clean + 0.1).all()
    alike = np.abs(clean[:, None] - clean) < 0.005  # the same number of test images, with each other
    np.fill_diagonal(alike, False)
    apart = np.abs(attacked[:, None] - attacked)[alike]
    assert (apart > 0.05).mean() > 0.2
    assert score(clean, attacked)["tau"] < 0.95


def plan(architectures: list[str], main: str, **changes) -> TaskParams:
    values = {"splits": 1, "seeds": 1, "shares": [], "hold_out": True, "share_of_others": 0.25}
    return TaskParams(architectures=architectures, main=main, **values | changes)


def test_a_held_out_architecture_is_never_learnt_from_and_all_others_are():
    names = ["a", "b", "c"]
    tasks = plan_tasks(plan(names, "b", splits=4, seeds=3, shares=[0.5]))
    assert list(tasks) == ["b", "b_0.5", ALL, "to_a", "to_b", "to_c"]
    assert tasks["b"] == Task(["b"], ["b"], splits=4, seeds=3, pooled=False)
    for name in names:
        assert {*tasks[f"to_{name}"].train, name} == set(names)
        assert tasks[f"to_{name}"].test == [name]
        assert name not in tasks[f"to_{name}"].train
    assert list(plan_tasks(plan(["b"], "b"))) == ["b", ALL]
    assert list(plan_tasks(plan(names, "b", hold_out=False))) == ["b", ALL]
    with pytest.raises(InputError, match="main is d, but"):
        plan_tasks(plan(names, "d"))


@pytest.mark.parametrize("n", [9, 16, 27])
def test_intervals_hold_as_many_new_networks_as_they_say(n):
    """Errors of validation networks and of a new one are alike: the new one's is among the smallest 90 % as often as that."""
    errors = torch.rand(n, 100_000, generator=seeded())
    held = (torch.rand(100_000, generator=seeded(1)) <= conformal_quantile(errors)).double().mean().item()
    assert 0.9 - 0.005 < held < 0.9 + 1 / (n + 1) + 0.005


def test_several_predictors_predict_their_mean_from_first_weights_of_their_own(built):
    zoos = {"cnn3": select(built.zoo, (built.zoo.run < 48).nonzero()[:, 0])}
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    task, statistics = Task(["cnn3"], ["cnn3"], seeds=2), {("cnn3", True): statistics_of(zoos["cnn3"], True)}
    job = Job("it", member("stats"), ALL, task, 1)
    result = train_and_predict(job, zoos, statistics, params)
    fractions = (params.validation_fraction, params.test_fraction)
    split = split_zoos(zoos, ["cnn3"], ["cnn3"], fractions, params.snapshots, 1.0, params.seed + 1)
    data = prepare(zoos, split, "stats", statistics, pooled=True)
    models = [train_weightnet.train_predictor(job, number, data, params)[0] for number in range(2)]
    alone = torch.stack([train_weightnet.predict([model], data, split.test) for model in models])
    assert (alone[0] - alone[1]).abs().min() > 0
    mean = from_scale(alone.mean(0) * data.scale["target_std"] + data.scale["target_mean"])
    (table,) = (table for table in result["tables"] if table["part"] == "test")
    torch.testing.assert_close(table["values"][1], mean)
    networks = zoos["cnn3"].networks(split.test["cnn3"])
    parts = (result["kept"]["errors"], data.inputs["cnn3"], data.names, data.targets["cnn3"])
    kept = Ensemble(models, data.scale, *parts)
    torch.testing.assert_close(kept.standardised(networks), alone.mean(0))
    low, center, high = kept.intervals(networks)
    torch.testing.assert_close(center, mean)
    assert ((low < center) & (center < high)).all()
    torch.testing.assert_close(torch.stack([low, center, high]), table["values"])


def test_large_networks_are_read_and_learnt_from_in_parts_as_if_at_once(built, monkeypatch):
    zoo = select(built.zoo, (built.zoo.run < 32).nonzero()[:, 0])
    params = TrainParams.load("train_weightnet", "digits", "weightnet")
    task = Task(["cnn3"], ["cnn3"], pooled=False)
    job = Job("it", member("weightnet", augment=False), "cnn3", task, 0)
    found = []
    for most in (1 << 22, 2100):  # all at once; 3 at a time
        monkeypatch.setattr("stages.weightnet.zoo.reading.MOST_PAIRS", most)
        statistics = {("cnn3", False): statistics_of(zoo, False)}
        assert zoo.at_a_time(32) == (32 if most > 2100 else 3)
        found.append(train_and_predict(job, {"cnn3": zoo}, statistics, params)["tables"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one["values"], other["values"], rtol=1e-3, atol=1e-4)


def test_summaries_are_of_the_rows_that_they_name():
    def row(predictor, task, split, architecture, tau, name="test_acc"):
        who = {"predictor": predictor, "task": task, "split": split, "architecture": architecture, "property": name}
        return who | {"tau": tau, "r2": 0.0}

    held = by_architecture(
        [row("p", "to_a", 0, "a", 0.2), row("p", "to_b", 0, "b", 0.6), row("p", "to_b", 0, "b", 0, "gap")]
    )
    assert {name: found["p"]["mean"] for name, found in held.items()} == pytest.approx(
        {"a": 0.2, "b": 0.6, "mean": 0.4}
    )
    assert by_architecture([]) == {"mean": {}}
    rows = [
        row("p", "a", 0, "a", 0.5),
        row("p", "a", 1, "a", 0.9),
        row("p", "a_0.5", 0, "a", 0.3),
        row("q", "a", 0, "a", 1),
    ]
    curve = learning_curve(rows, {("p", "a"): 100, ("p", "a_0.5"): 50})
    assert {n: point["mean"] for n, point in curve["p"].items()} == {"50": 0.3, "100": 0.5}
    assert set(curve) == {"p"}


def test_of_large_networks_a_few_weights_are_read_at_a_time(monkeypatch):
    networks = zoo_networks("residual")
    model = untrained("weightnet", networks)
    expected = model(networks, torch.zeros(3, 5))
    monkeypatch.setattr("stages.weightnet.predictors.weightnet.PAIRS", 60)
    torch.testing.assert_close(model(networks, torch.zeros(3, 5)), expected)


@pytest.mark.parametrize("kind", ["weightnet", "stats", "gbm"])
def test_scrambled_metadata_changes_no_prediction_from_weights(built, kind):
    """What predictors may read is the weights and the activation: the other columns of the index could be anything."""
    few = built.zoo.run < 48
    zoo = select(built.zoo, few.nonzero()[:, 0])
    read = {"run", "snapshot", "activation", *PROPERTIES}
    scrambled = replace(zoo, index={k: v if k in read else v[::-1] for k, v in zoo.index.items()})
    assert hyperparameters(scrambled).ne(hyperparameters(zoo)).any()
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    job = Job("it", member(kind), "cnn3", Task(["cnn3"], ["cnn3"], pooled=False), 0)
    results = [
        train_and_predict(job, {"cnn3": z}, {("cnn3", False): statistics_of(z, False)}, params)["tables"]
        for z in (zoo, scrambled)
    ]
    assert len(results[0]) == len(results[1]) == 2
    assert all(torch.equal(a["values"], b["values"]) for a, b in zip(*results, strict=True))


def test_a_killed_family_trains_only_the_rest_and_ends_with_the_same_bytes(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    start(monkeypatch, build_zoo, dataset="digits", variant="cnn3")

    def dying(job, *rest):
        if job.name == "one_sided":
            raise InputError("killed")
        return train_and_predict(job, *rest)

    monkeypatch.setattr(train_weightnet, "train_and_predict", dying)
    with pytest.raises(InputError, match="killed"):
        start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    finished = {
        path.parent.parent.name.partition("-")[0] for path in (project / ".work/train_weightnet").rglob("result.pt")
    }
    assert finished and "one_sided" not in finished
    again: list[str] = []
    monkeypatch.setattr(
        train_weightnet, "train_and_predict", lambda job, *r: (again.append(job.name), train_and_predict(job, *r))[1]
    )
    start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    assert set(again) == {"no_cross", "no_intra", "no_augmentation", "canonical", "one_sided"} - finished
    predictions = project / "models/train_weightnet/digits-ablations/predictions.parquet"
    resumed = predictions.read_bytes()
    shutil.rmtree(".work/train_weightnet")
    start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    assert predictions.read_bytes() == resumed


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("variants.baselines.members.nfn.kind=nothing", "variants.baselines.members.nfn.kind"),
        ("variants.baselines.members.stats.epochs=0", "variants.baselines.members.stats.epochs"),
        ("member.heads=0", "member.heads"),
    ],
)
def test_a_mistake_in_a_member_is_named_where_it_was_made(project, setting, key):
    apply_overrides(project / "params.yaml", [f"train_weightnet.{setting}"])
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    with pytest.raises(InputError, match=rf"^params.yaml: train_weightnet.{key}: "):
        train_weightnet.parse_members(params, "digits", "baselines")


def test_predictors_that_a_data_set_skips_are_not_scored(project, monkeypatch):
    skipped = ["probe", "stats_gbm", "stats", "mlp", "nfn", "no_cross", "no_intra", "no_augmentation", "canonical"]
    apply_overrides(project / "params.yaml", [f"train_weightnet.skipped=[{','.join([*skipped, 'one_sided'])}]"])
    start(monkeypatch, fetch_data, dataset="digits")
    for variant in ARCHITECTURES:
        start(monkeypatch, build_zoo, dataset="digits", variant=variant)
    for variant in ("exam", "weightnet", "baselines"):
        start(monkeypatch, train_weightnet, dataset="digits", variant=variant)
    start(monkeypatch, evaluate_weightnet, dataset="digits")
    scores = (project / "reports/evaluate_weightnet/digits/scores.csv").read_text().splitlines()[1:]
    found = {line.split(",")[0] for line in scores}
    assert {"weightnet", "exam", "nearest", "hyperparameters", *REFERENCES} <= found
    assert not found & {*skipped, "one_sided"}


def select(zoo: Zoo, rows: Tensor) -> Zoo:
    index = {key: [column[i] for i in rows.tolist()] for key, column in zoo.index.items()}
    parts = {"shards": (zoo.flat(rows),), "tanh": zoo.tanh[rows], "run": zoo.run[rows]}
    return replace(zoo, **parts, snapshot=index["snapshot"], index=index)


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


def keep_untrained(project) -> None:
    """Write WeightNet as train_weightnet keeps it, untrained."""
    networks = zoo_networks("cnn3", 8)
    inputs = pooled_statistics(networks).float()
    model = Predictor(CONFIG | {"kind": "weightnet"}, networks, inputs.shape[1], seed=0)
    scale = {
        f"{what}_{k}": f(n)
        for what, n in (("input", inputs.shape[1]), ("target", len(PROPERTIES)))
        for k, f in (("mean", torch.zeros), ("std", torch.ones))
    }
    kept = {
        "config": CONFIG | {"kind": "weightnet"},
        "input_shape": [1, 8, 8],
        "classes": 10,
        "state_dicts": [model.state_dict()],
        "ranges": range_of_statistics(inputs),
        "names": [f"cnn3-{i}" for i in range(8)],
        "targets": torch.zeros(8, len(PROPERTIES)),
    }
    kept |= {"scale": scale, "errors": torch.rand(20, len(PROPERTIES)), "inputs": inputs.clamp(-6, 6)}
    save_torch(project / "models/train_weightnet/digits-weightnet/predictors.pt", {"weightnet": kept})


def ask(monkeypatch, capsys, *words: str) -> dict:
    monkeypatch.setattr("sys.argv", ["predict", *words, "--json"])
    predict.main()
    return json.loads(capsys.readouterr().out)


def test_a_user_s_network_and_its_relabelling_get_the_same_prediction(project, monkeypatch, capsys):
    keep_untrained(project)
    networks = zoo_networks("residual", 1)
    for name, some in (("a", networks), ("b", relabelled(networks))):
        save_file({k: v[0].float().contiguous() for k, v in some.weights.items()}, project / f"{name}.safetensors")
    first, second = ask(monkeypatch, capsys, ".", "--arch", "residual")["networks"].values()
    assert set(first["properties"]) == set(PROPERTIES)
    for name, found in first["properties"].items():
        least, most = predict.range_of(name)
        assert least <= found["low"] <= found["value"] <= found["high"] <= most
        assert found["low"] < found["high"]
        assert found["value"] == pytest.approx(second["properties"][name]["value"], rel=1e-4)
    assert 0 <= first["unlike"] <= 1


def test_a_folder_with_metadata_is_a_zoo_and_a_spec_is_the_network_that_it_describes(project, monkeypatch, capsys):
    keep_untrained(project)
    networks, folder = zoo_networks("cnn3", 4), project / "mine"
    folder.mkdir()
    known = {}
    for i in range(4):
        save_file({k: v[i].float().contiguous() for k, v in networks.weights.items()}, folder / f"{i}.safetensors")
        known[f"{i}.safetensors"] = {"arch": "cnn3", "activation": "tanh" if networks.tanh[i] else "relu"}
    (folder / "metadata.json").write_text(json.dumps(known))
    found = ask(monkeypatch, capsys, "mine")
    assert found["agreement"] == {}
    for i, result in enumerate(found["networks"].values()):
        known[f"{i}.safetensors"]["test_acc"] = result["properties"]["test_acc"]["value"] ** 2
    (folder / "metadata.json").write_text(json.dumps(known))
    assert ask(monkeypatch, capsys, "mine")["agreement"] == {"test_acc": {"tau": pytest.approx(1), "n": 4}}
    for broken in (
        "{",
        "[]",
        '{"0.safetensors": 3}',
        '{"0.safetensors": {"test_acc": NaN}}',
        '{"0.safetensors": {"test_acc": 91.2}}',
        '{"9.safetensors": {}}',
    ):
        (folder / "metadata.json").write_text(broken)
        with pytest.raises(InputError, match=r"^[^\n]*metadata.json[^\n]*$"):
            ask(monkeypatch, capsys, "mine")

    convolution = {"kind": "Conv2d", "out_channels": 16, "kernel_size": 3, "stride": 2, "padding": 1}
    layers = [layer for c in (1, 16, 16) for layer in (convolution | {"in_channels": c}, {"kind": "ReLU"})]
    layers += [{"kind": "AdaptiveAvgPool2d", "output_size": 1}, {"kind": "Flatten"}, {"kind": "Dropout"}]
    layers += [{"kind": "Linear", "in_features": 16, "out_features": 10}]
    (project / "spec.json").write_text(json.dumps({"layers": layers}))
    first = ask(monkeypatch, capsys, "mine/0.safetensors", "--arch", "cnn3")["networks"]
    assert ask(monkeypatch, capsys, "mine/0.safetensors", "--arch", "spec.json")["networks"] == first
    (project / "spec.json").write_text(json.dumps({"layers": [{"kind": "LSTM"}]}))
    with pytest.raises(InputError, match="no layer LSTM is known"):
        ask(monkeypatch, capsys, "mine/0.safetensors", "--arch", "spec.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors"], "say what it is by --arch"),
        (["a.safetensors", "--arch", "cnn4"], r"has no 6.weight \(16, 16, 3, 3\) of --arch cnn4"),
        (["a.safetensors", "--arch", "cnn9"], "no architecture is called cnn9: there are cnn3"),
        (["a.safetensors", "--arch", "timm:cnn9"], "timm:cnn9: Unknown model"),
        (["a.safetensors", "--arch", "sys:exit", "--allow-code"], "sys:exit: its code ended the process"),
        (["a.safetensors", "--arch", "os:getcwd"], "allow it by --allow-code"),
        (["none.safetensors", "--arch", "cnn3"], "none.safetensors is missing"),
        (["evil.pt", "--arch", "cnn3"], "evil.pt is a whole pickled model"),
        (["a.safetensors", "--arch", "cnn3", "--dataset", "other"], "run 'dvc repro train_weightnet@other-weightnet'"),
    ],
)
def test_mistakes_are_explained_and_pickles_are_not_run(project, monkeypatch, capsys, words, message):
    keep_untrained(project)
    networks = zoo_networks("cnn3", 1)
    save_file({k: v[0].float().contiguous() for k, v in networks.weights.items()}, project / "a.safetensors")
    torch.save({"state_dict": Dense()}, project / "evil.pt")
    with pytest.raises(InputError, match=message):
        ask(monkeypatch, capsys, *words)
