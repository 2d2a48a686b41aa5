"""The file of a condensed fleet describes further networks, and nothing in it is learned of test fine-tunes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_fleets import LAYOUT, assert_same, condensed, condenser_of, linear_fleet
from running import start
from safetensors.numpy import load_file

from stages.recall import condense_changes
from stages.recall.condense import Span
from stages.recall.fleet_files import Arrays, Fleet
from stages.recall.recover_memory import decode_fleet


def write_fleet(folder: Path, drawn: Fleet) -> Arrays:
    """Condense a fleet as its stage does; return the arrays of its file."""
    drawn.save("classes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condense_changes, "FLEETS", ("classes",))
        patch.setattr(condense_changes.pictures, "draw_explained_variance", lambda *_: None)
        start(patch, condense_changes)
    return load_file(folder / "models/condense_changes/classes.safetensors")


def test_the_file_holds_what_the_condenser_of_training_fine_tunes_describes(project):
    drawn = linear_fleet()
    arrays, condenser = write_fleet(project, drawn), condenser_of(drawn)
    for i in (3, 150):
        found = condenser.condense(drawn.change[i : i + 1], drawn.responses[i : i + 1])
        assert_same(found, {name: arrays[name][i : i + 1] for name in found}, 1e-4)
        assert np.abs(found["change"] - arrays["change"][i + 1]).max() > 0.1


def test_of_test_fine_tunes_nothing_is_learned(project):
    drawn = linear_fleet()
    first = write_fleet(project, drawn)
    other = linear_fleet(seed=1)
    unlearned = {}
    for name in ("change", "responses"):
        unlearned[name] = np.where(drawn.test[:, None], 100 * getattr(other, name), getattr(drawn, name))
    changed = replace(drawn, **unlearned)
    second = write_fleet(project, changed)
    train, test = drawn.learned, drawn.held_out
    for name in ("statistics", "spectrum", "low_rank", "change", "responses"):
        np.testing.assert_allclose(first[name][train], second[name][train], rtol=1e-5, atol=1e-5)
        assert np.abs(first[name][test] - second[name][test]).max() > 1
    fitted, again = condensed(drawn), condensed(changed)
    _, decoders = decode_fleet("classes", fitted)
    _, others = decode_fleet("classes", again)
    for name, decoder in decoders.items():
        np.testing.assert_allclose(decoder.weights, others[name].weights, rtol=1e-4, atol=1e-5)


def test_shares_are_those_of_the_squared_change(project):
    drawn = linear_fleet(noise=0.2)
    write_fleet(project, drawn)
    shares = json.loads(Path("reports/condense_changes/summary.json").read_text())["explained_variance_ratio"][
        "classes"
    ]
    train, test = drawn.learned, drawn.held_out
    span = Span.fit(drawn.change[train], LAYOUT)
    x = ((drawn.change - span.mean) * span.scale).astype(np.float64)
    axes = np.linalg.svd(x[train], full_matrices=False)[2]
    for k, share in shares.items():
        for who, rows in (("training", x[train]), ("unseen", x[test])):
            held = ((rows @ axes[: int(k)].T) ** 2).sum() / (rows**2).sum()
            assert share[who] == pytest.approx(held, abs=1e-4), (k, who)
    assert shares["120"]["training"] == pytest.approx(1, abs=1e-4)
    assert shares["120"]["unseen"] < 1 - 1e-3
