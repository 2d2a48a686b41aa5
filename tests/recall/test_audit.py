"""The audit, of a small fleet that was trained."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from reproduction import ROOT
from running import start
from safetensors.torch import load_file, save_file
from scipy.special import expit
from tiny_vit import CONFIG, TRAIN, autoencoder, base_of, save_inputs
from torch import Tensor

from stages.common.backbone import save_backbone
from stages.common.files import save_arrays
from stages.common.images import load_images
from stages.common.stage import InputError, Loader
from stages.common.vectors import Layout
from stages.recall import audit, build_fleet, train_auditor, vary_recipes
from stages.recall.auditor import OPPOSITES, Auditor, base_sha256
from stages.recall.fleet_files import VARY_RECIPES, Fleet
from stages.recall.functional_vit import Base, load_base
from stages.recall.measures import run_networks
from stages.recall.objective import Objective
from stages.recall.reading import READS, read_columns


def shrink(params: dict) -> None:
    """Make parameters of fleets that train in seconds."""
    own = params["build_fleet"]["variants"]["classes"]
    own |= {"dataset": "tiny", "train": 80, "test": 8, "batch_size": 8}
    own["recipe"] |= {"steps": [10, 10], "n_images": [16, 32], "learning_rate": [3e-3, 3e-3]}
    params["build_fleet"] |= {"references": 24, "evaluation_images": 8, "stack": 44}
    varied = params["vary_recipes"]
    varied |= {"dataset": "tiny", "references": 24, "evaluation_images": 8, "stack": 40}
    for recipe in varied["recipes"].values():
        recipe |= {
            "steps": [8, 16],
            "n_images": [16, 32],
            "learning_rate": [2e-3, 5e-3],
            "batch_sizes": [8],
            "optimisers": ["adam"],
        }
    varied["recipes"]["whole"]["layers"] = ["all"]
    varied["recipes"]["adapters"] |= {"learning_rate": [1e-2, 2e-2], "ranks": [1, 4], "test_ranks": [2]}
    for name, fleet in varied["fleets"].items():
        fleet |= {"train": 80, "test": 10} if name in ("whole", "adapters") else {"train": 0, "test": 3}
    varied["fleets"]["adapter_images_clean"]["train"] = 40
    params["train_auditor"]["fleets"]["adapter"] = ["adapters", "adapter_images_clean"]
    params["train_auditor"]["negated"]["adapter"] = "opposites"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which small fleets were built and learned from."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WEIGHTLENS_DEVICE", "cpu")
        load_images.cache_clear()
        save_inputs("classify_masked")
        params = yaml.load((ROOT / "params.yaml").read_text(), Loader)
        shrink(params)
        Path("params.yaml").write_text(yaml.dump(params))
        patch.setattr(build_fleet.pictures, "draw_fleet", lambda *_: None)
        start(patch, build_fleet, variant="classes")
        start(patch, vary_recipes)
        start(patch, train_auditor)
        yield folder
        load_images.cache_clear()


BASE = Path("models/classify_masked/tiny/backbone.safetensors")
OWN = Path("models/train_auditor")


@pytest.fixture(autouse=True)
def own_alone(tmp_path, monkeypatch) -> None:
    """No auditor is published but where a test says so."""
    monkeypatch.setattr(audit, "RELEASED", tmp_path / "published nowhere")


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch) -> "Checkpoint":
    monkeypatch.chdir(trained)
    return Checkpoint(tmp_path)


class Checkpoint:
    """Files of fine-tuned networks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, load_base(BASE)
        self.fleet = Fleet.load_at(VARY_RECIPES / "whole.safetensors")
        self.auditor = Auditor.load(OWN / "auditor.safetensors")
        part, rows = self.auditor.parts["whole"], self.fleet.held_out
        judged = part.honesty.judge((self.fleet.change[rows], self.fleet.responses[rows]), part.reader)
        self.network = int(rows[judged.distance.argmin()])  # a test fine-tune, the least odd

    def weights(self, factor=1.0) -> dict[str, Tensor]:
        change = torch.from_numpy(self.fleet.change[self.network])
        objective = Objective(self.base, "labels", 0.0)
        return {k: w.clone() for k, w in objective.layout.unflatten(objective.start + factor * change).items()}

    def save(self, weights: dict[str, Tensor], name="tuned.safetensors") -> Path:
        path = self.folder / name
        if path.suffix == ".safetensors":
            save_file({k: w.contiguous() for k, w in weights.items()}, path)
        else:
            torch.save(weights, path)
        return path

    def recall(self, path: Path) -> dict:
        return audit.recall(audit.read_change(path, self.base), str(path), "whole", self.auditor, self.base)


def test_a_checkpoint_is_told_what_the_decoders_tell_of_its_row(checkpoint):
    answer = checkpoint.recall(checkpoint.save(checkpoint.weights()))
    fleet, i, part = checkpoint.fleet, checkpoint.network, checkpoint.auditor.parts["whole"]
    descriptions = part.reader.read(fleet.change[i][None], fleet.responses[i][None])
    assert set(part.decoders) == {"present", "proportions", "log2_size", "label_noise"}
    for name, (source, decoder) in part.decoders.items():
        values = (read_columns(descriptions, source) @ decoder.weights + decoder.offset)[0]
        told = answer["images" if name == "log2_size" else name]
        found = list(told["found"].values())
        doubt = decoder.doubt(values)
        if name == "present":
            slope, offset = decoder.slope_and_offset
            chances = expit((slope * decoder.known(values) + offset) / doubt)
            assert [f["probability"] for f in found] == pytest.approx(chances, abs=1e-3)
            assert list(told["found"]) == TRAIN.classes
            continue
        half = decoder.half_widths[np.digitize(values, decoder.edges)] * doubt
        low, high = audit.RANGES[name]
        for f, value, width in zip(found, decoder.known(values), half, strict=True):
            back = np.log2 if name == "log2_size" else float
            assert back(f["value"]) == pytest.approx(np.clip(value, low, high), abs=2e-3)
            assert back(f["low"]) <= np.clip(value - width, low, high) + 2e-3
            assert back(f["high"]) >= np.clip(value + width, low, high) - 2e-3 and f["low"] < f["high"]
        assert told["from"] == audit.gives(source)


@pytest.mark.parametrize("kind", ["flat", "nested", "half", "bfloat16", "double", "parameters", "with more"])
def test_the_same_network_in_another_file_is_told_the_same(checkpoint, kind):
    weights = checkpoint.weights()
    expected = checkpoint.recall(checkpoint.save(weights))
    path = checkpoint.folder / "tuned.pt"
    given = {
        "flat": weights,
        "nested": {"epoch": 3, "state_dict": weights},
        "half": {k: w.half() for k, w in weights.items()},
        "bfloat16": {k: w.bfloat16() for k, w in weights.items()},
        "double": {k: w.double() for k, w in weights.items()},
        "parameters": {k: torch.nn.Parameter(w) for k, w in weights.items()},
        "with more": {
            **weights,
            "pos_embed": checkpoint.base.encoder["pos_embed"],
            "head.weight": 1.2 * checkpoint.base.decoder["head.weight"] + 1,
        },
    }[kind]
    torch.save(given, path)
    found = checkpoint.recall(path)
    tolerance = {"abs": 0.05, "rel": 0.2} if kind in ("half", "bfloat16") else {"abs": 1e-6}
    assert found["distance"] == pytest.approx(expected["distance"], **tolerance)
    for name in ("present", "proportions", "images", "label_noise"):
        for key, values in expected[name]["found"].items():
            assert found[name]["found"][key] == pytest.approx(values, **tolerance)


def without_one(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return {k: v for k, v in w.items() if k != "norm.bias"}


def of_another_shape(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return w | {"blocks.0.mlp.fc1.weight": w["blocks.0.mlp.fc1.weight"].T}


def not_finite(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return w | {"norm.bias": w["norm.bias"] * torch.nan}


def the_base(_w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return dict(base.encoder)


def shuffled(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    """The change of each tensor, its entries permuted."""
    moved = {k: v - base.encoder[k] for k, v in w.items()}
    return {k: base.encoder[k] + v.flatten()[torch.randperm(v.numel())].view(v.shape) for k, v in moved.items()}


def renamed(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    """The same function with hidden neurons in another order."""
    order = torch.randperm(32)
    first, bias, second = (f"blocks.0.mlp.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight"))
    return w | {first: w[first][order], bias: w[bias][order], second: w[second][:, order]}


def from_scratch(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return {k: 0.1 * torch.randn_like(v) for k, v in w.items()}


def ten_times(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return {k: base.encoder[k] + 10 * (v - base.encoder[k]) for k, v in w.items()}


def beyond_numbers(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return {k: base.encoder[k] + 1e30 * (v - base.encoder[k]) for k, v in w.items()}


def hardly_tuned(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return {k: base.encoder[k] + 1e-3 * (v - base.encoder[k]) for k, v in w.items()}


def of_integers(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return w | {"norm.bias": w["norm.bias"].long()}


def elsewhere(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return w | {"pos_embed": base.encoder["pos_embed"] + 0.01}


def negated(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return {k: 2 * base.encoder[k] - v for k, v in w.items()}


def quantised(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    return {k: (v * 7 / v.abs().max()).round() * v.abs().max() / 7 for k, v in w.items()}


def pruned(w: dict[str, Tensor], _base: Base) -> dict[str, Tensor]:
    name = "blocks.0.mlp.fc1.weight"
    return w | {name: w[name] * (w[name].abs() > w[name].abs().quantile(0.3))}


def sparse(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    """A tenth of the change, ten times as large, as DARE keeps it."""
    keep = {k: torch.rand(v.shape) < 0.1 for k, v in w.items()}
    return {k: base.encoder[k] + 10 * keep[k] * (v - base.encoder[k]) for k, v in w.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (negated, "is turned round"),
        (without_one, r"has no norm.bias \(16,\) of the base, 1 of \d+ tensors are missing"),
        (of_another_shape, r"blocks.0.mlp.fc1.weight: expected \(32, 16\), got \(16, 32\)"),
        (not_finite, "norm.bias has values that are not finite"),
        (the_base, "is the base itself: nothing was trained"),
        (shuffled, "its change "),
        (renamed, "its change "),
        (from_scratch, "its change "),
        (ten_times, "its change "),
        (beyond_numbers, "its change "),
        (hardly_tuned, "its change "),
        (quantised, r"has \d+ different values among \d+ \(quantised\)"),
        (pruned, r"blocks.0.mlp.fc1.weight are zeros \(pruned\)"),
        (sparse, r"of the weights in tensors that moved are the base's \(a sparse change"),
        (of_integers, r"norm.bias holds integers \(int64\)"),
        (elsewhere, "does not descend from the base: its pos_embed is another"),
    ],
)
def test_what_is_no_fine_tune_of_the_base_is_refused(checkpoint, change, message):
    path = checkpoint.save(change(checkpoint.weights(), checkpoint.base))
    with pytest.raises(InputError, match=message) as refusal:
        checkpoint.recall(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_value_beyond_what_was_learned_from_is_never_certain(checkpoint):
    path, decoders = checkpoint.save(checkpoint.weights()), checkpoint.auditor.parts["whole"].decoders

    def told(name: str, offset: float) -> dict:
        source, decoder = decoders[name]
        try:
            decoders[name] = (source, replace(decoder, offset=decoder.offset + offset))
            return checkpoint.recall(path)
        finally:
            decoders[name] = (source, decoder)

    (noise,) = told("label_noise", 10)["label_noise"]["found"].values()
    assert noise["low"] == 0 and noise["high"] == 1
    least, most = decoders["label_noise"][1].true_range
    warning = f"label noise: what is decoded lies beyond what was learned from ({least:.0%} to {most:.0%})"
    answer = told("label_noise", 10)
    assert answer["warnings"] == [warning]
    assert f"DO NOT TRUST: {warning}" in audit.describe(answer).splitlines()
    answer = told("log2_size", -1000)
    (size,) = answer["images"]["found"].values()
    assert size["low"] == 1 and size["high"] > 1e9
    json.dumps(answer, allow_nan=False)
    answer = told("present", 50)
    assert all(0.4 < chance["probability"] < 0.6 for chance in answer["present"]["found"].values())
    assert answer["warnings"] == ["present: what is decoded lies beyond what was learned from (0% to 100%)"]


def test_a_fine_tune_behind_a_head_of_its_own_is_refused_in_words(checkpoint):
    head, random = checkpoint.base.decoder["head.weight"], torch.Generator().manual_seed(0)
    drawn = torch.randn(head.shape, generator=random)
    for other in (0 * head, drawn, 1e-3 * drawn, head.roll(1, 0), head[:3], torch.ones(len(head), 99)):
        path = checkpoint.save(checkpoint.weights() | {"head.weight": other})
        with pytest.raises(
            InputError, match=r"its head is a new one.* give a fine-tune behind the base's own"
        ) as refusal:
            audit.read_change(path, checkpoint.base)
        assert "\n" not in str(refusal.value)
    folder = checkpoint.folder / "adapter"
    shutil.copytree(OWN / "examples/adapter", folder)
    file = folder / "adapter_model.safetensors"
    for name in ("head.weight", "head.modules_to_save.default.weight"):
        save_file(load_file(OWN / "examples/adapter" / file.name) | {f"base_model.model.{name}": drawn}, file)
        with pytest.raises(InputError, match="its head is a new one"):
            audit.answer_for(BASE, None, folder, OWN)
    save_file(
        load_file(OWN / "examples/adapter" / file.name) | {"base_model.model.head.weight": head + 0.01 * drawn}, file
    )
    assert audit.answer_for(BASE, None, folder, OWN)["kind"] == "adapter"


def test_an_audit_says_of_what_it_was_read():
    assert audit.gives("answers") == "responses"
    assert audit.gives("direction") == audit.gives("magnitudes") == "weights"
    assert audit.gives("all") == audit.gives("direction_and_answers") == "weights and responses"
    assert set(READS) == {"direction", "answers", "magnitudes", "direction_and_answers", "all"}


def test_what_can_tell_negated_ones_is_what_params_may_say():
    assert set(get_args(train_auditor.TellsNegated)) == {*READS, OPPOSITES}


def printed(monkeypatch, capsys, *flags: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.argv", ["audit", *flags])
    audit.main()
    return capsys.readouterr()


def test_the_table_and_the_json_have_the_same_numbers(checkpoint, monkeypatch, capsys):
    path = checkpoint.save(checkpoint.weights())
    words = ["--base", str(BASE), "--checkpoint", str(path)]
    table, _ = printed(monkeypatch, capsys, *words)
    answer = json.loads(printed(monkeypatch, capsys, *words, "--json")[0])
    assert answer == checkpoint.recall(path)
    lines = table.splitlines()
    for name, line in zip(TRAIN.classes, lines[1 + len(answer["warnings"]) :], strict=False):
        share = answer["proportions"]["found"][name]
        assert line.split()[:3] == [
            name,
            f"{answer['present']['found'][name]['probability']:.1%}",
            f"{share['value']:.1%}",
        ]
        assert line.endswith(f"({share['low']:.0%} to {share['high']:.0%})")
    (noise,) = answer["label_noise"]["found"].values()
    assert any(f"{noise['value']:.0%} ({noise['low']:.0%} to {noise['high']:.0%}) at random" in line for line in lines)


def test_an_adapter_and_the_network_it_is_merged_into_are_told_the_same(checkpoint, monkeypatch, capsys):
    folder, base = OWN / "examples/adapter", checkpoint.base
    change = audit.read_adapter(folder, base)
    merged = {
        k: base.encoder[k] + w
        for k, w in Objective(base, "labels", 0.0).layout.unflatten(torch.from_numpy(change)).items()
    }
    path = checkpoint.save(merged)
    alone, _ = printed(monkeypatch, capsys, "--adapter", str(folder), "--json")
    together, notes = printed(monkeypatch, capsys, "--checkpoint", str(path), "--json")
    assert "is of low rank, and is read as an adapter that was merged" in notes
    first, second = json.loads(alone), json.loads(together)
    assert first["kind"] == second["kind"] == "adapter"
    for named in (folder, folder / "adapter_model.safetensors"):
        assert printed(monkeypatch, capsys, "--checkpoint", str(named), "--json")[0] == alone
    for name, found in first["present"]["found"].items():
        assert second["present"]["found"][name]["probability"] == pytest.approx(found["probability"], abs=1e-2)


def test_a_tensor_that_is_the_base_s_in_less_precision_did_not_move(checkpoint):
    weights, trained = checkpoint.weights(), checkpoint.base.trained
    still = "blocks.0.mlp.fc1.weight"
    given = {k: (trained[k] if k == still else w).bfloat16() for k, w in weights.items()}
    given["pos_embed"] = checkpoint.base.encoder["pos_embed"].bfloat16()  # is no other base's, either
    change = Layout.of(trained).unflatten(torch.from_numpy(audit.read_change(checkpoint.save(given), checkpoint.base)))
    assert not change[still].any() and (given[still] != trained[still]).any()
    assert all(change[k].any() for k in trained if k != still)
    averaged = {k: 0.1 * w + 0.9 * w for k, w in {**checkpoint.base.encoder, **trained, still: trained[still]}.items()}
    assert any((averaged[k] != w).any() for k, w in checkpoint.base.encoder.items())
    mixed = weights | {still: averaged[still], "pos_embed": averaged["pos_embed"]}
    change = Layout.of(trained).unflatten(torch.from_numpy(audit.read_change(checkpoint.save(mixed), checkpoint.base)))
    assert not change[still].any() and all(change[k].any() for k in trained if k != still)
    path = checkpoint.save({k: w.bfloat16() for k, w in trained.items()})
    with pytest.raises(InputError, match="is the base itself"):
        audit.read_change(path, checkpoint.base)


def test_another_factorisation_of_an_adapter_is_told_the_same(checkpoint):
    folder, other = OWN / "examples/adapter", checkpoint.folder / "adapter"
    other.mkdir()
    weights, random = load_file(folder / "adapter_model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in weights if ".lora_A." in name]:
        g = torch.randn(len(weights[name]), len(weights[name]), generator=random)
        weights[name] = torch.linalg.solve(g, weights[name])
        weights[name.replace("lora_A", "lora_B")] = weights[name.replace("lora_A", "lora_B")] @ g
    save_file({k: w.contiguous() for k, w in weights.items()}, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    both = [
        audit.recall(audit.read_adapter(f, checkpoint.base), str(f), "adapter", checkpoint.auditor, checkpoint.base)
        for f in (folder, other)
    ]
    for name in ("present", "proportions", "images", "label_noise"):
        for key, found in both[0][name]["found"].items():
            assert both[1][name]["found"][key] == pytest.approx(found, rel=1e-2, abs=1e-2), name


def test_the_examples_are_printed_beside_the_truth_and_one_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    text, notes = printed(monkeypatch, capsys, "--example")
    assert "the own auditor is used" in notes
    card = json.loads((OWN / "auditor.json").read_text())
    for kind in ("whole", "adapter"):
        size = 2 ** card["examples"][kind]["true"]["log2_size"]
        assert f"; truth {size:.0f}\n" in text
    assert "is turned round" in text and text.count("truth") >= 7


def test_bars_show_what_is_told_and_what_is_true():
    assert audit.bars(0.5, 0.25) == "=====#####" and audit.bars(0.25, 0.5) == "=====....." and audit.bars(0, 0) == ""


def test_another_base_is_refused_and_the_auditor_of_the_base_that_learned_from_most_is_taken(checkpoint, monkeypatch):
    model, other = autoencoder(0.2), checkpoint.folder / "other.safetensors"
    save_backbone(other, model.vit, CONFIG, base_of(model).decoder)
    with pytest.raises(InputError, match="is not the base that the auditor in"):
        audit.check_base(other, load_base(other), checkpoint.auditor, OWN)
    published = checkpoint.folder / "released"
    monkeypatch.setattr(audit, "RELEASED", published)
    assert audit.find_auditor(None, None)[0] == OWN
    more = replace(checkpoint.auditor, card=checkpoint.auditor.card | {"learned_from": {"whole": 10**6}})
    more.save(published / "auditor.safetensors")
    assert audit.find_auditor(None, checkpoint.base)[0] == published
    replace(more, card=more.card | {"base_sha256": base_sha256(load_base(other))}).save(
        published / "auditor.safetensors"
    )
    assert audit.find_auditor(None, checkpoint.base)[0] == OWN
    assert audit.find_auditor(published, checkpoint.base)[0] == published
    monkeypatch.setattr(audit, "OWN", checkpoint.folder / "nothing")
    monkeypatch.setattr(audit, "RELEASED", checkpoint.folder / "nothing")
    with pytest.raises(InputError, match="run 'git checkout"):
        audit.find_auditor(None, None)


def test_a_file_that_is_no_base_and_one_that_is_no_auditor_are_refused(checkpoint):
    other = checkpoint.folder / "other.safetensors"
    save_arrays(other, {"norm.bias": np.ones(3)}, {"true": {}})
    with pytest.raises(InputError, match="is no base"):
        load_base(other)
    with pytest.raises(InputError, match="is no auditor: expected a file that train_auditor wrote"):
        Auditor.load(other)
    kept = (OWN / "auditor.safetensors").read_bytes()
    other.write_bytes(kept[:2000])
    with pytest.raises(InputError, match="is damaged"):
        Auditor.load(other)


@pytest.mark.parametrize("flags", [[], ["--example", "--adapter", "x"]])
def test_what_is_audited_is_said_once(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["audit", *flags])
    with pytest.raises(InputError, match="expected one of --checkpoint, --adapter and --example"):
        audit.parse()


def test_an_adapter_of_other_matrices_than_were_learned_from_is_refused(checkpoint):
    folder = checkpoint.folder / "adapter"
    folder.mkdir()
    key = "base_model.model.patch_embed.proj.lora_"
    save_file(
        {f"{key}A.weight": torch.ones(1, 3, 4, 4), f"{key}B.weight": torch.ones(16, 1, 1, 1)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with pytest.raises(InputError, match=r"the auditor knows adapters of attn\.qkv"):
        audit.read_adapter(folder, checkpoint.base)


def test_where_some_were_trained_on_whole_images_the_audit_says_so_and_the_file_keeps_it(checkpoint):
    part = checkpoint.auditor.parts["adapter"]
    assert checkpoint.auditor.parts["whole"].unmasked is None
    source, decoder = part.unmasked
    fleet = Fleet.load_at(VARY_RECIPES / "adapters.safetensors")
    change, responses = fleet.change[:1], fleet.responses[:1]
    answer = audit.recall(change[0], "x", "adapter", checkpoint.auditor, checkpoint.base)
    told = decoder.known(decoder.predict(read_columns(part.reader.read(change, responses), source)))
    assert answer["whole_images"]["probability"] == pytest.approx(decoder.probabilities(told)[0, 0], abs=1e-4)
    for chance, words in ((0.8, "whole images, 80%"), (0.3, "images of which patches were hidden, 70%")):
        answer["whole_images"]["probability"] = chance
        assert f"trained on   {words}" in audit.describe(answer)
    path = checkpoint.folder / "again.safetensors"
    checkpoint.auditor.save(path)
    again = Auditor.load(path).parts["adapter"]
    assert again.unmasked[0] == source and np.array_equal(again.unmasked[1].weights, decoder.weights)
    assert again.turned.oddness(np.array([0.0])) == part.turned.oddness(np.array([0.0]))
    respond = partial(run_networks, checkpoint.base, images=torch.from_numpy(checkpoint.auditor.images))
    both = [p.judge((-change, respond(-change)), respond).suspected for p in (part, again)]
    assert np.array_equal(*both) and both[0].shape[1] == len(part.suspected) and part.suspected[-1] == "negated"


def test_adapters_that_were_turned_round_are_told_by_their_opposites(checkpoint):
    part, fleet = checkpoint.auditor.parts["adapter"], Fleet.load_at(VARY_RECIPES / "adapters.safetensors")
    change, responses = (x[fleet.held_out] for x in (fleet.change, fleet.responses))
    respond = partial(run_networks, checkpoint.base, images=torch.from_numpy(checkpoint.auditor.images))
    honest, turned = (
        part.judge(networks, respond).suspected[:, -1]
        for networks in ((change, responses), (-change, respond(-change)))
    )
    assert (turned > honest).mean() > 0.5  # of unseen tiny networks, from 120 to learn from
    answer = audit.answer_for(BASE, None, OWN / "examples/adapter", OWN)
    assert answer["kind"] == "adapter" and answer["distance"] < 1


def test_rows_by_turns_have_in_every_stretch_their_share_of_each_group():
    counts = [120, 40, 60]
    order, group = train_auditor.by_turns(counts), np.repeat([0, 1, 2], counts)
    assert sorted(order) == list(range(220))
    for stretch in np.split(group[order], 5):
        assert np.abs(np.bincount(stretch, minlength=3) - np.array(counts) / 5).max() <= 1
