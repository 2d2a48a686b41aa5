import argparse
import codecs
import collections
import enum
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fuzz
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.common import checkpoints, containers
from stages.common.checkpoints import fit_names, load_torch, load_weights, save_torch
from stages.common.stage import InputError
from stages.forecast import forecast_snapshots
from stages.recall import audit
from stages.weightnet import predict


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(network().state_dict())


SHAPES = {name: tuple(tensor.shape) for name, tensor in weights().items()}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in weights().items())


class Settings(dict):
    """What people save beside weights: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


class AttributeDict(Settings):
    """Called as Lightning's."""


class Colour(enum.Enum):
    RED = 1


class Armed:
    """Would leave a file behind if its code ran."""

    def __reduce__(self):
        return _fire, ()


def _fire() -> str:
    Path("fired").touch()
    return "fired"


class Harmful:
    def __reduce__(self):
        return os.system, ("touch fired",)


class Growing:
    """Would double its bytes as often as it likes."""

    def __reduce__(self):
        return codecs.encode, (b"12345678", "hex")


class Long:
    def __reduce__(self):
        return bytearray, (10**11,)


def everything_beside() -> dict:
    """A checkpoint as training scripts write it."""
    model = network()
    model.load_state_dict(weights())
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)} for i in range(4)}
    return {
        "state_dict": model.state_dict(),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "hyper_parameters": AttributeDict(lr=0.1),
        "history": collections.defaultdict(list, loss=[0.1]),
        "best": np.float64(0.9),
        "epoch": np.int64(3),
        "random": np.random.RandomState(0).get_state(),
        "names": np.array(["a", None], dtype=object),
        "colour": Colour.RED,
        "armed": Armed(),
        "path": Path("a/b"),
        "kind": torch.float16,
        "device": torch.device("cuda:0"),
        "when": SimpleNamespace(day=1),
    }


UNDER = "the weights are those under '{}'".format
OFF = "the prefix '{}' is taken off the names".format
SAME = {
    "plain.pt": (weights, []),
    "plain.pth": (weights, []),
    "plain.th": (weights, []),
    "pytorch_model.bin": (weights, []),
    "plain.pth.tar": (lambda: {"state_dict": weights(), "epoch": 3}, [UNDER("state_dict")]),
    "lightning.ckpt": (
        lambda: {"pytorch-lightning_version": "2.4.0", "state_dict": prefixed("model."), "callbacks": {}},
        [UNDER("state_dict"), OFF("model.")],
    ),
    "parameters.pt": (lambda: {name: nn.Parameter(tensor) for name, tensor in weights().items()}, []),
    "arrays.pt": (lambda: {name: tensor.numpy() for name, tensor in weights().items()}, []),
    "arrays_in_columns.pt": (
        lambda: {name: np.asfortranarray(tensor.numpy()) for name, tensor in weights().items()},
        [],
    ),
    "big_endian.pt": (lambda: {name: tensor.numpy().astype(">f4") for name, tensor in weights().items()}, []),
    "everything.pt": (everything_beside, [UNDER("state_dict")]),
    "mixed.pt": (lambda: weights() | {"epoch": 3, "name": "a"}, ["what is no tensor is left out"]),
    "counted.pt": (lambda: prefixed("module.") | {"n_averaged": torch.tensor(3)}, [OFF("module.")]),
    "several_values.pt": (lambda: {"classifier": weights(), "epoch": 3}, [UNDER("classifier")]),
    "deeper.pt": (lambda: {"model": {"state_dict": weights(), "epoch": 1}}, [UNDER("model")]),
    "compiled_parallel.pt": (lambda: {"net": prefixed("_orig_mod.module.")}, [UNDER("net"), OFF("_orig_mod.module.")]),
    "strided.pt": (lambda: {name: tensor.t().contiguous().t() for name, tensor in weights().items()}, []),
}
SAME |= {
    f"{key}.pt": (lambda key=key: {"epoch": 3, key: weights(), "loss": torch.tensor(0.1)}, [UNDER(key)])
    for key in ("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights")
}
SAME |= {
    f"{prefix}pt": (lambda prefix=prefix: prefixed(prefix), [OFF(prefix)])
    for prefix in ("module.", "model.", "net.", "_orig_mod.", "backbone.", "encoder.")
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_are_read_however_they_are_wrapped_and_no_code_runs(tmp_path, monkeypatch, name, legacy):
    monkeypatch.chdir(tmp_path)
    make, notes = SAME[name]
    torch.save(make(), name, _use_new_zipfile_serialization=not legacy)
    known = set(torch.serialization.get_safe_globals())
    found, said = load_weights(name, SHAPES)
    assert set(torch.serialization.get_safe_globals()) == known
    assert said == notes
    assert list(found) == list(SHAPES)
    assert all(torch.equal(found[key], tensor) and not found[key].requires_grad for key, tensor in weights().items())
    assert not Path("fired").exists()


def test_a_module_beside_the_weights_is_let_lie(tmp_path):
    torch.save({"state_dict": weights(), "hyper_parameters": {"loss": nn.CrossEntropyLoss()}}, tmp_path / "a.pt")
    found, _ = load_weights(tmp_path / "a.pt", SHAPES)
    assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a"])
def test_the_content_decides_not_the_name(tmp_path, name):
    for save in (lambda: torch.save(weights(), tmp_path / name), lambda: save_file(weights(), tmp_path / name)):
        save()
        found, _ = load_weights(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


def test_without_a_network_to_fit_all_tensors_come_under_their_own_names(tmp_path):
    state = prefixed("module.") | {"bn.num_batches_tracked": torch.tensor(3), "mask": torch.tensor([0.0, -torch.inf])}
    torch.save(state, tmp_path / "a.pt")
    found, notes = load_weights(str(tmp_path / "a.pt"))
    assert notes == [] and found.keys() == state.keys()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_floating_point_is_kept_or_converted(tmp_path, kind, name):
    state = {key: tensor.to(kind) for key, tensor in weights().items()}
    (save_file if name.endswith("s") else torch.save)(state, tmp_path / name)
    kept, converted = (
        load_weights(tmp_path / name, SHAPES)[0],
        load_weights(tmp_path / name, SHAPES, dtype=torch.float32)[0],
    )
    assert all(torch.equal(kept[key], tensor) and kept[key].dtype == kind for key, tensor in state.items())
    assert all(torch.equal(converted[key], tensor.float()) for key, tensor in state.items())


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (
            lambda: {"state_dict": zeros(), "state_dict_ema": weights()},
            "the weights are the moving average under 'state_dict_ema', as timm takes them; for those under 'state_dict' save them alone",
        ),
        (
            lambda: {"model": zeros(), "model_ema": weights()},
            "the weights are the moving average under 'model_ema', as timm takes them; for those under 'model' save them alone",
        ),
        (lambda: {"ema": weights(), "epoch": 3}, "the weights are the moving average under 'ema'"),
        (lambda: {"model": weights(), "ema": None}, UNDER("model")),
        (lambda: {"model": weights(), "ema": network()}, UNDER("model")),
        (
            lambda: {"model": weights(), "ema": zeros()},
            "the weights are those under 'model': the average under 'ema' is all zeros",
        ),
        (
            lambda: {"model": weights(), "ema": {"0.weight": torch.ones(3, 4)}},
            "the weights are those under 'model': the average under 'ema' lacks 0.bias, 2.weight, 2.bias",
        ),
    ],
)
def test_of_weights_and_their_moving_average_it_is_said_which_is_taken(tmp_path, value, note):
    torch.save(value(), tmp_path / "a.pt")
    found, notes = load_weights(tmp_path / "a.pt", SHAPES)
    assert notes == [note]
    assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


def shards(folder: Path, save=save_file, ending="safetensors", index="model.safetensors.index.json") -> None:
    """Write a network as save_pretrained does if it is large."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"model-0000{1 + i // 2}-of-00002.{ending}" for i, name in enumerate(weights())}
    for file in set(places.values()):
        save({name: weights()[name] for name, place in places.items() if place == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 92}, "weight_map": places}))


def test_folders_of_save_pretrained_and_shards_are_read(tmp_path):
    shards(tmp_path / "sharded")
    shards(tmp_path / "old", torch.save, "bin", "pytorch_model.bin.index.json")
    for name, file in (("one", "model.safetensors"), ("lone", "epoch3.safetensors"), ("both", "model.safetensors")):
        (tmp_path / name).mkdir()
        save_file(weights(), tmp_path / name / file)
    save_file(zeros(), tmp_path / "both/other.safetensors")
    (tmp_path / "one/config.json").write_text("{}")
    for source in ("sharded", "sharded/model.safetensors.index.json", "old", "one", "lone", "both"):
        found, _ = load_weights(tmp_path / source, SHAPES)
        assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


def test_broken_shards_and_folders_are_refused(tmp_path):
    def refused(source: str, message: str) -> None:
        with pytest.raises(InputError) as error:
            load_weights(tmp_path / source, SHAPES)
        assert str(error.value).replace(f"{tmp_path}/", "") == message

    shards(tmp_path / "a")
    index, first = "a/model.safetensors.index.json", tmp_path / "a/model-00001-of-00002.safetensors"
    save_file({"0.weight": torch.ones(3, 4)}, first)
    refused(
        "a",
        "a/model-00001-of-00002.safetensors has no 0.bias, which model.safetensors.index.json says it has: download both again",
    )
    first.unlink()
    refused("a", f"{index} names the shard model-00001-of-00002.safetensors, which is missing: download it too")
    (tmp_path / index).write_text('{"weight_map": {"0.weight": "../b.safetensors"}}')
    refused(index, f"{index} names the shard ../b.safetensors: expected files of its own folder")
    for text in (
        "{",
        '{"a": 1}',
        '{"weight_map": 3}',
        '{"a":' * 10**5,
        '{"weight_map": {"a": [1]}}',
        '{"weight_map": {"a": 1, "b": "c"}}',
    ):
        (tmp_path / index).write_text(text)
        refused(index, f"{index} is no index of shards: expected a weight_map of names and files")
    (tmp_path / "empty").mkdir()
    refused("empty", f"empty is a folder without weights: expected one of {', '.join(checkpoints.PRETRAINED)}")
    (tmp_path / "many").mkdir()
    for i in (1, 2):
        save_file(weights(), tmp_path / f"many/{i}.safetensors")
    refused("many", "many holds several files of weights (1.safetensors, 2.safetensors): name one of them")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the hub."""

    def download(repository, file, revision=None):
        if repository in FAILURES:
            raise FAILURES[repository]
        path = tmp_path / "hub" / repository / (revision or "main") / file
        if not path.is_file():
            raise errors.EntryNotFoundError(f"404 Client Error\n\x1b[1m{file}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub"


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)
FAILURES = {
    "none/such": errors.RepositoryNotFoundError("404\nRequest ID: 1", response=RESPONSE),
    "closed/model": errors.GatedRepoError("403\nRequest ID: 1", response=RESPONSE),
    "off/line": errors.LocalEntryNotFoundError("Cannot find\nan appropriate"),
    "down/now": ConnectionError("<object at 0x7f0000000000>"),
}


@pytest.mark.parametrize(
    "source",
    [
        *(
            "hf://owner/one/model.safetensors",
            "hf:/owner/one/model.safetensors",
            "hf-hub:owner/one",
            "hf_hub:owner/one",
        ),
        *("hf://owner/one@v2/sub/a.pt", "hf-hub:owner/one@v2", "hf-hub:owner/sharded"),
        *("hf://owner/sharded/model.safetensors.index.json", "hf-hub:owner/old"),
    ],
)
def test_the_hub_is_read(hub, source):
    for name in ("owner/one/main", "owner/one/v2/sub", "owner/old/main"):
        (hub / name).mkdir(parents=True)
    save_file(weights(), hub / "owner/one/main/model.safetensors")
    save_file(weights(), hub / "owner/one/v2/model.safetensors")
    torch.save(weights(), hub / "owner/one/v2/sub/a.pt")
    torch.save(weights(), hub / "owner/old/main/pytorch_model.bin")
    shards(hub / "owner/sharded/main")
    for given in (source, Path(source)):
        found, _ = load_weights(given, SHAPES)
        assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://owner/one/x.pt", "hf://owner/one/x.pt is not there: check the name"),
        (
            "hf-hub:owner/one",
            "hf-hub:owner/one has none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
            "pytorch_model.bin.index.json, open_clip_model.safetensors: name the file, hf://owner/one/<file>",
        ),
        ("hf://owner", "hf://owner: expected hf://owner/name/file or hf-hub:owner/name"),
        (
            "hf-hub:none/such",
            "hf://none/such/model.safetensors cannot be had (there is no such repository, or it is private: check the name, and log in "
            "by 'hf auth login')",
        ),
        (
            "hf://closed/model/a.pt",
            "hf://closed/model/a.pt cannot be had (its owner grants access: ask for it there, and log in by 'hf auth login')",
        ),
        (
            "hf-hub:off/line",
            "hf://off/line/model.safetensors cannot be had (no connection, and it was not downloaded before: connect, or set HF_HOME)",
        ),
        ("hf://down/now/a.pt", "hf://down/now/a.pt cannot be had (ConnectionError: connect, or set HF_HOME)"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_has_not_is_said(source, message):
    with pytest.raises(InputError) as error:
        load_weights(source, SHAPES)
    assert str(error.value) == message


def changed(name: str, change) -> dict[str, Tensor]:
    return {key: change(tensor) if key == name else tensor for key, tensor in weights().items()}


def with_value(value: float) -> dict[str, Tensor]:
    return changed("2.bias", lambda _: torch.tensor([0.5, value]))


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(network()), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/a.pt", b"1")
        archive.writestr("run/b.pt", b"1")


SAVE = "save model.state_dict() with torch.save"
OWN = "name the network that the file is of, or save the network's own tensors under its own names"
QUANTISED = "save the state_dict of the network before it is quantised"
AGAIN = "download or save it again"
REFUSED = {
    "whole.pt": (
        network,
        f"is a whole pickled model (torch.nn.modules.container.Sequential), which only its own code can open: {SAVE}",
    ),
    "whole_in_dict.pt": (
        lambda: {"epoch": 1, "model": network()},
        f"is a whole pickled model (torch.nn.modules.container.Sequential), which only its own code can open: {SAVE}",
    ),
    "harm.pt": (
        lambda: {"state_dict": weights(), "x": Harmful()},
        "would call posix.system when opened, which no weights need: not read; trust it not",
    ),
    **{
        f"{kind.__name__}.pt": (
            lambda kind=kind: {"state_dict": weights(), "x": kind()},
            "holds bytes that may unfold beyond all measure: not read; save the weights by themselves, "
            "torch.save(checkpoint['state_dict'], ...)",
        )
        for kind in (Growing, Long)
    },
    "objects.pt": (
        lambda: {"state_dict": weights(), "x": Settings(a=1)},
        "holds objects of test_checkpoints.Settings, which are not opened: save the weights by themselves, "
        "torch.save(checkpoint['state_dict'], ...)",
    ),
    "list.pt": (lambda: list(weights().values()), f"holds a list without names: {SAVE}, which names every tensor"),
    "tensor.pt": (lambda: torch.ones(2), f"holds a tensor without names: {SAVE}, which names every tensor"),
    "array.pt": (lambda: np.ones(2), f"holds a tensor without names: {SAVE}, which names every tensor"),
    "empty.pt": (dict, f"holds an empty dictionary: {SAVE}"),
    "numbered.pt": (
        lambda: {0: torch.ones(2)},
        f"is no state_dict: expected names and tensors, got 0 (Tensor): {SAVE}",
    ),
    "values.pt": (
        lambda: {"epoch": 1, "loss": torch.ones(())},
        f"is no state_dict: expected names and tensors, got epoch (int), loss (Tensor): {SAVE}",
    ),
    "optimizer.pt": (
        lambda: {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        f"is an optimiser's state, not weights: {SAVE}",
    ),
    "several.pt": (
        lambda: {"generator": weights(), "discriminator": weights()},
        "holds several networks (generator, discriminator): save one of them by itself",
    ),
    "twins.pt": (
        lambda: prefixed("student.") | prefixed("teacher."),
        "holds several such networks, student., teacher.: save one of them by itself",
    ),
    "complex.pt": (
        lambda: changed("2.bias", lambda x: x + 1j),
        ": 2.bias is complex (complex64): save torch.view_as_real(tensor), or its two parts by themselves",
    ),
    "quantised.pt": (
        lambda: changed("0.weight", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        f": 0.weight is quantised (qint8): {QUANTISED}",
    ),
    "packed.pt": (
        lambda: {"0.scale": torch.tensor(1.0), "0._packed_params._packed_params": (torch.ones(2), None)},
        f"is quantised: {QUANTISED}",
    ),
    "sparse_average.pt": (
        lambda: {"model": weights(), "ema": {name: tensor.to_sparse() for name, tensor in weights().items()}},
        ": 0.weight is not dense (sparse_coo): save tensor.to_dense()",
    ),
    "sparse.pt": (
        lambda: changed("0.weight", Tensor.to_sparse),
        ": 0.weight is not dense (sparse_coo): save tensor.to_dense()",
    ),
    "meta.pt": (
        lambda: changed("0.weight", lambda x: x.to("meta")),
        ": 0.weight has no values (device meta): load the weights into the network before you save it",
    ),
    "float8.pt": (
        lambda: changed("0.weight", lambda x: x.to(torch.float8_e4m3fn)),
        ": 0.weight has values of float8_e4m3fn: save tensor.float(), with its scale applied",
    ),
    "integers.pt": (
        lambda: changed("0.weight", Tensor.char),
        ": 0.weight holds integers (int8): save it in floating point, with its scale applied",
    ),
    "nan.pt": (
        lambda: with_value(torch.nan),
        ": 2.bias has values that are not finite (NaN or infinite: 1 of 2): take a snapshot from before the training diverged",
    ),
    "inf.pt": (
        lambda: with_value(torch.inf),
        ": 2.bias has values that are not finite (NaN or infinite: 1 of 2): take a snapshot from before the training diverged",
    ),
    "too_large.pt": (
        lambda: changed("2.bias", lambda _: torch.tensor([1e300, 0], dtype=torch.float64)),
        ": 2.bias has values too large for float32: take a network of ordinary weights",
    ),
    "more.pt": (
        lambda: weights() | {f"{i}.weight": torch.ones(2) for i in range(4, 10)},
        f"has 6 tensors more than the network: 4.weight, 5.weight, 6.weight, 7.weight and 2 more: {OWN}",
    ),
    "fewer.pt": (
        lambda: {"0.weight": weights()["0.weight"], "head.weight": weights()["2.weight"]},
        f"has no 0.bias (3,) of the network, 3 of 4 tensors are missing; nearest in the file: head.weight (2, 3): {OWN}",
    ),
    "other_shape.pt": (
        lambda: changed("2.weight", lambda x: x.T),
        ": 2.weight: expected (2, 3), got (3, 2): name the network that the file is of",
    ),
    "collision.pt": (
        lambda: prefixed("module.") | {"0.weight": torch.ones(3, 4)},
        "has tensors of the same names with 'module.' and without: save one of them by itself",
    ),
    "pruned.pt": (
        lambda: (
            {("0.weight_orig" if k == "0.weight" else k): v for k, v in weights().items()}
            | {"0.weight_mask": torch.ones(3, 4)}
        ),
        "has no 0.weight (3, 4) of the network, 1 of 4 tensors are missing; nearest in the file: 0.weight_orig (3, 4), "
        "0.weight_mask (3, 4): call torch.nn.utils.prune.remove(module, 'weight') before you save",
    ),
    "parametrised.pt": (
        lambda: weights() | {"0.parametrizations.weight.original0": torch.ones(1)},
        "has 1 tensors more than the network: 0.parametrizations.weight.original0: call "
        "torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) before you save",
    ),
    "adapter.pt": (
        lambda: weights() | {"0.lora_A": torch.ones(1)},
        "has 1 tensors more than the network: 0.lora_A: merge the adapters into the weights (merge_and_unload) before you save",
    ),
    "escape.pt": (
        lambda: weights() | {"\x1b[1mevil\n.weight": torch.ones(1)},
        f"has 1 tensors more than the network: \\x1b[1mevil\\n.weight: {OWN}",
    ),
    "expanded.pt": (
        lambda: {"weight": torch.zeros(1).expand(2**20, 2**10)},
        "would unfold from {size} bytes to 4294967296: not read; save tensors that are not expanded",
    ),
}


def exported(path: Path) -> None:
    """The parts of a file of torch.export.save that tell what it is."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data/weights/weight_0", "models/model.json", "archive_format"):
            archive.writestr(f"a/{name}", "{}")


WRITTEN = {
    "script.pt": (
        scripted,
        "is TorchScript, which holds code: save torch.jit.load('script.pt').state_dict() with torch.save",
    ),
    "a.pkl": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        "is a plain pickle, which may run code: where you trust it, write it anew by "
        "torch.save(pickle.load(open('a.pkl', 'rb')), 'weights.pt')",
    ),
    "a.npz": (
        lambda path: np.savez(path, a=np.ones(2)),
        "is numpy's .npz: write it anew by torch.save({name: torch.from_numpy(array) for name, array in "
        "numpy.load('a.npz').items()}, 'weights.pt')",
    ),
    "a.npy": (
        lambda path: np.save(path, np.ones(2)),
        "is an array of numpy without a name: save named arrays as .safetensors",
    ),
    "zero.pt": (lambda path: path.write_bytes(b""), f"is empty (0 bytes): {AGAIN}"),
    "zeros.pt": (lambda path: path.write_bytes(bytes(1000)), f"holds zeros, as a download that broke off: {AGAIN}"),
    "lfs.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"),
        "is a pointer of Git LFS, not the weights: run 'git lfs pull' in its clone",
    ),
    "page.pt": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>404"),
        "is a web page, not weights: download the file itself (on Hugging Face by /resolve/ in place of /blob/)",
    ),
    "text.pt": (
        lambda path: path.write_text("loss 0.1\n"),
        f"is text, not weights: expected a file of torch.save or .safetensors; {AGAIN}",
    ),
    "noise.pt": (
        lambda path: path.write_bytes(bytes(range(200, 240))),
        f"is no file of torch.save or .safetensors, or its start is damaged: {AGAIN}",
    ),
    "a.gz": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"), "is compressed (gzip): unpack it first"),
    "a.onnx": (
        lambda path: path.write_bytes(b"\x08\x09\x12\x07pytorch\x1a\x052.0.0:\xf0\xff"),
        "is ONNX, without names of a network's tensors: take the file of weights that it was exported from",
    ),
    "a.pt2": (
        exported,
        "is a program of torch.export: save torch.export.load('a.pt2').state_dict with torch.save",
    ),
    "folder.zip": (zipped, "is a zip archive of run/a.pt, run/b.pt: unpack it first"),
    "archive.tar": (
        lambda path: shutil.make_archive(str(path.with_suffix("")), "tar", path.parent / "nothing"),
        "is a tar archive: unpack it first",
    ),
}


@pytest.mark.parametrize("name", REFUSED | WRITTEN)
def test_what_is_no_weights_is_refused_with_cause_and_remedy(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    make, message = (REFUSED | WRITTEN)[name]
    if name in WRITTEN:
        make(Path(name))
    else:
        torch.save(make(), name)
    size = Path(name).stat().st_size
    expected = f"{name}{'' if message.startswith(':') else ' '}{message.replace('{size}', str(size))}"
    with pytest.raises(InputError) as error:
        load_weights(name, SHAPES, dtype=torch.float32)
    assert str(error.value) == expected
    assert not Path("fired").exists()


@pytest.mark.parametrize(
    ("name", "end", "message"),
    [
        ("a.pt", -100, "a.pt is damaged (cut off: the end of its {} bytes is missing): download or save it again"),
        ("a.pth", -10, "a.pth is damaged (what it says of its tensors is not so): download or save it again"),
        (
            "a.safetensors",
            -4,
            "a.safetensors is damaged (cut off: {} of {all} bytes are there): download or save it again",
        ),
        ("a.safetensors", 30, "a.safetensors is damaged (cut off in its header: {} of at least "),
    ],
)
def test_files_that_are_cut_off_are_refused(tmp_path, monkeypatch, name, end, message):
    monkeypatch.chdir(tmp_path)
    data = fuzz.FORMATS[name](weights())
    Path(name).write_bytes(data[:end])
    with pytest.raises(InputError) as error:
        load_weights(name)
    assert str(error.value).startswith(message.replace("{}", str(len(data[:end]))).replace("{all}", str(len(data))))


def test_a_file_whose_values_changed_on_the_way_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = bytearray(fuzz.as_torch(weights()))
    where = data.index(weights()["0.weight"].numpy().tobytes())
    data[where] ^= 1
    Path("a.pt").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_weights("a.pt")
    assert (
        str(error.value) == "a.pt is damaged (its checksums do not agree with its contents): download or save it again"
    )
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # then there is nothing to compare
    try:
        torch.save(weights(), "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    load_weights("a.pt", SHAPES)


def test_an_archive_is_not_unfolded_beyond_measure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(10**6)}, "a.pt")
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert load_weights("b.pt")[0]["weight"].shape == (10**6,)  # what is packed can be read
    monkeypatch.setattr(containers, "ALLOWANCE", 10**6)
    with pytest.raises(InputError, match=r"b.pt would unfold from \d+ bytes to 4\d{6}: not read"):
        load_weights("b.pt")


def test_what_may_not_be_read_says_so(tmp_path, monkeypatch):
    def closed(*_args):
        raise PermissionError(13, "Permission denied")

    torch.save(weights(), tmp_path / "a.pt")
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(InputError, match=r"a.pt may not be read: change its permissions"):
        load_weights(tmp_path / "a.pt")


def test_what_may_stand_beside_a_network_is_named():
    state = weights() | {"head.weight": torch.ones(1), "bn.num_batches_tracked": torch.tensor(1)}
    found, notes = fit_names(
        {f"vit.{k}": v for k, v in state.items()} | {"fc_norm.bias": torch.ones(1)}, SHAPES, "a", ["head.", "fc_norm."]
    )
    assert list(found) == [*SHAPES, "head.weight", "fc_norm.bias"] and notes == [OFF("vit.")]
    with pytest.raises(InputError, match=r"^a has 1 tensors more than --arch x: head.weight: name the network"):
        fit_names(state, SHAPES, "a", what="--arch x")


def test_a_deeper_network_is_not_taken_for_a_shallow_one():
    def blocks(n: int) -> dict[str, Tensor]:
        return {f"layer1.{i}.conv{k}.weight": torch.ones(2, 2, 3, 3) for i in range(n) for k in (1, 2)} | {
            "fc.weight": torch.ones(5, 2)
        }

    shallow = {name: tuple(tensor.shape) for name, tensor in blocks(2).items()}
    with pytest.raises(
        InputError, match=r"^r34.pth has 6 tensors more than resnet18: layer1.2.conv1.weight, .* and 2 more: name the"
    ):
        fit_names(blocks(5), shallow, "r34.pth", what="resnet18")
    with pytest.raises(
        InputError,
        match=r"^r18.pth has no layer1.2.conv1.weight .* 6 of 11 tensors are missing; nearest in the file: layer1",
    ):
        fit_names(blocks(2), {name: tuple(x.shape) for name, x in blocks(5).items()}, "r18.pth")


def test_our_own_checkpoints_hold_plain_values_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("models/train_x/digits/best.pt")
    save_torch(path, {"model": weights(), "epoch": 1})
    assert load_torch(path, {"model"})["epoch"] == 1
    with pytest.raises(InputError) as error:
        load_torch(path, {"config"})
    assert (
        str(error.value)
        == f"{path} is no such checkpoint: expected config, got model, epoch: run 'dvc repro -f train_x@digits'"
    )
    save_torch(path, {"model": Armed()})
    with pytest.raises(InputError, match=r"holds objects of test_checkpoints\._fire, which are not opened"):
        load_torch(path, {"model"})
    path.write_bytes(fuzz.as_torch({"a": torch.ones(9)})[:-50])
    with pytest.raises(InputError, match=r"is damaged \(cut off.*\): run 'dvc repro -f train_x@digits'$"):
        load_torch(path, {"model"})
    assert not Path("fired").exists()


@pytest.mark.parametrize(
    "main", [predict.main, forecast_snapshots.main, audit.main], ids=["predict", "forecast", "audit"]
)
def test_help_says_which_files_are_read(monkeypatch, capsys, main):
    monkeypatch.setattr(sys, "argv", ["tool", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert " ".join(checkpoints.READABLE.split()) in " ".join(capsys.readouterr().out.split())


def test_mutated_files_end_in_weights_or_in_a_clean_refusal(tmp_path):
    found = collections.Counter()
    for seed in range(60):
        _, name, data = fuzz.mutated(weights(), seed)
        path = tmp_path / name
        path.write_bytes(data)
        end = fuzz.outcome(lambda path: load_weights(path, SHAPES, dtype=torch.float32), path)
        assert end in ("read", "refused"), (seed, end)
        found[end] += 1
        path.unlink()
    assert found["read"] and found["refused"] > found["read"]
    assert not list(tmp_path.iterdir())
