"""Descriptions, decoders, maps and the audit, on fleets whose changes are known functions of what they were trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from reproduction import ROOT
from running import start
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scipy.special import expit
from sklearn.linear_model import Ridge
from tiny_vit import CONFIG, TEST, TRAIN, autoencoder, base_of, save_inputs, seeded
from torch import Tensor

from stages.common.backbone import save_backbone
from stages.common.files import load_metadata, save_arrays
from stages.common.images import load_images
from stages.common.metrics import binary_calibration_error
from stages.common.stage import InputError, Loader
from stages.common.vectors import Layout
from stages.common.work import fingerprint
from stages.recall import audit, build_fleet, condense_changes, map_weight_space, recover_memory
from stages.recall.condense import Arrays, condense, fit_condenser, fit_limits, fit_span, outside, size, split
from stages.recall.decoders import ALPHAS, REPRESENTATIONS, fit_decoder, r_squared, read, retrieved
from stages.recall.fleet import Images, show_images
from stages.recall.map_weight_space import accuracy, draw_pairs, fit_map, nearest, rule_geometry, table_features
from stages.recall.objective import Objective
from stages.recall.recover_memory import (
    baseline,
    by_name,
    calibrate,
    decode_fleet,
    growth,
    permuted,
    score,
    targets,
    train_image_decoder,
    train_judge,
)
from stages.recall.tasks import CELLS, Recipe, Task
from stages.recall.vit import HEAD, Base, load_base

LAYOUT = Layout(
    {"bias": (6,), "first.weight": (10, 8), "first.bias": (10,), "second.weight": (6, 10), "patch": (4, 3, 2, 2)}
)
PARAMETERS = 204
BITS = 6
ANSWERS = (3, 5)  # classes and reference inputs
RESPONSES = 25  # 15 answers and ten numbers more
TABLES = (np.arange(256)[:, None] >> np.arange(CELLS) & 1).astype(np.float64)


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


WORLD = np.random.default_rng(7)  # how changes and answers follow from what a network was trained on
CENTER, DIRECTIONS = draw(WORLD, PARAMETERS), draw(WORLD, BITS + 1, PARAMETERS)
READ_OUT = draw(WORLD, BITS + 1, RESPONSES)


def linear_fleet(train=120, test=60, noise=0.5, seed=0) -> Arrays:
    """A fleet whose changes and responses are linear in which classes were present and in a size, but for noise."""
    random, n = np.random.default_rng(seed), train + test
    present = (random.random((n, BITS)) < 0.5).astype(np.float32)
    size = draw(random, n, 1)
    known = np.concatenate([present - 0.5, size], 1)
    shares = present / np.maximum(present.sum(1, keepdims=True), 1)
    return {
        "change": CENTER + known @ DIRECTIONS + noise * draw(random, n, PARAMETERS),
        "responses": known @ READ_OUT + noise * draw(random, n, RESPONSES),
        "test": np.arange(n) >= train,
        "mean_image": (known @ DIRECTIONS[:, :12]).reshape(n, 3, 2, 2),
        "true.present": present,
        "true.proportions": shares,
        "true.log2_size": size[:, 0],
        "true.label_noise": np.abs(known @ DIRECTIONS[:, 0]),
        "true.table": present,
    }


def condensed(fleet: Arrays) -> Arrays:
    """What recover_memory reads of a fleet."""
    train, _ = split(fleet["test"])
    fitted = fit_condenser(fleet["change"][train], fleet["responses"][train], LAYOUT, ANSWERS)
    n = len(fleet["test"])
    known = {name.removeprefix("true."): fleet[name].reshape(n, -1) for name in fleet if name.startswith("true.")}
    found = condense(fleet["change"], fleet["responses"], LAYOUT, fitted)
    return found | known | {"test": fleet["test"], "mean_image": fleet["mean_image"].reshape(n, -1)}


@pytest.fixture(scope="module")
def fleet() -> Arrays:
    return condensed(linear_fleet())


def binomial(n: int) -> float:
    """Four standard deviations of the mean of so many fair coins."""
    return 4 * 0.5 / n**0.5


def norms(rows: np.ndarray) -> float:
    """The mean square norm of rows."""
    return float((rows.astype(np.float64) ** 2).sum(1).mean())


def assert_same(a: Arrays, b: Arrays, tolerance=0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


# Descriptions


@pytest.mark.parametrize("answers", [ANSWERS, (1, 15), (0, 5)])
def test_descriptions_of_training_fine_tunes_are_centred_and_weigh_alike(answers):
    drawn = linear_fleet(noise=1.0)
    train, test = split(drawn["test"])
    change, responses = drawn["change"], drawn["responses"]
    fitted = fit_condenser(change[train], responses[train], LAYOUT, answers)
    found = condense(change, responses, LAYOUT, fitted)
    for name, rows in found.items():
        assert np.abs(rows[train].mean(0)).max() < 1e-4, name
        parts = np.split(rows, [len(fitted["axes.responses"])], axis=1) if name == "responses" else [rows]
        parts = [part for part in parts if part.size]
        assert len(parts) == 1 + (name == "responses" and answers[0] > 1)  # what is answered, and how sure
        for part in parts:
            assert norms(part[train]) == pytest.approx(1, abs=1e-3), name
            assert norms(part[test]) != pytest.approx(1, abs=1e-3), name
    deviations = found["statistics"][train].std(0)
    assert deviations == pytest.approx(deviations.mean(), rel=1e-3)  # every one weighs alike
    scaled = (change[train] - change[train].mean(0)) * fitted["scale"]
    ends = np.cumsum(LAYOUT.sizes)[:-1]
    assert [norms(part) for part in np.split(scaled, ends, axis=1)] == pytest.approx([1 / 5] * 5, rel=1e-4)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 2e-3])
def test_axes_are_orthonormal_and_keep_all_that_training_fine_tunes_are_to_each_other(noise):
    drawn = linear_fleet(noise=noise)
    train, _ = split(drawn["test"])
    change = drawn["change"][train]
    fitted = fit_span(change, LAYOUT)
    axes, x = fitted["axes"].astype(np.float64), (change - fitted["mean"]) * fitted["scale"]
    assert np.abs(axes @ axes.T - np.eye(len(axes))).max() < 1e-5
    found = x @ axes.T
    assert found @ found.T == pytest.approx(x @ x.T, abs=2e-4)
    sizes = (found**2).sum(0)
    assert (np.diff(sizes) <= 1e-6).all()  # the leading ones hold most
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert sizes == pytest.approx(singular[: len(sizes)] ** 2, rel=1e-2, abs=1e-5)


def test_rounding_is_no_axis():
    change = linear_fleet(noise=0.0)["change"]
    assert len(fit_span(change, LAYOUT)["axes"]) == BITS + 1


def write_fleet(folder: Path, drawn: Arrays) -> dict[str, np.ndarray]:
    """Condense a fleet as its stage does; return the arrays of its file."""
    metadata = LAYOUT.metadata | {"answers": list(ANSWERS)}
    save_arrays(folder / "models/build_fleet/classes/fleet.safetensors", drawn, metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condense_changes, "FLEETS", ("classes",))
        patch.setattr(condense_changes.pictures, "draw_shares", lambda *_: None)
        start(patch, condense_changes)
    return load_file(folder / "models/condense_changes/classes.safetensors")


def fitted_of(arrays: Arrays) -> Arrays:
    return {name.removeprefix("fitted."): value for name, value in arrays.items() if name.startswith("fitted.")}


def test_a_further_network_is_described_by_the_file_as_those_of_the_fleet(project):
    drawn = linear_fleet()
    arrays = write_fleet(project, drawn)
    for i in (3, 150):
        found = condense(drawn["change"][i : i + 1], drawn["responses"][i : i + 1], LAYOUT, fitted_of(arrays))
        assert_same(found, {name: arrays[name][i : i + 1] for name in found}, 1e-4)
        assert np.abs(found["change"] - arrays["change"][i + 1]).max() > 0.1


def test_of_test_fine_tunes_nothing_is_learned(project):
    drawn = linear_fleet()
    first = write_fleet(project, drawn)
    _, test = split(drawn["test"])
    other = linear_fleet(seed=1)
    changed = {name: values.copy() for name, values in drawn.items()}
    for name in ("change", "responses"):
        changed[name][test] = 100 * other[name][test]
    second = write_fleet(project, changed)
    assert_same(fitted_of(first), fitted_of(second))
    train, _ = split(drawn["test"])
    for name in ("statistics", "spectrum", "low_rank", "change", "responses"):
        np.testing.assert_allclose(first[name][train], second[name][train], rtol=1e-5, atol=1e-5)
        assert np.abs(first[name][test] - second[name][test]).max() > 1
    fitted, again = condensed(drawn), condensed(changed)
    _, decoders = decode_fleet("classes", fitted)
    _, others = decode_fleet("classes", again)
    for name, decoder in decoders.items():
        np.testing.assert_allclose(decoder.weights, others[name].weights, rtol=1e-4, atol=1e-5)
    learned, sources, quality = calibrate(fitted)
    learned_again, sources_again, quality_again = calibrate(again)
    assert_same(learned, learned_again, 1e-4)
    assert sources == sources_again and quality != quality_again


def test_shares_are_those_of_the_squared_change(project):
    drawn = linear_fleet(noise=0.2)
    write_fleet(project, drawn)
    shares = json.loads(Path("reports/condense_changes/summary.json").read_text())["share"]["classes"]
    train, test = split(drawn["test"])
    fitted = fit_span(drawn["change"][train], LAYOUT)
    x = ((drawn["change"] - fitted["mean"]) * fitted["scale"]).astype(np.float64)
    axes = np.linalg.svd(x[train], full_matrices=False)[2]
    for k, share in shares.items():
        for who, rows in (("training", x[train]), ("unseen", x[test])):
            held = ((rows @ axes[: int(k)].T) ** 2).sum() / (rows**2).sum()
            assert share[who] == pytest.approx(held, abs=1e-4), (k, who)
    assert shares["120"]["training"] == pytest.approx(1, abs=1e-4)
    assert shares["120"]["unseen"] < 1 - 1e-3


def test_renaming_hidden_neurons_changes_no_statistics_and_no_spectrum():
    drawn = linear_fleet()
    train, _ = split(drawn["test"])
    order = np.random.default_rng(0).permutation(10)
    ends = np.cumsum(LAYOUT.sizes)[:-1]
    parts = dict(zip(LAYOUT.shapes, np.split(drawn["change"], ends, axis=1), strict=True))
    n = len(drawn["change"])
    parts["first.weight"] = parts["first.weight"].reshape(n, 10, 8)[:, order].reshape(n, -1)
    parts["first.bias"] = parts["first.bias"][:, order]
    parts["second.weight"] = parts["second.weight"].reshape(n, 6, 10)[..., order].reshape(n, -1)
    renamed = np.concatenate(list(parts.values()), 1)
    fitted = fit_condenser(drawn["change"][train], drawn["responses"][train], LAYOUT, ANSWERS)
    first, second = (condense(change, drawn["responses"], LAYOUT, fitted) for change in (drawn["change"], renamed))
    for name in ("statistics", "spectrum", "responses"):
        np.testing.assert_allclose(first[name], second[name], atol=1e-3)
    for name in ("change", "low_rank"):
        assert norms(first[name] - second[name]) > 0.5 * norms(first[name])


def test_outside_is_how_much_of_a_change_no_training_fine_tune_explains():
    drawn = linear_fleet(noise=0.0)
    train, test = split(drawn["test"])
    fitted = fit_span(drawn["change"][train], LAYOUT)
    assert np.abs(outside(drawn["change"][test], fitted)).max() < 1e-4
    random = np.random.default_rng(0)
    mixed = random.dirichlet(np.ones(len(train)), 20).astype(np.float32) @ drawn["change"][train]
    assert np.abs(outside(mixed, fitted)).max() < 1e-4
    strange = draw(random, 200, PARAMETERS) / fitted["scale"]
    found = outside(CENTER + strange, fitted)
    assert found.mean() == pytest.approx(1 - (BITS + 1) / PARAMETERS, abs=0.01)
    # half of the square of one inside, half of the square of one outside
    inside = drawn["change"][test[:1]] - fitted["mean"]
    off = strange[:1] * fitted["scale"]
    off -= off @ fitted["axes"].T @ fitted["axes"]
    off *= np.linalg.norm(inside * fitted["scale"]) / np.linalg.norm(off)
    assert outside(fitted["mean"] + inside + off / fitted["scale"], fitted) == pytest.approx(0.5, abs=1e-3)


def test_the_limit_lets_further_fine_tunes_pass_and_no_stranger():
    drawn = linear_fleet(train=100, test=400)
    train, test = split(drawn["test"])
    limits, fitted = fit_limits(drawn["change"][train], LAYOUT), fit_span(drawn["change"][train], LAYOUT)
    limit, (least, most) = limits["limit"], limits["sizes"]
    sizes = size(drawn["change"][test], fitted)
    assert (sizes < least).mean() < 0.03 and (sizes > most).mean() < 0.03
    assert sizes == pytest.approx(np.sqrt(((drawn["change"][test] * fitted["scale"]) ** 2).sum(1)), rel=1e-5)
    assert most < 3 * least  # no limits that everything passes
    further = outside(drawn["change"][test], fitted)
    assert (further > limit).mean() < 0.02
    assert further.mean() > 0.5 * limit / 2  # no limit that everything passes
    few = linear_fleet(train=20, test=1)["change"][:20]
    left_out = [outside(few[k::5], fit_span(np.delete(few, np.s_[k::5], 0), LAYOUT)).max() for k in range(5)]
    assert fit_limits(few, LAYOUT)["limit"] == pytest.approx(max(left_out))
    random = np.random.default_rng(0)
    wide = draw(random, 100, PARAMETERS) * np.linalg.norm(drawn["change"][0]) / PARAMETERS**0.5
    strangers = outside(fitted["mean"] + wide / fitted["scale"] / np.linalg.norm(wide, axis=1, keepdims=True), fitted)
    assert strangers.min() > limit


# Decoders


def test_a_decoder_is_ridge_regression_and_its_errors_are_of_each_left_out():
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((30, 12)), random.standard_normal((30, 3))
    y = x @ random.standard_normal((12, 3)) + noise * [1.0, 10.0, 100.0]
    decoder = fit_decoder(x, y)
    assert len(set(decoder.alphas)) > 1  # each target's own
    for target, alpha in enumerate(decoder.alphas):
        model = Ridge(alpha=alpha).fit(x, y[:, target])
        assert decoder.predict(x)[:, target] == pytest.approx(model.predict(x), abs=1e-6)
        errors = {}
        for candidate in {alpha, *ALPHAS[::4]}:
            guessed = [
                Ridge(alpha=candidate).fit(np.delete(x, i, 0), np.delete(y[:, target], i)).predict(x[i : i + 1])[0]
                for i in range(30)
            ]
            errors[candidate] = ((guessed - y[:, target]) ** 2).mean()
        assert decoder.errors[target] == pytest.approx(errors[alpha], rel=1e-4)
        assert errors[alpha] == min(errors.values())


def test_a_decoder_that_ignores_weights_is_caught(fleet):
    train, test = split(fleet["test"])
    blind = np.zeros((len(fleet["test"]), 4))
    for name in ("present", "proportions", "log2_size", "mean_image"):
        y = targets(fleet, (name,))
        predicted = fit_decoder(blind[train], y[train]).predict(blind[test])
        found = score(name, predicted, y[test], y[train])
        ignoring = baseline(name, y[test], y[train])
        assert found.keys() == ignoring.keys()
        for measure, value in found.items():
            assert value["mean"] == pytest.approx(ignoring[measure], abs=1e-6)
            if measure == "r2":
                assert ignoring[measure] == 0
            if measure == "retrieved":
                assert ignoring[measure] == 1 / len(test)
            if measure == "bits":
                assert ignoring[measure] == pytest.approx(0.5, abs=0.12)


def test_a_perfect_decoder_has_perfect_scores_and_intervals_are_of_the_fine_tunes(fleet):
    train, test = split(fleet["test"])
    for name in ("present", "proportions", "log2_size", "mean_image"):
        y = targets(fleet, (name,))
        for value in score(name, y[test], y[test], y[train]).values():
            assert value == {"mean": 1.0, "low": 1.0, "high": 1.0}
    random = np.random.default_rng(0)
    true = (random.random((400, 5)) < 0.5).astype(float)
    guessed = np.where(random.random((400, 1)) < 0.2, 1 - true, true)  # all bits of a fifth of them wrong
    found = score("present", guessed, true, true)
    assert found["bits"] == found["whole"]
    half = 1.96 * (0.2 * 0.8 / 400) ** 0.5  # as of 400 fine-tunes, not of 2000 bits
    assert found["bits"]["high"] - found["bits"]["low"] == pytest.approx(2 * half, rel=0.25)
    true[:, 0], guessed = 1, true.copy()
    guessed[:, 0] = 0
    found = score("present", guessed, true, true)
    assert found["bits"]["mean"] == 0.8 and found["whole"]["mean"] == 0


def test_r_squared_is_about_the_mean_that_was_learned_and_retrieval_about_it_too():
    random = np.random.default_rng(0)
    true, mean = random.standard_normal((50, 4)) + 3, np.full(4, 3.0)
    assert r_squared(true + 0.5 * (mean - true), true, mean) == pytest.approx(0.75)
    assert r_squared(2 * mean - true, true, mean) == pytest.approx(-3)
    assert retrieved(mean + 0.1 * (true - mean), true, mean).all()  # direction counts, not size
    assert not retrieved(2 * mean - true, true, mean).any()
    order = random.permutation(50)
    assert (retrieved(true[order], true, mean) == (order == np.arange(50))).all()


def test_characteristics_side_by_side_come_apart_again(fleet):
    names = ("present", "log2_size", "mean_image")
    parts = by_name(targets(fleet, names), fleet, names)
    assert list(parts) == list(names)
    assert_same(parts, {name: fleet[name].astype(np.float64) for name in names})


def test_weights_tell_and_permuted_weights_do_not(fleet):
    found, _ = decode_fleet("classes", fleet)
    bits = int(fleet["test"].sum()) * BITS
    for representation in ("change", "16 components", "responses", "both", "all"):
        assert found["present"][representation]["bits"]["mean"] > 0.95, representation
        assert found["log2_size"][representation]["r2"]["mean"] > 0.8, representation
    assert found["mean_image"]["change"]["retrieved"]["mean"] > 0.9
    assert found["present"]["baseline"]["bits"] == pytest.approx(0.5, abs=binomial(bits))
    control = permuted("classes", fleet, 0)
    for who in ("test", "training"):
        assert control[who]["mean"] == pytest.approx(0.5, abs=binomial(bits)), who
        assert control[who]["n"] == 5
    train, test = split(fleet["test"])
    x, y = read(fleet, "change"), fleet["present"].astype(np.float64)
    predicted = fit_decoder(x[train], y[train]).predict(x[test])
    random = (np.random.default_rng(0).random(y[test].shape) < 0.5).astype(float)
    assert score("present", predicted, random, y[train])["bits"]["mean"] == pytest.approx(0.5, abs=binomial(bits))


def test_a_fleet_whose_changes_tell_nothing_is_decoded_at_chance():
    drawn = linear_fleet()
    random = np.random.default_rng(3)
    shape = drawn["true.present"].shape
    drawn["true.present"] = (random.random(shape) < 0.5).astype(np.float32)
    found, _ = decode_fleet("classes", condensed(drawn))
    for representation in REPRESENTATIONS:
        measured = found["present"][representation]["bits"]["mean"]
        assert measured == pytest.approx(0.5, abs=binomial(60 * BITS)), representation


def test_more_fine_tunes_decode_better_and_the_last_row_is_what_is_reported(fleet):
    params = SimpleNamespace(seed=0, growth=[8, 30, 500], repeats=3)
    rows = growth("classes", fleet, params)
    found, _ = decode_fleet("classes", fleet)
    for representation in ("change", "responses", "both"):
        scores: dict[int, list[float]] = {}
        for row in rows:
            if row["reads"] == representation:
                scores.setdefault(row["fine_tunes"], []).append(row["score"])
        assert {count: len(values) for count, values in scores.items()} == {8: 3, 30: 3, 120: 1}
        assert len(set(scores[8])) > 1
        means = [np.mean(scores[count]) for count in (8, 30, 120)]
        assert means == sorted(means) and means[0] < means[-1] - 0.02
        assert means[-1] == pytest.approx(found["present"][representation]["bits"]["mean"], abs=0.01)


# Calibration


def test_intervals_hold_for_nine_of_ten_and_probabilities_mean_what_they_say():
    covered, errors, blunt = [], [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        weights = random.standard_normal((20, 3))

        def sample(n: int, random=random, weights=weights) -> tuple[np.ndarray, np.ndarray]:
            x = random.standard_normal((n, 20))
            return x, x @ weights + 2 * random.standard_normal((n, 3))

        (x, y), (new_x, new_y) = sample(80), sample(1000)
        decoder = fit_decoder(x, y).calibrate(x, y, binary=False)
        assert decoder.slope_and_offset is None
        predicted = decoder.predict(new_x)
        covered.append((np.abs(predicted - new_y) <= decoder.half_width(predicted)).mean())
        naive = np.quantile(np.abs(decoder.predict(x) - y), 0.9)  # of what it was fitted on
        blunt.append((np.abs(decoder.predict(new_x) - new_y) <= naive).mean())
        decoder = fit_decoder(x, y > 0).calibrate(x, y > 0, binary=True)
        scores = decoder.predict(new_x)
        errors.append(binary_calibration_error(decoder.probabilities(scores).ravel(), (new_y > 0).ravel()))
    assert 0.88 < np.mean(covered) < 0.93
    assert all(0.8 < share < 0.97 for share in covered)
    assert np.mean(blunt) < np.mean(covered) - 0.03
    assert np.mean(errors) < 0.03


def test_the_audit_s_decoders_keep_what_they_promise_on_a_fleet():
    fleet = condensed(linear_fleet(train=120, test=600, noise=2.0))
    arrays, sources, quality = calibrate(fleet)
    _, test = split(fleet["test"])
    assert set(sources) == set(recover_memory.AUDITED)
    assert quality["present"]["calibration_error"] < 0.03
    for key in ("log2_size", "label_noise"):
        assert 0.84 < quality[key]["coverage"] < 0.96
        x = read(fleet, sources[key])[test]
        predicted = x @ arrays[f"{key}.weights"] + arrays[f"{key}.offset"]
        widths = arrays[f"{key}.half_widths"][np.digitize(predicted, arrays[f"{key}.edges"])]
        inside = np.abs(predicted - fleet[key][test]) <= widths
        assert quality[key]["coverage"] == pytest.approx(inside.mean(), abs=1e-6)
    deaf = dict(fleet)
    deaf["responses"] = draw(np.random.default_rng(0), *fleet["responses"].shape) / 10
    _, sources, _ = calibrate(deaf)
    assert all("responses" not in REPRESENTATIONS[sources[key]] for key in ("present", "log2_size"))


# Images from answers


def picture_params(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 0, "image_steps": 250, "judge_steps": 120, "batch_size": 32, **changes})


def test_alignment_alone_answers_alike_and_pixels_make_it_look_alike():
    patterns, mixing = torch.randn(3, 4, 6), torch.randn(24, 3) / 24**0.5
    labels = torch.randint(3, (300,), generator=seeded())
    patches = patterns[labels] + 0.3 * torch.randn(300, 4, 6)

    def answer(x: Tensor) -> Tensor:
        return x.flatten(1) @ mixing

    asked, errors = answer(patches), {}
    for weight in (0.0, 1.0):
        made = train_image_decoder(answer, patches, weight, picture_params())(asked)
        errors[weight] = {
            "answers": (answer(made) - asked).square().mean().item(),
            "pixels": (made - patches).square().mean().item(),
        }
    assert errors[0.0]["answers"] < errors[1.0]["answers"] < 0.1 * asked.var().item()
    assert errors[1.0]["pixels"] < 0.5 * errors[0.0]["pixels"]
    assert errors[1.0]["pixels"] < (patches - patches.mean(0)).square().mean().item()
    again = train_image_decoder(answer, patches, 1.0, picture_params())(asked)
    assert (again - patches).square().mean().item() == pytest.approx(errors[1.0]["pixels"], rel=1e-6)

    judge = train_judge(patches, labels, 3, picture_params())
    held_out = patterns[labels] + 0.3 * torch.randn(300, 4, 6)
    assert (judge(held_out).argmax(1) == labels).double().mean() > 0.95


# The map from rules to weights


def test_a_map_writes_what_is_linear_in_the_cells_for_rules_never_seen():
    random = np.random.default_rng(0)
    order = random.permutation(256)
    seen, unseen = TABLES[order[:180]], TABLES[order[180:]]
    effect, offset = random.standard_normal((CELLS, 50)), random.standard_normal(50)

    def changes(tables: np.ndarray) -> np.ndarray:
        return (2 * tables - 1) @ effect + offset

    def error(reads: str, true=changes) -> float:
        written = fit_map(seen, true(seen), reads, 1e-3)(unseen)
        return ((written - true(unseen)) ** 2).sum() / ((true(unseen) - true(seen).mean(0)) ** 2).sum()

    assert error("cells") < 1e-6
    assert error("cells and pairs") < 1e-4
    pairs = random.standard_normal((CELLS * (CELLS + 1) // 2, 50))

    def bent(tables: np.ndarray) -> np.ndarray:
        return table_features(tables, "cells and pairs")[:, CELLS:] @ pairs

    assert error("cells", bent) > 0.5
    assert error("cells and pairs", bent) < 0.01


def test_pairs_are_products_of_the_coefficients_of_parities():
    features = table_features(TABLES, "cells and pairs")
    assert np.array_equal(table_features(TABLES, "cells"), 2 * TABLES - 1)
    for i in (1, 77, 200):
        signs = [1 if cell else -1 for cell in TABLES[i]]
        coefficients = []
        for mask in range(CELLS):
            parity = [(-1) ** sum((mask >> b & 1) * (cell >> b & 1) for b in range(3)) for cell in range(CELLS)]
            coefficients.append(sum(s * p for s, p in zip(signs, parity, strict=True)) / CELLS)
        products = [coefficients[a] * coefficients[b] for a in range(CELLS) for b in range(a, CELLS)]
        assert features[i] == pytest.approx([*signs, *products])
        assert sum(c * c for c in coefficients) == pytest.approx(1)


def test_the_nearest_rule_differs_in_the_fewest_cells():
    trained, asked = TABLES[10:200:7], TABLES[[0, 3, 99, 255]]
    for rule, place in zip(asked, nearest(trained, asked), strict=True):
        assert (trained[place] != rule).sum() == min((table != rule).sum() for table in trained)


def rule_fleet(noise=0.2) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Changes half of what follows their rule best; and how a change follows from a rule's signs."""
    random = np.random.default_rng(0)
    order = random.permutation(np.arange(1, 255))
    tables = TABLES[np.concatenate([random.choice(order[60:], 150), order[:40]])]
    effect = random.standard_normal((CELLS, 30))
    change = 0.5 * (2 * tables - 1) @ effect + noise * random.standard_normal((190, 30))
    return {
        "true.table": tables.astype(np.float32),
        "change": change.astype(np.float32),
        "test": np.arange(190) >= 150,
    }, effect


def test_rules_that_are_chosen_on_are_not_learned_from_and_test_rules_never_are(monkeypatch):
    fleet, effect = rule_fleet()
    cells = torch.arange(CELLS)
    images = Images({"base": (torch.zeros(CELLS, 1, 1), cells)}, (torch.ones(CELLS, 1, 1), cells), torch.zeros(1))
    fitted, measured = [], []

    def run(_objective, changes, on, labels) -> np.ndarray:
        """How near a network is to the one that follows its rule best."""
        measured.append((bool(on[0].any()), labels.numpy(), changes))
        ideal = (2 * labels.numpy() - 1) @ effect
        return 1 - ((changes - ideal) ** 2).sum(1) / (ideal**2).sum(1)

    def spy(tables, changes, reads, penalty, fit=fit_map):
        fitted.append({tuple(row) for row in tables})
        return fit(tables, changes, reads, penalty)

    monkeypatch.setattr(map_weight_space, "accuracy", run)
    monkeypatch.setattr(map_weight_space, "fit_map", spy)
    params = SimpleNamespace(seed=0, validation_share=0.2, scales=[0.5, 1.0, 2.0, 3.0], evaluation_images=100)
    found = map_weight_space.write_rules(fleet, None, images, params)

    tables = [tuple(row) for row in fleet["true.table"].astype(float)]
    trained, tested = set(tables[:150]), set(tables[150:])
    held = {tuple(row) for reported, rules, _ in measured if not reported for row in rules.astype(float)}
    assert len(held) == round(0.2 * len(trained)) and held < trained
    maps = len(map_weight_space.READS) * len(map_weight_space.PENALTIES)
    tried = (maps + 1) * len(params.scales)  # and the averages that are copied
    assert [reported for reported, _, _ in measured[: tried + 1]] == [False] * tried + [True]
    assert all(reported for reported, _, _ in measured[tried:])
    assert all(not rules & held and rules == trained - held for rules in fitted[:-1]) and len(fitted) == maps + 1
    assert fitted[-1] == trained and not trained & tested
    asked = {tuple(row) for reported, rules, _ in measured if reported for row in rules.astype(float)}
    assert asked == tested
    assert found["scale"] == 2.0
    by = {name: value["mean"] for name, value in found["accuracy"].items()}
    assert by["written"] > 0.95 > by["nearest trained rule, copied"]
    assert by["written"] > by["nearest trained rules, averaged"] > by["nearest trained rule, copied"]
    assert by["base"] == 0 and by["written for another rule"] < 0
    assert by["trained on the rule"] == pytest.approx(0.74, abs=0.1)  # half of the way
    assert found["written minus nearest"]["mean"] == pytest.approx(by["written"] - by["nearest trained rule, copied"])
    assert by["constant answer"] == pytest.approx(np.mean([max(np.mean(t), 1 - np.mean(t)) for t in tested]), abs=1e-6)
    assert found["change_r2"] > 0.8


def test_cosines_of_changes_are_the_agreement_of_their_rules_where_changes_are_linear():
    fleet, _ = rule_fleet(noise=0.0)
    orthogonal = np.linalg.qr(np.random.default_rng(1).standard_normal((30, CELLS)))[0].T
    fleet["true.table"] = np.concatenate([TABLES, TABLES[1:40]]).astype(np.float32)  # balanced: centred by itself
    fleet["change"] = (5 + (2 * fleet["true.table"] - 1) @ orthogonal).astype(np.float32)
    fleet["test"] = np.arange(295) >= 256
    found, pairs = rule_geometry(fleet)
    assert pairs["cosine"] == pytest.approx(pairs["agreement"], abs=1e-4)
    assert found["correlation"] == pytest.approx(1)
    assert found["same rule"] == pytest.approx(1, abs=1e-4)
    assert found["opposite rule"] == pytest.approx(-1, abs=1e-4)


RECIPE = Recipe(n_images=(16, 32), label_noise=(0.0, 0.0), steps=(2, 4), learning_rate=(1e-3, 1e-2))


def pair_params(**changes) -> SimpleNamespace:
    given = {"seed": 0, "validation_pairs": 2, "test_pairs": 5, "classes_each": 3, "batch_size": 4, "recipe": RECIPE}
    return SimpleNamespace(**{**given, "scales": [0.5, 1.0, 2.0], **changes})


def test_pairs_are_disjoint_and_the_third_is_their_union():
    tasks = draw_pairs(pair_params(), TRAIN.labels)
    assert len(tasks) == 21
    sets = [set(task.characteristics["present"].nonzero()[0]) for task in tasks]
    for a, b, union in zip(sets[0::3], sets[1::3], sets[2::3], strict=True):
        assert len(a) == len(b) == 3 and not a & b and union == a | b
    assert len({tuple(sorted(part)) for part in sets[0::3]}) > 3
    assert all(set(TRAIN.labels[t.images].tolist()) == s for t, s in zip(tasks, sets, strict=True))
    assert len({task.name for task in tasks}) == 21
    assert all(task.test for task in tasks)


def test_the_scale_of_sums_is_chosen_on_other_pairs_than_are_reported(monkeypatch):
    vectors = torch.linalg.qr(torch.randn(20, 8))[0].T
    asked = []

    def train(stack: list[Task], *_) -> tuple[Tensor, Tensor, None]:
        present = torch.stack([torch.from_numpy(task.characteristics["present"]) for task in stack])
        return torch.zeros(len(stack), 20), present @ vectors, None

    def run(_objective, changes, _on, _labels, counted) -> np.ndarray:
        """How near a change is to 2 of the union's: the scale that is best; of the two other classes nothing is known."""
        asked.append(len(changes))
        if (counted.sum(1) == 2).all():
            return np.zeros(len(changes))
        return -((changes - 2 * counted.numpy()[:, :8] @ vectors.numpy()) ** 2).sum(1)

    monkeypatch.setattr(map_weight_space, "train_tasks", train)
    monkeypatch.setattr(map_weight_space, "accuracy", run)
    y = torch.arange(8)
    images = Images({"test": (torch.zeros(0), TRAIN.labels)}, (torch.zeros(8, 1, 1), y), torch.zeros(0))
    objective = SimpleNamespace(start=torch.zeros(1))
    found = map_weight_space.add_and_negate(objective, images, pair_params())
    assert asked == [2] * 2 * 3 + [5] * (5 + 4 + 2 * 5)
    assert found["scale"] == 2.0
    on = {name: value["mean"] for name, value in found["on the union"].items()}
    assert on["sum"] == pytest.approx(0, abs=1e-5) and on["base"] == pytest.approx(-24, abs=1e-3)
    assert on["A"] == pytest.approx(-15, abs=1e-3) and on["trained on the union"] == pytest.approx(-6, abs=1e-3)
    # of A, which is taken away, nothing is left; B stays
    taken = {name: value["mean"] for name, value in found["negation"].items()}
    assert taken["union - A, on B"] == pytest.approx(-3, abs=1e-3)
    assert taken["union - A, on A"] == pytest.approx(-15, abs=1e-3)
    assert found["cosine"]["sum and union"]["mean"] == pytest.approx(1, abs=1e-5)
    assert found["on the union minus on the others"] == found["on the union"]
    assert found["cosine"]["sum and another union"]["mean"] < 0.95


@torch.no_grad()
@pytest.mark.parametrize("learns", ["labels", "rule"])
def test_accuracy_of_what_is_written_is_that_of_the_network_that_is_run(learns):
    model = autoencoder()
    base = base_of(model)
    images, objective = show_images(base, TRAIN, TEST, 20, 48), Objective(base, learns, 0.75)
    x, y = images.evaluation
    change = 0.3 * torch.randn(25, len(objective.start))  # more than run together
    change[0] = 0
    labels = torch.stack([y] * 25) if learns == "labels" else torch.randint(2, (25, 48))
    counted = (torch.rand(25, 48) < 0.5).float()
    found = accuracy(objective, change.numpy(), (x, y), labels)
    of_some = accuracy(objective, change.numpy(), (x, y), labels, counted)
    for i in (0, 7, 24):
        weights = objective.layout.unflatten(objective.start + change[i])
        model.vit.load_state_dict({**model.vit.state_dict(), **weights})
        tokens = model.vit.forward_features(model.unpatchify(x))
        read_out = tokens[:, 0] if learns == "labels" else tokens.mean(1)
        answers = torch.nn.functional.linear(read_out, *(objective.frozen[name] for name in HEAD))
        given = answers.argmax(1) if learns == "labels" else (answers[:, 0] > 0).long()
        right = (given == labels[i]).double()
        assert found[i] == pytest.approx(right.mean().item(), abs=1e-6)
        assert of_some[i] == pytest.approx(right[counted[i] > 0].mean().item(), abs=1e-6)
    assert len(set(found)) > 1


# The audit, of a small fleet that was trained


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
        patch.setattr(condense_changes.pictures, "draw_shares", lambda *_: None)
        start(patch, build_fleet, variant="classes")
        start(patch, condense_changes)
        decoders, sources, _ = calibrate(recover_memory.load_fleet("classes"))
        save_arrays(
            recover_memory.MODELS / "decoders.safetensors",
            decoders,
            {"reads": sources, "condensed": fingerprint(audit.CONDENSED)},
        )
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
        self.fleet = load_file("models/build_fleet/classes/fleet.safetensors")
        self.network = 61  # a test fine-tune

    def weights(self, factor=1.0) -> dict[str, Tensor]:
        change = torch.from_numpy(self.fleet["change"][self.network])
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
    fleet, i = recover_memory.load_fleet("classes"), checkpoint.network
    decoders, sources = load_file(audit.DECODERS), load_metadata(audit.DECODERS)["reads"]
    assert set(sources) == {"present", "proportions", "log2_size", "label_noise"}
    for name, source in sources.items():
        x = read(fleet, source)[i]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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


def test_an_audit_says_of_what_it_was_read():
    assert audit.gives("responses") == "responses"
    assert audit.gives("change") == audit.gives("statistics and spectrum") == "weights"
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
    fitted = fitted_of(load_file(audit.CONDENSED))
    layout = Layout.from_metadata(load_metadata(audit.CONDENSED))
    train, _ = split(checkpoint.fleet["test"])
    assert float(fitted["limit"]) == pytest.approx(fit_limits(checkpoint.fleet["change"][train], layout)["limit"])
    answer = audit.recall(checkpoint.save(checkpoint.weights()), BASE)
    expected = outside(checkpoint.fleet["change"][checkpoint.network][None], fitted)[0]
    assert answer["outside"] == pytest.approx(expected, abs=1e-4)
    assert 0.01 < answer["outside"] < answer["limit"] == float(fitted["limit"])
    moved = layout.flatten(checkpoint.weights()) - layout.flatten(checkpoint.base.trained)
    assert np.allclose(moved, checkpoint.fleet["change"][61], atol=1e-6)
