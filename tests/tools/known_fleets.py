"""Fleets whose changes and responses are known functions of what they were trained on.

Axes: n fine-tunes, w weights of a network.
"""

import numpy as np

from stages.common.vectors import Layout
from stages.recall.condense import Condenser
from stages.recall.fine_tunes import CELLS
from stages.recall.fleet_files import CondensedFleet, Fleet

LAYOUT = Layout(
    {"bias": (6,), "first.weight": (10, 8), "first.bias": (10,), "second.weight": (6, 10), "patch": (4, 3, 2, 2)}
)
PARAMETERS = 204
BITS = 6
ANSWERS = (3, 5)  # classes and reference inputs
RESPONSES = 25  # 15 logits and ten numbers more
TABLES = (np.arange(256)[:, None] >> np.arange(CELLS) & 1).astype(np.float64)  # of all rules


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


WORLD = np.random.default_rng(7)  # how changes and responses follow from what a network was trained on
CENTER, DIRECTIONS = draw(WORLD, PARAMETERS), draw(WORLD, BITS + 1, PARAMETERS)
READ_OUT = draw(WORLD, BITS + 1, RESPONSES)


def linear_fleet(train: int = 120, test: int = 60, noise: float = 0.5, seed: int = 0) -> Fleet:
    """A fleet whose changes and responses are linear in which classes were present and in a size, but for noise."""
    random, n = np.random.default_rng(seed), train + test
    present = (random.random((n, BITS)) < 0.5).astype(np.float32)
    size = draw(random, n, 1)
    causes = np.concatenate([present - 0.5, size], 1)
    truth = {
        "present": present,
        "proportions": present / np.maximum(present.sum(1, keepdims=True), 1),
        "log2_size": size[:, 0],
        "label_noise": np.abs(causes @ DIRECTIONS[:, 0]),
        "table": present,
    }
    return Fleet(
        np.arange(n) >= train,
        change=CENTER + causes @ DIRECTIONS + noise * draw(random, n, PARAMETERS),
        responses=causes @ READ_OUT + noise * draw(random, n, RESPONSES),
        truth=truth,
        mean_image=(causes @ DIRECTIONS[:, :12]).reshape(n, 3, 2, 2),
        scores={},
        metadata=LAYOUT.metadata | {"answers": list(ANSWERS)},
    )


def condenser_of(fleet: Fleet) -> Condenser:
    """The condenser of a fleet's training fine-tunes."""
    return Condenser.fit(fleet.change[fleet.learned], fleet.responses[fleet.learned], LAYOUT, ANSWERS)


def condensed(fleet: Fleet) -> CondensedFleet:
    """What recover_memory reads of a fleet."""
    rows = {"mean_image": fleet.mean_image} | fleet.truth
    return CondensedFleet(
        fleet.test,
        descriptions=condenser_of(fleet).condense(fleet.change, fleet.responses),
        truth={key: values.reshape(len(values), -1) for key, values in rows.items()},
        metadata=fleet.metadata,
    )


def norms(rows: np.ndarray) -> float:
    """The mean square norm of rows."""
    return float((rows.astype(np.float64) ** 2).sum(1).mean())


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)
