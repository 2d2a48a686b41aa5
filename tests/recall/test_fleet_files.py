"""A fleet comes back from its file as it went in."""

import numpy as np
import pytest
from known_fleets import assert_same, linear_fleet

from stages.common.stage import InputError
from stages.recall.fleet_files import CondensedFleet, Fleet, save_condensed


@pytest.mark.usefixtures("project")
def test_a_fleet_and_its_condensed_form_are_read_as_they_were_written():
    drawn = linear_fleet(train=5, test=3)
    drawn.scores["before"] = np.arange(8.0)
    drawn.save("classes")
    fleet = Fleet.load("classes")
    assert_same(fleet.truth, drawn.truth)
    assert_same(fleet.scores, drawn.scores)
    for name in ("change", "responses", "mean_image", "test"):
        assert np.array_equal(getattr(fleet, name), getattr(drawn, name))
    assert fleet.metadata == drawn.metadata
    assert fleet.learned.tolist() == [0, 1, 2, 3, 4] and fleet.held_out.tolist() == [5, 6, 7]

    descriptions = {"change": np.ones((8, 2)), "spectrum": np.zeros((8, 1))}
    save_condensed("classes", fleet, descriptions)
    condensed = CondensedFleet.load("classes")
    assert_same(condensed.descriptions, descriptions)
    assert condensed.metadata == fleet.metadata and condensed.truth.keys() == {*fleet.truth, "mean_image"}
    assert condensed.truth["mean_image"].shape == (8, 12) and condensed.truth["log2_size"].shape == (8, 1)
    assert np.array_equal(condensed.held_out, fleet.held_out)


@pytest.mark.usefixtures("project")
def test_a_missing_fleet_says_what_makes_it():
    with pytest.raises(InputError, match=r"fleet\.safetensors is missing: run 'dvc repro build_fleet@rules'"):
        Fleet.load("rules")
    with pytest.raises(InputError, match=r"rules\.safetensors is missing: run 'dvc repro condense_changes'"):
        CondensedFleet.load("rules")
