"""A folder of one's own networks becomes a zoo that is learned from, evaluated and predicted by; every mistake in it is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reproduction import set_params
from running import start
from safetensors.torch import save_file
from small_networks import ask
from torch import nn

from stages.common.files import load_json, load_table
from stages.common.stage import InputError
from stages.weightnet import evaluate_weightnet, gather_zoo, train_weightnet
from stages.weightnet.gather_zoo import LEAST
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.kernel_ridge import fit_kernel_ridge
from stages.weightnet.predictors.splits import split_groups
from stages.weightnet.tracing.program import float_state, rescaled_input, run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry
from stages.weightnet.zoo.reading import load_zoo

CONVOLUTION = {"kind": "Conv2d", "in_channels": 1, "out_channels": 4, "kernel_size": 3}
SHAPES = {
    "small": [
        *(CONVOLUTION, {"kind": "ReLU"}, {"kind": "Flatten"}),
        {"kind": "Linear", "in_features": 64, "out_features": 10},
    ],
    "pooled": [
        *(CONVOLUTION, {"kind": "GELU"}, {"kind": "AdaptiveAvgPool2d", "output_size": 1}, {"kind": "Flatten"}),
        {"kind": "Linear", "in_features": 4, "out_features": 10},
    ],
}
SPEED = "speed"  # a property of one's own


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (dict(layer) for layer in SHAPES[name])
    return nn.Sequential(*(getattr(nn, layer.pop("kind"))(**layer) for layer in layers))


@pytest.fixture
def folder(project: Path) -> Path:
    """Forty networks of random weights, larger the better they are said to be, in three formats, two by two in groups."""
    set_params(
        project / "params.yaml",
        ["train_weightnet.overrides.own.tasks.splits=2", "train_weightnet.trees=4", "train_weightnet.exam.inputs=32"],
    )
    where = project / "mine"
    where.mkdir()
    for name, layers in SHAPES.items():
        (where / f"{name}.json").write_text(json.dumps({"layers": layers}))
    said = {}
    for i in range(40):
        name = list(SHAPES)[i % 2]
        state = {key: value * (0.2 + 0.1 * i) for key, value in build(name, i).state_dict().items()}
        file = f"{i:02d}" + (".safetensors", ".pt", ".pth")[i % 3]
        if i % 3:
            torch.save({"state_dict": state} if i % 3 == 2 else state, where / file)
        else:
            save_file(state, where / file)
        said[file] = {
            "arch": f"{name}.json",
            "group": i // 4 * 2 + i % 2,
            "test_acc": 0.1 + 0.02 * i,
            "hyperparameters": {"width": i},
        }
        said[file] |= {SPEED: 100.0 * math.sin(i)} if i % 5 else {}
    (where / "metadata.json").write_text(json.dumps(said))
    return where


def gather(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> None:
    words = ["gather_zoo", str(folder), "--name", "mine", "--input-shape", "1", "6", "6", *more]
    monkeypatch.setattr("sys.argv", words)
    gather_zoo.main()


def change(folder: Path, file: str, **values: object) -> None:
    said = json.loads((folder / "metadata.json").read_text())
    said[file] = said.get(file, {}) | values
    (folder / "metadata.json").write_text(json.dumps(said))


def test_a_folder_of_networks_is_learned_from_evaluated_and_predicted_by(folder, monkeypatch, capsys):
    gather(monkeypatch, folder)
    zoos = {name: load_zoo("mine", name) for name in SHAPES}
    assert [len(zoo) for zoo in zoos.values()] == [20, 20] and zoos["small"].measured == ("test_acc", SPEED)
    state = torch.load(folder / "02.pth", weights_only=True)["state_dict"]
    place = zoos["small"].index["file"].index("02.pth")
    weights = zoos["small"].networks(torch.tensor([place])).weights
    images = torch.randn(3, 1, 6, 6)
    model = build("small", 0)
    model.load_state_dict(state)
    torch.testing.assert_close(run_stack(zoos["small"].program, weights, images)[0], model(images))

    start(monkeypatch, train_weightnet, dataset="mine", variant="exam")
    start(monkeypatch, evaluate_weightnet, dataset="mine")
    table = load_table(Path("models/train_weightnet/mine-exam/predictions.parquet"))
    assert {"exam", "exam_trees", "exam_hyperparameters"} <= set(table["predictor"]) and f"{SPEED}_low" in table
    summary = load_json(Path("reports/evaluate_weightnet/mine/summary.json"))
    scores = summary["scores"]["all"]
    assert set(scores) == {"test_acc", SPEED} and len(summary["held_out"]) == 3
    assert scores["test_acc"]["exam"]["tau"]["mean"] > 0.5  # the larger the weights, the surer the answers
    capsys.readouterr()
    answer = ask(monkeypatch, capsys, str(folder), "--dataset", "mine", "--allow-probe")
    assert len(answer["networks"]) == 40 and answer["learned_from"] < 40
    for found in answer["networks"].values():
        assert set(found["properties"]) == {"test_acc", SPEED}
    assert answer["agreement"]["test_acc"]["tau"] > 0.7


def test_groups_are_never_on_both_sides_of_a_split(folder, monkeypatch):
    gather(monkeypatch, folder)
    zoos = {name: load_zoo("mine", name) for name in SHAPES}
    for seed in range(3):
        split = split_groups(zoos, list(zoos), list(zoos), (0.15, 0.2), seed)
        parts = [
            {int(zoos[name].run[row]) for name, rows in part.items() for row in rows}
            for part in (split.train, split.validation, split.test)
        ]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    held_out = split_groups(zoos, ["small"], ["pooled"], (0.15, 0.2), 0)
    assert len(held_out.test["pooled"]) == 20 and {*held_out.train, *held_out.validation} == {"small"}
    both = zoos | {"pooled": replace(zoos["pooled"], run=zoos["small"].run)}  # every group has both architectures
    with pytest.raises(InputError, match="too few to split"):
        split_groups(both, ["small"], ["pooled"], (0.15, 0.2), 0)


MISTAKES = [  # what is said of a file, and what is said of that
    ({"test_acc": 1.2}, "test_acc is 1.2: expected a finite number from 0 to 1"),
    ({"test_acc": math.nan}, "test_acc is nan: expected a finite number"),
    ({"test_acc": "high"}, "test_acc is 'high': expected a number"),
    ({SPEED: True}, "speed is True: expected a number"),
    ({"my speed": 1.0}, "my speed is no name for a number"),
    ({"run": 1.0}, "run is no name for a number"),
    ({"arch": 3}, "arch is 3, which is of another kind"),
    ({"activation": "gelu"}, "expected relu or tanh"),
    ({"hyperparameters": {"width": math.inf}}, "hyperparameters.width is inf"),
    ({"arch": "pooled.json"}, "00.safetensors"),  # another network's shapes
    ({"arch": "no_such_thing"}, "no architecture is called no_such_thing"),
]


def test_what_is_wrong_with_an_entry_is_named(folder, monkeypatch):
    text = (folder / "metadata.json").read_text()
    for values, said in MISTAKES:
        (folder / "metadata.json").write_text(text)
        change(folder, "00.safetensors", **values)
        with pytest.raises(InputError, match=said) as caught:
            gather(monkeypatch, folder)
        assert "\n" not in str(caught.value)


def test_files_that_are_missing_unnamed_or_there_twice_are_named(folder, monkeypatch):
    save_file(build("small", 7).state_dict(), folder / "stray.safetensors")
    with pytest.raises(InputError, match=r"does not name stray.safetensors"):
        gather(monkeypatch, folder)
    (folder / "stray.safetensors").rename(folder / "40.safetensors")
    change(folder, "40.safetensors", arch="small.json", test_acc=0.5)
    (folder / "40.safetensors").write_bytes((folder / "00.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"00.safetensors and 40.safetensors are the same network"):
        gather(monkeypatch, folder)
    (folder / "40.safetensors").unlink()
    with pytest.raises(InputError, match=r"names 40.safetensors, which is not there"):
        gather(monkeypatch, folder)
    text = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text('{"00.safetensors": {}, ' + text[1:])
    with pytest.raises(InputError, match=r"names 00.safetensors twice"):
        gather(monkeypatch, folder)


def test_too_few_networks_are_no_zoo(folder, monkeypatch):
    said = json.loads((folder / "metadata.json").read_text())
    for values in list(said.values())[LEAST - 1 :]:
        values.pop("test_acc")
    (folder / "metadata.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=f"test_acc is known of {LEAST - 1} networks: {LEAST} are needed"):
        gather(monkeypatch, folder)
    (folder / "metadata.json").write_text(json.dumps(dict(list(said.items())[:5])))
    with pytest.raises(InputError, match="names 5 networks"):
        gather(monkeypatch, folder)


def test_what_is_not_known_of_some_networks_changes_nothing_for_other_properties():
    """Kernel ridge of a property is that of the networks of which it is known, and so is an interval."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 6).double(), torch.randn(30, 2).double()
    missing = y.clone()
    missing[::3, 1] = torch.nan
    whole, part = fit_kernel_ridge(x, y), fit_kernel_ridge(x, missing)
    new = torch.randn(5, 6).double()
    torch.testing.assert_close(part.predict(new)[:, 0], whole.predict(new)[:, 0])
    torch.testing.assert_close(part.deviation(new)[:, 0], whole.deviation(new)[:, 0])
    assert part.alpha[::3, 1].eq(0).all() and part.predict(new)[:, 1].isfinite().all()
    errors = missing.abs()
    known = errors[~errors[:, 1].isnan(), 1:]
    torch.testing.assert_close(conformal_quantile(errors)[1:], conformal_quantile(known))


def test_images_in_other_units_are_the_network_s_own_after_rescaling():
    model = build("small", 0).double()
    program = trace(model, (1, 6, 6))
    moved = rescaled_input(program, 0.3, 0.4)
    weights = {key: float_state(model)[key][None] for key in program.layout.shapes}
    z = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(run_stack(moved, weights, z)[0], model(z * 0.4 + 0.3))
    assert derive_symmetry(moved).sizes == derive_symmetry(program).sizes
    assert rescaled_input(program, 0.0, 1.0) is program
    with pytest.raises(InputError, match="deviation positive"):
        rescaled_input(program, 0.0, 0.0)
