"""Relabelled networks are the same networks; a stack trains like each alone; what the zoo's index says is what was measured."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from benchmark_zoo import train_alone
from dvc.utils.hydra import apply_overrides
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.common.checkpoints import save_torch
from stages.common.command import InputError
from stages.datasets import fetch_data
from stages.weightnet import build_zoo, predict, predictors
from stages.weightnet.build_zoo import MEASURED, plan_stacks, train_and_measure
from stages.weightnet.convolution import convolve
from stages.weightnet.evaluate_weightnet import one_sided, score
from stages.weightnet.features import pooled_statistics
from stages.weightnet.networks import ARCHITECTURES, build_network, zoo_program
from stages.weightnet.predictors import Predictor
from stages.weightnet.program import Weights, run_stack, trace
from stages.weightnet.properties import PROPERTIES, calibration_error, fgsm, measure
from stages.weightnet.splits import split_zoos
from stages.weightnet.symmetry import Networks, derive_symmetry, permute, random_permutations, symmetry_error
from stages.weightnet.targets import from_scale, to_scale
from stages.weightnet.train_weightnet import augmented
from stages.weightnet.training import Recipe, draw_all, draw_run, train_stack, unflatten
from stages.weightnet.zoo import load_zoo, zoo_images

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
    return Networks(program, symmetry, random_weights(program.shapes, n), torch.arange(n) % 2 == 1)


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


NETWORKS = [*ARCHITECTURES, Dense, Depthwise]


def build(kind) -> nn.Module:
    return build_network(kind, *SHAPE) if isinstance(kind, str) else kind()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_stack_computes_what_each_network_computes(kind):
    model = build(kind)
    program = trace(model, (1, 8, 8))
    model = model.double().eval()
    weights = random_weights(program.shapes)
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
    networks = Networks(program, symmetry, random_weights(program.shapes), torch.zeros(3, dtype=torch.bool))
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
    networks = Networks(program, symmetry, random_weights(program.shapes), torch.full((3,), tanh))
    images = torch.randn(5, 1, 8, 8).double()
    moved = augmented(networks, 0.3, seeded())
    assert any(not torch.equal(moved.weights[k], networks.weights[k]) for k in networks.weights)
    torch.testing.assert_close(outputs(moved, images), outputs(networks, images), rtol=1e-9, atol=1e-9)
    if kind is Depthwise:
        assert symmetry.rigid >= {"stem", "wide"}  # SiLU
    if kind == "cnn3":
        assert not symmetry.rigid


def test_a_residual_stream_is_one_group_and_groups_of_a_norm_are_kept():
    _, symmetry = zoo_program("residual", *SHAPE)
    writers = {a.tensor for a in symmetry.axes if a.axis == 0 and a.parts[0].group == "stem"}
    assert {"stem.weight", "first.3.weight", "second.3.weight", "first.4.bias"} <= writers
    assert derive_symmetry(trace(Depthwise(), (1, 8, 8))).within == {"stem": 2}


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.flatten(1), 1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1) + 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unsupported(), "softmax, which is not supported"),
        (Branching(), "cannot be traced"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding_mode="reflect", padding=1)), "padded with reflect"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2)), "dilated"),
        (nn.Sequential(nn.BatchNorm2d(1, affine=False)), "norm without"),
        (Hidden(), "two results|cannot be followed"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(model, message):
    with pytest.raises(InputError, match=message):
        trace(model, (1, 8, 8))


@pytest.mark.parametrize(
    ("side", "taps", "stride", "padding"), [(8, 3, 2, 1), (4, 3, 2, 1), (2, 3, 2, 1), (9, 5, 1, 2), (6, 1, 1, 0)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_convolutions_and_their_gradients_are_torch_s(side, taps, stride, padding, shared):
    n, c, d = 2, 3, 4
    x = torch.randn(1 if shared else n, 5, side, side, c, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, d, c, taps, taps, dtype=torch.float64, requires_grad=True)
    y = convolve(x, weight, (stride, stride), (padding, padding))
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


@pytest.mark.parametrize("kind", ["cnn3", "flat", "residual"])
def test_a_stack_trains_as_torch_s_optimisers_train_each_alone(kind):
    images, labels = training_data()
    program, _ = zoo_program(kind, *SHAPE)
    runs = [replace(draw_run(f"{kind}-{i}", 0, RECIPE), dropout=0.0, tanh=False) for i in range(5)]
    assert {run.sgd for run in runs} == {False, True}
    assert len({run.steps for run in runs}) > 1
    stacked = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        model = train_alone(kind, SHAPE, run, program, images, labels)
        final = unflatten(stacked[i, 2:3], program)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(final[name][0], tensor, rtol=1e-9, atol=1e-11)


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
INVARIANT = ["weightnet", "probe", "hybrid", "nfn", "canonical"]


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
@pytest.mark.parametrize("kind", ["weightnet", "hybrid"])
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
    basis = predictors.cosines(3).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), atol=1e-6, rtol=1e-6)
    assert predictors.cosines(1).flatten().tolist() == pytest.approx([1, 0, 0])


def test_scales_of_properties_are_inverted():
    values = torch.rand(20, len(PROPERTIES)) * 0.9 + 0.05
    torch.testing.assert_close(from_scale(to_scale(values)), values)


def test_scores_of_perfect_reversed_and_constant_predictions():
    truth = torch.rand(50, generator=seeded()).numpy()
    assert score(truth, truth) == {"tau": pytest.approx(1), "rho": pytest.approx(1), "r2": pytest.approx(1)}
    assert score(truth, -truth)["tau"] == pytest.approx(-1)
    assert score(truth, 0 * truth)["tau"] == 0


def test_calibration_error_of_the_sure_and_right_is_zero_and_of_the_sure_and_wrong_one():
    labels = torch.arange(10)
    sure = 50 * torch.eye(10)[None]
    assert calibration_error(sure, labels).item() == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, labels.roll(1)).item() == pytest.approx(1, abs=1e-9)


def test_fgsm_moves_every_pixel_by_its_step_and_raises_the_loss():
    networks = zoo_networks("cnn3")
    images, labels = torch.randn(20, 1, 8, 8).double(), torch.arange(20) % 10
    attacked = fgsm(networks.program, networks.weights, images, labels, networks.tanh, 1e-3)
    torch.testing.assert_close((attacked - images).abs(), torch.full_like(attacked, 1e-3))
    before, after = outputs(networks, images), outputs(networks, attacked)
    for i in range(3):
        assert cross_entropy(after[i], labels) > cross_entropy(before[i], labels)


def start(monkeypatch, module, **items) -> None:
    words = [word for key, value in items.items() for word in (f"--{key}", value)]
    monkeypatch.setattr("sys.argv", ["stage", *words])
    module.main()


def grow(monkeypatch, project, runs: int) -> build_zoo.Params:
    """Build a zoo of so many runs in the working folder, in shards of 8, and return its parameters."""
    apply_overrides(project / "params.yaml", [f"build_zoo.variants.cnn3.runs={runs}", "build_zoo.shard_runs=8"])
    start(monkeypatch, build_zoo, dataset="digits", variant="cnn3")
    return build_zoo.Params.load("build_zoo", "digits", "cnn3")


def test_the_index_is_what_was_measured_and_growing_trains_the_rest_only(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    params = grow(monkeypatch, project, 16)
    small = load_zoo("digits", "cnn3")
    trained = []
    original = build_zoo.train_stack
    monkeypatch.setattr(build_zoo, "train_stack", lambda *args: (trained.append(len(args[1])), original(*args))[1])
    grow(monkeypatch, project, 24)
    zoo = load_zoo("digits", "cnn3")
    assert sum(trained) == 8
    assert len(zoo) == 24 * 3
    kept = [zoo.index["run"].index(name) for name in small.index["run"][::3]]
    assert torch.equal(zoo.flat[kept], small.flat[::3])
    grow(monkeypatch, project, 16)
    assert sum(trained) == 8
    assert len(load_zoo("digits", "cnn3")) == 16 * 3

    images = zoo_images("digits", params.images, torch.device("cpu"))
    rows = torch.tensor([5, 17, 40])
    networks = zoo.networks(rows)
    pixels = images.test[0]
    noise = torch.randn(pixels.shape, generator=build_zoo.generator(params.seed, "noise of test images"))
    measured = measure(
        zoo.program,
        networks.weights,
        networks.tanh,
        images.test,
        pixels + params.noise * noise,
        params.fgsm_images,
        params.fgsm_step,
    )
    for name, values in measured.items():
        assert values.numpy() == pytest.approx(zoo.column(name)[rows], rel=2e-6), name
    assert zoo.column("gap") == pytest.approx(zoo.column("train_acc") - zoo.column("test_acc"), abs=2e-6)

    runs = [draw_run(f"cnn3-{i}", params.seed, params.recipe) for i in range(16)]
    stack = plan_stacks(runs, params.shard_runs, params.variant.stack)[0][0]
    again = train_and_measure(stack, zoo.program, images, params)
    at = zoo.index["run"].index(stack[0].name)
    assert torch.equal(torch.from_numpy(again["weights"][0]), zoo.flat[at : at + 3])
    assert set(MEASURED) <= set(zoo.index)


def test_no_run_is_in_two_parts_of_a_split(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    grow(monkeypatch, project, 16)
    zoos = {name: load_zoo("digits", "cnn3") for name in ("cnn3", "other")}
    split = split_zoos(zoos, ["cnn3"], ["cnn3", "other"], (0.2, 0.2), ["middle", "final"], 1.0, 0)
    runs = [set(zoos["cnn3"].run[part["cnn3"]].tolist()) for part in (split.train, split.validation, split.test)]
    assert sum(map(len, runs)) == len(set.union(*runs)) == 16
    configs = [
        {zoos["cnn3"].index["config"][i] for i in part["cnn3"]} for part in (split.train, split.validation, split.test)
    ]
    assert not configs[0] & configs[2] and not configs[1] & configs[2] and not configs[0] & configs[1]
    assert len(split.train["cnn3"]) == 2 * len(runs[0])
    assert {zoos["cnn3"].snapshot[i] for i in split.test["cnn3"]} == {"final"}
    assert len(split.test["other"]) == 16
    less = split_zoos(zoos, ["cnn3"], ["cnn3"], (0.2, 0.2), ["final"], 0.5, 0)
    assert torch.equal(less.test["cnn3"], split.test["cnn3"])
    assert set(less.train["cnn3"].tolist()) < set(split.train["cnn3"].tolist())
    with pytest.raises(InputError, match=r"too few to split: raise build_zoo.variants.cnn3.runs"):
        split_zoos(zoos, ["cnn3"], ["cnn3"], (0.5, 0.5), ["final"], 1.0, 0)


def test_measurements_are_those_of_the_run_s_own_row(project, monkeypatch):
    """The index has one row for each snapshot of each run, in the order of the weights."""
    start(monkeypatch, fetch_data, dataset="digits")
    grow(monkeypatch, project, 16)
    with (project / "models/build_zoo/digits-cnn3/index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["snapshot"] for row in rows] == ["initial", "middle", "final"] * 16
    assert len({row["run"] for row in rows}) == len({row["config"] for row in rows}) == 16


def keep_untrained(project, kind="weightnet") -> None:
    """Write a predictor as train_weightnet keeps it, untrained."""
    networks = zoo_networks("cnn3", 8)
    inputs = pooled_statistics(networks).float()
    model = Predictor(CONFIG | {"kind": kind}, networks, inputs.shape[1], seed=0)
    scale = {
        f"{what}_{k}": f(n)
        for what, n in (("input", inputs.shape[1]), ("target", len(PROPERTIES)))
        for k, f in (("mean", torch.zeros), ("std", torch.ones))
    }
    kept = {
        "config": CONFIG | {"kind": kind},
        "input_shape": [1, 8, 8],
        "classes": 10,
        "state_dict": model.state_dict(),
    }
    kept |= {"scale": scale, "errors": torch.rand(20, len(PROPERTIES)).sort(0).values, "inputs": inputs.clamp(-6, 6)}
    save_torch(project / f"models/train_weightnet/digits-{kind}/predictors.pt", {kind: kept})


def ask(monkeypatch, capsys, *words: str) -> dict:
    monkeypatch.setattr("sys.argv", ["predict", *words, "--json"])
    predict.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["weightnet", "hybrid"])
def test_a_user_s_network_and_its_relabelling_get_the_same_prediction(project, monkeypatch, capsys, kind):
    keep_untrained(project, kind)
    networks = zoo_networks("residual", 1)
    for name, some in (("a", networks), ("b", relabelled(networks))):
        save_file({k: v[0].float().contiguous() for k, v in some.weights.items()}, project / f"{name}.safetensors")
    flags = ["--allow-probe"] if kind == "hybrid" else []
    first, second = ask(monkeypatch, capsys, ".", "--arch", "residual", *flags).values()
    assert set(first["properties"]) == set(PROPERTIES)
    for name, found in first["properties"].items():
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] == pytest.approx(second["properties"][name]["value"], rel=1e-4)
    assert 0 <= first["unlike"] <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors", "--arch", "cnn4"], "of cnn4 is .* the file has"),
        (["a.safetensors", "--arch", "alexnet"], "the zoo has cnn3"),
        (["a.safetensors", "--arch", "os:getcwd"], "allow it by --allow-code"),
        (["none.safetensors", "--arch", "cnn3"], "cannot be read as weights"),
        (["evil.pt", "--arch", "cnn3"], "cannot be read as weights"),
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
