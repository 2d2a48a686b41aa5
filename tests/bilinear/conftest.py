"""What tests of bilinear networks share: the digits, where the pipeline has them."""

from pathlib import Path

import pytest

from stages.common.files import save_arrays
from stages.datasets.fetch_data import Digits, fetch_digits


@pytest.fixture
def digits(project: Path) -> Path:
    """The working folder at smoke scale, with data/digits.safetensors."""
    (train_x, train_y), (test_x, test_y), classes = fetch_digits(Digits(kind="digits", test_fraction=0.2, seed=0))
    arrays = {"train_images": train_x, "train_labels": train_y, "test_images": test_x, "test_labels": test_y}
    save_arrays(project / "data/digits.safetensors", arrays, {"classes": classes})
    return project
