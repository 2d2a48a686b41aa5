"""Networks, folders and mistakes of users."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_networks import Dense, ask, keep_untrained, relabelled, zoo_networks

from stages.common.stage import InputError
from stages.weightnet.zoo.properties import PROPERTIES, range_of


def test_a_user_s_network_and_its_relabelling_get_the_same_prediction(project, monkeypatch, capsys):
    keep_untrained(project)
    networks = zoo_networks("residual", 1)
    for name, some in (("a", networks), ("b", relabelled(networks))):
        save_file({k: v[0].float().contiguous() for k, v in some.weights.items()}, project / f"{name}.safetensors")
    first, second = ask(monkeypatch, capsys, ".", "--arch", "residual")["networks"].values()
    assert set(first["properties"]) == set(PROPERTIES)
    for name, found in first["properties"].items():
        least, most = range_of(name)
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
