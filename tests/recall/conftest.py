"""What tests of recall share: a small base and its images, and a fleet that is known."""

from pathlib import Path

import pytest
from known_fleets import condensed, linear_fleet
from tiny_vit import TEST, TRAIN, autoencoder, base_of, save_inputs

from stages.recall import build_fleet
from stages.recall.fleet import PatchedImages, patchify_pools
from stages.recall.fleet_files import CondensedFleet
from stages.recall.functional_vit import Base


@pytest.fixture(scope="package")
def base() -> Base:
    return base_of(autoencoder())


@pytest.fixture(scope="package")
def images(base) -> PatchedImages:
    return patchify_pools(base, TRAIN, TEST, 20, 48)


@pytest.fixture(scope="package")
def fleet() -> CondensedFleet:
    return condensed(linear_fleet())


@pytest.fixture
def inputs(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a data set and two bases, whose file is that of an autoencoder and of a classifier in one."""
    save_inputs("train_mae", "classify_masked")
    monkeypatch.setattr(build_fleet.pictures, "draw_fleet", lambda *_: None)
    return project
