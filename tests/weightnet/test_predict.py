"""Ordinary classifiers get predictions, and what is unusual about them is said."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_networks import ask, keep_untrained
from torch import nn
from weightnet.classifiers import CLASSIFIERS
from weightnet.modern import MODERN

from stages.common.randomness import generator
from stages.common.stage import InputError
from stages.weightnet import predict
from stages.weightnet.tracing.program import trace
from stages.weightnet.tracing.symmetry import derive_symmetry, permute, random_permutations
from stages.weightnet.zoo.architectures import build_network
from stages.weightnet.zoo.properties import PROPERTIES, range_of

FLAGS = ["--allow-code", "--input-shape", "3", "16", "16"]


@pytest.fixture
def arch(monkeypatch: pytest.MonkeyPatch):
    """What makes a function one that --arch can name."""

    class Module:
        pass

    def name(build) -> str:
        Module.build = staticmethod(build)
        monkeypatch.setitem(sys.modules, "my_classifiers", Module)
        return "my_classifiers:build"

    return name


def save(model: nn.Module, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_ordinary_classifier_gets_a_prediction(project, monkeypatch, capsys, arch, name):
    keep_untrained(project)
    torch.manual_seed(0)
    save(CLASSIFIERS[name](), project / "a.safetensors")
    (result,) = ask(monkeypatch, capsys, "a.safetensors", "--arch", arch(CLASSIFIERS[name]), *FLAGS)[
        "networks"
    ].values()
    assert set(result["properties"]) == set(PROPERTIES)
    for found in result["properties"].values():  # an end may be the end of what there is
        assert found["low"] <= found["value"] <= found["high"] and found["low"] < found["high"]


@pytest.mark.parametrize("name", MODERN)
def test_classifiers_with_attention_and_groups_get_the_same_prediction_in_any_order(
    project, monkeypatch, capsys, arch, name
):
    keep_untrained(project)
    torch.manual_seed(0)
    model = MODERN[name]()
    program = trace(model, (3, 16, 16))
    symmetry = derive_symmetry(program)
    state = model.state_dict()
    moved = permute(
        {key: state[key][None] for key in program.layout.shapes},
        symmetry,
        random_permutations(symmetry, generator(0, "it")),
    )
    save_file({key: value.contiguous() for key, value in state.items()}, project / "a.safetensors")
    save_file(state | {key: value[0].contiguous() for key, value in moved.items()}, project / "b.safetensors")
    words = ["a.safetensors", "b.safetensors", "--arch", arch(MODERN[name]), *FLAGS]
    first, second = ask(monkeypatch, capsys, *words)["networks"].values()
    for key, found in first["properties"].items():
        assert found["value"] == pytest.approx(second["properties"][key]["value"], rel=1e-4)


def test_a_file_with_other_places_in_a_table_than_the_network_has_is_refused(project, monkeypatch, capsys, arch):
    keep_untrained(project)
    build = MODERN["fused attention"]
    state = build().state_dict()
    save_file(state | {"index": state["index"].flip(0)}, project / "a.safetensors")
    with pytest.raises(InputError, match="index holds other places than --arch"):
        ask(monkeypatch, capsys, "a.safetensors", "--arch", arch(build), *FLAGS)


def test_activations_that_the_zoo_lacks_and_what_is_left_out_are_said(project, monkeypatch, capsys, arch):
    keep_untrained(project)
    save(CLASSIFIERS["normalised input"](), project / "a.safetensors")
    words = ["a.safetensors", "--arch", arch(CLASSIFIERS["normalised input"]), *FLAGS]
    expected = [
        "not used by forward, left out: auxiliary",
        "activation elu: not in the zoo",
        "activation gelu: not in the zoo",
    ]
    (result,) = ask(monkeypatch, capsys, *words)["networks"].values()
    assert [note for note in result["notes"] if not note.startswith("do not trust this")] == expected
    monkeypatch.setattr("sys.argv", ["predict", *words])
    predict.main()
    assert all(f"  {note}\n" in capsys.readouterr().out for note in expected[:1])


def test_a_network_with_tanh_is_read_as_the_zoo_s_networks_with_tanh(project, monkeypatch, capsys, arch):
    keep_untrained(project)

    def build(activation=nn.Tanh):
        layers = [nn.Conv2d(3, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
        return nn.Sequential(*layers)

    save(build(), project / "a.safetensors")
    found = {}
    for activation in (nn.Tanh, nn.ReLU):
        words = ["a.safetensors", "--arch", arch(lambda activation=activation: build(activation)), *FLAGS]
        found[activation] = ask(monkeypatch, capsys, *words)["networks"]["a.safetensors"]["properties"]
    assert found[nn.Tanh] != found[nn.ReLU]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"kind": "Flatten"}, {"kind": "Linear", "in_features": 768, "out_features": 10}], "has no hidden layer"),
        ([{"kind": "Flatten"}], "has no layers: its outputs depend on none"),
        (
            [{"kind": "Conv2d", "in_channels": 2, "out_channels": 2, "kernel_size": 3}],
            "is that their shape .--input-shape.[?]",
        ),
    ],
)
def test_networks_that_nothing_can_be_said_of_are_refused_in_one_line(project, monkeypatch, capsys, layers, message):
    keep_untrained(project)
    save(nn.Linear(768, 10), project / "a.safetensors")
    (project / "spec.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(InputError, match=message) as refusal:
        ask(monkeypatch, capsys, "a.safetensors", "--arch", "spec.json", *FLAGS)
    assert "\n" not in str(refusal.value)


class Shuffled(nn.Module):
    """Channels are mixed one by one, so that groups are of one neuron, and some layers of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Linear(4, 10)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x.view(-1, 2, 2, 14, 14).transpose(1, 2).reshape(-1, 4, 14, 14)))
        return self.head(x.mean((2, 3)))


def test_groups_of_single_neurons_are_read_too(project, monkeypatch, capsys, arch):
    keep_untrained(project)
    save(Shuffled(), project / "a.safetensors")
    assert ask(monkeypatch, capsys, "a.safetensors", "--arch", arch(Shuffled), *FLAGS)


def test_weights_whose_predictions_are_not_finite_are_refused(project, monkeypatch, capsys, arch):
    keep_untrained(project)
    model = CLASSIFIERS["LeNet, view"]()
    for parameter in model.parameters():
        parameter.data.mul_(1e30)
    save(model, project / "a.safetensors")
    with pytest.raises(InputError, match=r"a.safetensors: .*(no finite numbers|changes the outputs)"):
        ask(monkeypatch, capsys, "a.safetensors", "--arch", arch(CLASSIFIERS["LeNet, view"]), *FLAGS)


def test_a_value_outside_its_range_is_moved_into_it_and_its_interval_keeps_a_width():
    assert predict.inside((0, 1), 0.4, 0.5, 0.7) == {"low": 0.4, "value": 0.5, "high": 0.7}
    assert predict.inside((0, 1), 1.1, 1.25, 1.5) == {"low": pytest.approx(0.85), "value": 1, "high": 1}
    assert predict.inside((0, 1), -0.5, -0.25, 0.5) == {"low": 0, "value": 0, "high": 0.75}
    assert [range_of(name)[0] for name in ("gap", "calibration_error", "test_loss")] == [-1, 0, 0]


def test_a_network_unlike_the_zoo_is_not_to_be_trusted_and_the_answer_says_so(project, monkeypatch, capsys):
    keep_untrained(project)
    model = build_network("cnn3", 1, 10, 8)
    for scale, unlike in ((1.0, False), (1e3, True)):
        save_file({name: scale * value for name, value in model.state_dict().items()}, project / "a.safetensors")
        (result,) = ask(monkeypatch, capsys, "a.safetensors", "--arch", "cnn3")["networks"].values()
        assert any(note.startswith("do not trust this") for note in result["notes"]) == (result["unlike"] > 0.95)
        assert not unlike or result["unlike"] > 0.95
        if result["unlike"] > 0.95:  # errors on networks like the zoo's say nothing of this one's
            assert all(found["high"] - found["low"] >= 1 for found in result["properties"].values())


def test_files_of_a_folder_may_be_of_any_kind_and_lie_deeper(project, monkeypatch, capsys):
    keep_untrained(project)
    state, folder = build_network("cnn3", 1, 10, 8).state_dict(), project / "mine"
    (folder / "deep").mkdir(parents=True)
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "b.pt")
    torch.save({"state_dict": state}, folder / "deep/c.ckpt")
    torch.save(state, folder / ".hidden.pt")
    (folder / "notes.txt").write_text("no weights")
    known = {name: {"arch": "cnn3"} for name in ("a.safetensors", "b.pt", "deep/c.ckpt")}
    (folder / "metadata.json").write_text(json.dumps(known))
    answers = ask(monkeypatch, capsys, "mine")["networks"]
    assert list(answers) == [f"mine/{name}" for name in sorted(known)]
    assert len({json.dumps(answer) for answer in answers.values()}) == 1
    with pytest.raises(
        InputError, match=r"no predictor of a zoo of mnist is there \(there: digits\): add it to build_zoo"
    ):
        ask(monkeypatch, capsys, "mine", "--dataset", "mnist")


def test_a_saved_pretrained_folder_is_one_network(project, monkeypatch, capsys):
    keep_untrained(project)
    (project / "mine").mkdir()
    save_file(build_network("cnn3", 1, 10, 8).state_dict(), project / "mine/model.safetensors")
    assert list(ask(monkeypatch, capsys, "mine", "--arch", "cnn3")["networks"]) == ["mine"]
