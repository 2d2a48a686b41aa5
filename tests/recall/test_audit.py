"""The audit, of a small fleet that was trained."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reproduction import ROOT
from running import start
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scipy.special import expit
from tiny_vit import CONFIG, TRAIN, autoencoder, base_of, save_inputs
from torch import Tensor

from stages.common.backbone import save_backbone
from stages.common.files import load_metadata, save_arrays
from stages.common.images import load_images
from stages.common.stage import InputError, Loader
from stages.recall import audit, build_fleet, condense_changes
from stages.recall.condense import Span
from stages.recall.decoders import REPRESENTATIONS, read
from stages.recall.fleet_files import CondensedFleet, Fleet, load_fitted
from stages.recall.functional_vit import Base, load_base
from stages.recall.objective import Objective
from stages.recall.recover_memory import calibrate, save_decoders
from stages.recall.typicality import Typicality


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a small fleet was built, condensed and learned from."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WEIGHTLENS_DEVICE", "cpu")
        load_images.cache_clear()
        save_inputs("classify_masked")
        params = yaml.load((ROOT / "params.yaml").read_text(), Loader)
        own = params["build_fleet"]["variants"]["classes"]
        own |= {"dataset": "tiny", "train": 60, "test": 8, "batch_size": 8}
        own["recipe"] |= {"steps": [10, 10], "n_images": [16, 32], "learning_rate": [3e-3, 3e-3]}
        params["build_fleet"] |= {"references": 20, "evaluation_images": 8, "stack": 34}
        Path("params.yaml").write_text(yaml.dump(params))
        patch.setattr(build_fleet.pictures, "draw_fleet", lambda *_: None)
        patch.setattr(condense_changes, "FLEETS", ("classes",))
        patch.setattr(condense_changes.pictures, "draw_explained_variance", lambda *_: None)
        start(patch, build_fleet, variant="classes")
        start(patch, condense_changes)
        decoders, sources, _ = calibrate(CondensedFleet.load("classes"))
        save_decoders(decoders, sources)
        yield folder
        load_images.cache_clear()


BASE = Path("models/classify_masked/tiny/backbone.safetensors")


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch) -> "Checkpoint":
    monkeypatch.chdir(trained)
    return Checkpoint(tmp_path)


class Checkpoint:
    """Files of fine-tuned networks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, load_base(BASE)
        self.fleet = Fleet.load("classes")
        self.network = 61  # a test fine-tune

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


def test_a_checkpoint_is_told_what_the_decoders_tell_of_its_row(checkpoint):
    answer = audit.recall(checkpoint.save(checkpoint.weights()), BASE)
    fleet, i = CondensedFleet.load("classes"), checkpoint.network
    decoders, sources = load_file(audit.DECODERS), load_metadata(audit.DECODERS)["reads"]
    assert set(sources) == {"present", "proportions", "log2_size", "label_noise"}
    for name, source in sources.items():
        x = read(fleet.descriptions, source)[i]
        values = x @ decoders[f"{name}.weights"] + decoders[f"{name}.offset"]
        found = list(answer["images" if name == "log2_size" else name]["found"].values())
        if name == "present":
            slope, offset = decoders["present.slope_and_offset"]
            assert [f["probability"] for f in found] == pytest.approx(expit(slope * values + offset), abs=1e-3)
            assert list(answer[name]["found"]) == TRAIN.classes
            continue
        half = decoders[f"{name}.half_widths"][np.digitize(values, decoders[f"{name}.edges"])]
        low, high = audit.RANGES[name]
        for at, column in (("value", values), ("low", values - half), ("high", values + half)):
            column = np.clip(column, low, high)
            column = 2**column if name == "log2_size" else column
            assert [f[at] for f in found] == pytest.approx(column, rel=2e-3, abs=2e-3), (name, at)
        read_from = answer["images" if name == "log2_size" else name]["from"]
        assert ("responses" in read_from) == ("responses" in REPRESENTATIONS[source])
        assert ("weights" in read_from) == (REPRESENTATIONS[source].keys() != {"responses"})


@pytest.mark.parametrize("kind", ["flat", "nested", "half", "double", "parameters", "with more"])
def test_the_same_network_in_another_file_is_told_the_same(checkpoint, kind):
    weights = checkpoint.weights()
    expected = audit.recall(checkpoint.save(weights), BASE)
    path = checkpoint.folder / "tuned.pt"
    given = {
        "flat": weights,
        "nested": {"epoch": 3, "state_dict": weights},
        "half": {k: w.half() for k, w in weights.items()},
        "double": {k: w.double() for k, w in weights.items()},
        "parameters": {k: torch.nn.Parameter(w) for k, w in weights.items()},
        "with more": {
            **weights,
            "pos_embed": checkpoint.base.encoder["pos_embed"],
            "head.weight": torch.ones(2, 16),
        },
    }[kind]
    torch.save(given, path)
    found = audit.recall(path, BASE)
    tolerance = {"abs": 0.02, "rel": 0.1} if kind == "half" else {"abs": 1e-6}
    for name, part in expected.items():
        if name == "warnings":
            assert found[name] == part == []
            continue
        if isinstance(part, float):
            assert found[name] == pytest.approx(part, **tolerance)
            continue
        assert found[name]["from"] == part["from"]
        for key, values in part["found"].items():
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


def of_rank_one(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    """Each matrix's change truncated."""

    def truncated(change: Tensor) -> Tensor:
        if change.dim() < 2 or len(change) == 1:
            return change
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        return (s[0] * u[:, :1] @ v[:1]).view(change.shape)

    return {k: base.encoder[k] + truncated(v - base.encoder[k]) for k, v in w.items()}


def partly_trained(w: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    return w | {"blocks.0.mlp.fc1.weight": base.encoder["blocks.0.mlp.fc1.weight"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (negated, "is turned round"),
        (of_rank_one, "is of low rank"),
        (partly_trained, "of its weights are the base's"),
        (without_one, r"has no norm.bias \(16,\) of the base, 1 of \d+ tensors are missing"),
        (of_another_shape, r"blocks.0.mlp.fc1.weight: expected \(32, 16\), got \(16, 32\)"),
        (not_finite, "norm.bias has values that are not finite"),
        (the_base, "is the base itself: nothing was trained"),
        (shuffled, "does not descend from the base as known fine-tunes do"),
        (renamed, "does not descend from the base as known fine-tunes do"),
        (from_scratch, "does not descend from the base as known fine-tunes do"),
        (ten_times, "was not tuned as known fine-tunes were"),
        (beyond_numbers, "was not tuned as known fine-tunes were"),
        (hardly_tuned, "was not tuned as known fine-tunes were"),
        (of_integers, r"norm.bias holds integers \(int64\)"),
        (elsewhere, "does not descend from the base: its pos_embed is another"),
    ],
)
def test_what_is_no_fine_tune_of_the_base_is_refused(checkpoint, change, message):
    path = checkpoint.save(change(checkpoint.weights(), checkpoint.base))
    with pytest.raises(InputError, match=message) as refusal:
        audit.recall(path, BASE)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_change_unlike_known_ones_is_told_with_less_certainty_and_the_table_says_so(checkpoint, monkeypatch):
    path = checkpoint.save(checkpoint.weights())
    fitted, typical, metadata = load_fitted("classes")
    plain = audit.recall(path, BASE)
    assert plain["warnings"] == [] and plain["distance"] < 1
    assert "TRUST" not in audit.describe(plain)
    stretch = 3.0 / plain["distance"]
    strict = typical | {"joint_limit": typical["joint_limit"] / stretch}
    monkeypatch.setattr(audit, "load_fitted", lambda _: (fitted, strict, metadata))
    told = audit.recall(path, BASE)
    assert told["distance"] == pytest.approx(3)
    (warning,) = told["warnings"]
    assert warning.startswith("the change as a whole is unlike known fine-tunes: 3.0 times as far")
    assert audit.describe(told).splitlines()[0] == f"DO NOT TRUST: {warning}"
    for name, chance in plain["present"]["found"].items():
        p, doubted = chance["probability"], told["present"]["found"][name]["probability"]
        assert np.log(doubted / (1 - doubted)) == pytest.approx(np.log(p / (1 - p)) / 3, abs=1e-4)
    for key in ("proportions", "images", "label_noise"):
        for name, known in plain[key]["found"].items():
            wide = told[key]["found"][name]
            assert wide["value"] == known["value"]
            assert (wide["low"] <= known["low"] and wide["high"] > known["high"]) or known["high"] == 1
    (known,), (wide,) = (answer["images"]["found"].values() for answer in (plain, told))
    assert np.log2(wide["high"] / wide["value"]) == pytest.approx(3 * np.log2(known["high"] / known["value"]), rel=1e-4)


def test_a_value_beyond_what_was_learned_from_is_never_certain(checkpoint, monkeypatch):
    path = checkpoint.save(checkpoint.weights())
    decoders = audit.load_decoders(audit.DECODERS, audit.CONDENSED)
    source, decoder = decoders["label_noise"]
    far = replace(decoder, offset=decoder.offset + 10)
    monkeypatch.setattr(audit, "load_decoders", lambda *_: decoders | {"label_noise": (source, far)})
    told = audit.recall(path, BASE)
    (noise,) = told["label_noise"]["found"].values()
    assert noise["low"] == 0 and noise["high"] == 1
    least, most = decoder.true_range
    warning = f"label noise: what is decoded lies beyond what was learned from ({least:.0%} to {most:.0%})"
    assert told["warnings"] == [warning]
    assert f"DO NOT TRUST: {warning}" in audit.describe(told).splitlines()
    source, decoder = decoders["log2_size"]
    far = replace(decoder, offset=decoder.offset - 1000)
    monkeypatch.setattr(audit, "load_decoders", lambda *_: decoders | {"log2_size": (source, far)})
    told = audit.recall(path, BASE)
    (size,) = told["images"]["found"].values()
    assert size["low"] == 1 and size["high"] > 1e9
    least, most = 2**decoder.true_range
    warning = f"images: what is decoded lies beyond what was learned from ({least:.0f} to {most:.0f})"
    assert told["warnings"] == [warning]
    json.dumps(told, allow_nan=False)
    source, decoder = decoders["present"]
    far = replace(decoder, offset=decoder.offset + 50)
    monkeypatch.setattr(audit, "load_decoders", lambda *_: decoders | {"present": (source, far)})
    told = audit.recall(path, BASE)
    assert all(0.4 < chance["probability"] < 0.6 for chance in told["present"]["found"].values())
    assert told["warnings"] == ["present: what is decoded lies beyond what was learned from (0% to 100%)"]


def test_an_audit_says_of_what_it_was_read():
    assert audit.gives("responses") == "responses"
    assert audit.gives("change") == audit.gives("statistics_and_spectrum") == "weights"
    assert audit.gives("both") == audit.gives("all") == "weights and responses"


def test_another_base_is_refused(checkpoint):
    path = checkpoint.save(checkpoint.weights())
    model, other = autoencoder(0.2), checkpoint.folder / "other.safetensors"
    save_backbone(other, model.vit, CONFIG, base_of(model).decoder)
    with pytest.raises(InputError, match="is not the base that decoders are of"):
        audit.recall(path, other)


def test_a_file_that_is_no_base_is_refused(checkpoint):
    path = checkpoint.save(checkpoint.weights())
    other = checkpoint.folder / "other.safetensors"
    save_arrays(other, {"norm.bias": np.ones(3)}, {"true": {}})
    with pytest.raises(InputError, match="is no base"):
        audit.recall(path, other)


def test_a_base_that_was_made_anew_is_no_fault_of_the_checkpoint(checkpoint):
    path, kept = checkpoint.save(checkpoint.weights()), BASE.read_bytes()
    model = autoencoder(0.2)
    try:
        save_backbone(BASE, model.vit, CONFIG, base_of(model).decoder)
        with pytest.raises(InputError, match="was made anew since fleets were built of it: run 'dvc repro"):
            audit.recall(path, BASE)
    finally:
        BASE.write_bytes(kept)


def test_damaged_decoders_are_told_of_on_one_line(checkpoint):
    path, kept = checkpoint.save(checkpoint.weights()), audit.DECODERS.read_bytes()
    try:
        audit.DECODERS.write_bytes(kept[:2000])
        with pytest.raises(InputError, match=r"is damaged .*: run 'dvc repro -f recover_memory'"):
            audit.recall(path, BASE)
    finally:
        audit.DECODERS.write_bytes(kept)


def test_the_table_and_the_json_have_the_same_numbers(checkpoint, monkeypatch, capsys):
    path = checkpoint.save(checkpoint.weights())

    def printed(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["audit", "--base", str(BASE), "--checkpoint", str(path), *flags])
        audit.main()
        return capsys.readouterr().out

    table, answer = printed(), json.loads(printed("--json"))
    assert answer == audit.recall(path, BASE)
    lines = table.splitlines()
    for name, line in zip(TRAIN.classes, lines[1:], strict=False):
        share = answer["proportions"]["found"][name]
        words = [name, f"{answer['present']['found'][name]['probability']:.1%}", f"{share['value']:.1%}"]
        assert line.split()[:3] == words
        assert line.endswith(f"({share['low']:.0%} to {share['high']:.0%})")
    (noise,) = answer["label_noise"]["found"].values()
    assert any(f"{noise['value']:.0%} ({noise['low']:.0%} to {noise['high']:.0%}) at random" in line for line in lines)
    (size,) = (part for part in lines if part.startswith("images"))
    assert size.endswith(f"from {answer['images']['from']}")
    assert f"{answer['outside']:.0%} of the change" in lines[-1] and f"limit {answer['limit']:.0%}" in lines[-1]


def test_an_audit_is_as_sure_of_the_change_as_the_limit_was_of_fine_tunes_left_out(checkpoint):
    fleet = checkpoint.fleet
    _, typical, _ = load_fitted("classes")
    span = Span.fit(fleet.change[fleet.learned], fleet.layout)
    limit = Typicality.fit(fleet.change[fleet.learned], fleet.layout, span).limit
    assert float(typical["limit"]) == pytest.approx(float(limit))
    answer = audit.recall(checkpoint.save(checkpoint.weights()), BASE)
    expected = span.outside(fleet.change[checkpoint.network][None])[0]
    assert answer["outside"] == pytest.approx(expected, abs=1e-4)
    assert 0.01 < answer["outside"] < answer["limit"] == float(typical["limit"])
    moved = fleet.layout.flatten(checkpoint.weights()) - fleet.layout.flatten(checkpoint.base.trained)
    assert np.allclose(moved, fleet.change[61], atol=1e-6)
