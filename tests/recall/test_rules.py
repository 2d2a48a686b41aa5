"""The map from rules to weights."""

import numpy as np
import pytest
import torch
from known_fleets import TABLES

from stages.recall import rules
from stages.recall.fine_tunes import CELLS
from stages.recall.fleet import PatchedImages
from stages.recall.fleet_files import Fleet
from stages.recall.rules import PENALTIES, READS, fit_map, nearest, rule_geometry, table_features, write_rules


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
    assert error("cells_and_pairs") < 1e-4
    pairs = random.standard_normal((CELLS * (CELLS + 1) // 2, 50))

    def bent(tables: np.ndarray) -> np.ndarray:
        return table_features(tables, "cells_and_pairs")[:, CELLS:] @ pairs

    assert error("cells", bent) > 0.5
    assert error("cells_and_pairs", bent) < 0.01


def test_pairs_are_products_of_the_coefficients_of_parities():
    features = table_features(TABLES, "cells_and_pairs")
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


def fleet_of(tables: np.ndarray, change: np.ndarray, test: np.ndarray) -> Fleet:
    return Fleet(
        test,
        change=change.astype(np.float32),
        responses=change[:, :0],
        truth={"table": tables.astype(np.float32)},
        mean_image=change[:, :0],
        scores={},
        metadata={},
    )


def rule_fleet(noise=0.2) -> tuple[Fleet, np.ndarray]:
    """Changes half of what follows their rule best; and how a change follows from a rule's signs."""
    random = np.random.default_rng(0)
    order = random.permutation(np.arange(1, 255))
    tables = TABLES[np.concatenate([random.choice(order[60:], 150), order[:40]])]
    effect = random.standard_normal((CELLS, 30))
    change = 0.5 * (2 * tables - 1) @ effect + noise * random.standard_normal((190, 30))
    return fleet_of(tables, change, np.arange(190) >= 150), effect


def test_rules_that_are_chosen_on_are_not_learned_from_and_test_rules_never_are(monkeypatch):
    fleet, effect = rule_fleet()
    cells = torch.arange(CELLS)
    images = PatchedImages(
        {"base": (torch.zeros(CELLS, 1, 1), cells)}, (torch.ones(CELLS, 1, 1), cells), torch.zeros(1)
    )
    fitted, measured = [], []

    def run(_objective, changes, on, labels) -> np.ndarray:
        """How near a network is to the one that follows its rule best."""
        measured.append((bool(on[0].any()), labels.numpy(), changes))
        ideal = (2 * labels.numpy() - 1) @ effect
        return 1 - ((changes - ideal) ** 2).sum(1) / (ideal**2).sum(1)

    def spy(tables, changes, reads, penalty, fit=fit_map):
        fitted.append({tuple(row) for row in tables})
        return fit(tables, changes, reads, penalty)

    monkeypatch.setattr(rules, "accuracy", run)
    monkeypatch.setattr(rules, "fit_map", spy)
    scales = [0.5, 1.0, 2.0, 3.0]
    found = write_rules(fleet, None, images, scales, validation_fraction=0.2, validation_images=100, seed=0)

    tables = [tuple(row) for row in fleet.truth["table"].astype(float)]
    trained, tested = set(tables[:150]), set(tables[150:])
    held = {tuple(row) for reported, followed, _ in measured if not reported for row in followed.astype(float)}
    assert len(held) == round(0.2 * len(trained)) and held < trained
    maps = len(READS) * len(PENALTIES)
    tried = (maps + 1) * len(scales)  # and the averages that are copied
    assert [reported for reported, _, _ in measured[: tried + 1]] == [False] * tried + [True]
    assert all(reported for reported, _, _ in measured[tried:])
    assert all(not seen & held and seen == trained - held for seen in fitted[:-1]) and len(fitted) == maps + 1
    assert fitted[-1] == trained and not trained & tested
    asked = {tuple(row) for reported, followed, _ in measured if reported for row in followed.astype(float)}
    assert asked == tested
    assert found["scale"] == 2.0
    by = {name: value["mean"] for name, value in found["accuracy"].items()}
    assert by["written"] > 0.95 > by["nearest_copied"]
    assert by["written"] > by["nearest_averaged"] > by["nearest_copied"]
    assert by["base"] == 0 and by["written_for_another"] < 0
    assert by["trained"] == pytest.approx(0.74, abs=0.1)  # half of the way
    assert found["written_minus_nearest"]["mean"] == pytest.approx(by["written"] - by["nearest_copied"])
    assert by["constant"] == pytest.approx(np.mean([max(np.mean(t), 1 - np.mean(t)) for t in tested]), abs=1e-6)
    assert found["change_r2"] > 0.8


def test_cosines_of_changes_are_the_agreement_of_their_rules_where_changes_are_linear():
    orthogonal = np.linalg.qr(np.random.default_rng(1).standard_normal((30, CELLS)))[0].T
    tables = np.concatenate([TABLES, TABLES[1:40]])  # balanced: centred by itself
    found, pairs = rule_geometry(fleet_of(tables, 5 + (2 * tables - 1) @ orthogonal, np.arange(295) >= 256))
    assert pairs["cosine"] == pytest.approx(pairs["agreement"], abs=1e-4)
    assert found["correlation"] == pytest.approx(1)
    assert found["same_rule"] == pytest.approx(1, abs=1e-4)
    assert found["opposite_rule"] == pytest.approx(-1, abs=1e-4)
