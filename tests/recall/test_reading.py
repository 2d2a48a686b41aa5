"""A reading tells directions and sizes apart, and needs no more than it was fitted on."""

import numpy as np
import pytest
from known_fleets import LAYOUT, PARAMETERS, RESPONSES, draw, linear_fleet, norms

from stages.recall.reading import READS, Reader, References, read_columns, unit_rows

CLASSES, INPUTS = 3, 5
REFERENCES = References(np.array([0, 1, 2, 0, 1]), draw(np.random.default_rng(3), RESPONSES), CLASSES)


@pytest.fixture(scope="module")
def fitted() -> tuple[Reader, np.ndarray, np.ndarray]:
    fleet = linear_fleet()
    rows = fleet.learned
    return (
        Reader.fit(fleet.change[rows], fleet.responses[rows], LAYOUT, REFERENCES, 2),
        fleet.change[rows],
        fleet.responses[rows],
    )


def test_a_change_ten_times_as_large_has_the_same_direction_and_shapes(fitted):
    reader, change, responses = fitted
    once, tenfold = reader.read(change, responses), reader.read(10 * change, responses)
    for name in ("direction", "spectra", "quantiles"):
        assert np.allclose(once[name], tenfold[name], atol=1e-6), name
    moved = tenfold["sizes"] - once["sizes"]
    assert np.allclose(moved[:, 1:], 0, atol=1e-6) and np.allclose(moved[:, 0], moved[0, 0]) and moved[0, 0] > 0.1
    base = REFERENCES.responses
    nearer = reader.read(change, base + 0.1 * (responses - base))
    for name in ("answer_change", "token_change"):
        assert np.allclose(once[name], nearer[name], atol=1e-6), name


def test_descriptions_are_centred_and_of_mean_square_norm_one(fitted):
    reader, change, responses = fitted
    described = reader.read(change, responses)
    for name, values in described.items():
        assert np.allclose(values.mean(0), 0, atol=1e-6), name
        assert norms(values) == pytest.approx(1, rel=1e-3), name
    assert set(described) == {name for names in READS.values() for name in names}
    assert read_columns(described, "answers").shape[1] == sum(described[n].shape[1] for n in READS["answers"])


def test_answers_are_averaged_over_the_inputs_of_each_class():
    responses = draw(np.random.default_rng(0), 4, RESPONSES)
    logits, tokens = REFERENCES.by_class(responses)
    each = responses[:, :15].reshape(4, INPUTS, CLASSES)
    assert np.allclose(logits[:, 0], (each[:, 0] + each[:, 3]) / 2) and np.allclose(logits[:, 2], each[:, 2])
    assert np.allclose(tokens[:, 1], responses[:, 15:].reshape(4, INPUTS, 2)[:, [1, 4]].mean(1))


def test_tensors_that_no_fine_tune_moved_are_not_read_and_one_that_some_left_is_zero(fitted):
    _, change, responses = fitted
    still = change.copy()
    still[:, LAYOUT.slices["bias"]] = 0
    still[:10, LAYOUT.slices["first.weight"]] = 0
    reader = Reader.fit(still, responses, LAYOUT, REFERENCES, 2)
    assert reader.tensors == ("first.weight", "first.bias", "second.weight", "patch")
    described = reader.describe(still, responses)
    assert not described["direction"][:10, :4].any() and described["direction"][10:, :4].all()
    assert all(np.isfinite(values).all() for values in reader.read(still, responses).values())
    other = still.copy()
    other[:, LAYOUT.slices["bias"]] = 1e-12
    assert np.allclose(reader.read(other, responses)["direction"], reader.read(still, responses)["direction"])


def test_a_reader_is_read_back(fitted):
    reader, change, responses = fitted
    again = Reader.from_arrays(reader.to_arrays(), list(reader.tensors), LAYOUT, REFERENCES)
    for name, values in reader.read(change, responses).items():
        assert np.allclose(again.read(change, responses)[name], values, atol=1e-4), name


def test_rows_of_zeros_stay_zeros():
    unit, sizes = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert np.allclose(unit, [[0.6, 0.8], [0, 0]]) and np.allclose(sizes, [5, 0])
    assert draw(np.random.default_rng(0), 1, PARAMETERS).shape == (1, LAYOUT.size)
