"""What tests share: a folder of their own that holds the project at its smallest scale."""

import shutil
from pathlib import Path

import pytest
import torch
from reproduction import ROOT, scale_overrides, set_params

from stages.common.images import load_images
from stages.common.runtime import pin_threads

LONGEST = ("test_stages_run.py", "test_dvc.py", "test_documents.py")  # a minute and more, each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: begun last, one would go on alone on one core."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with params.yaml at smoke scale; no mirror, no network needed."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_params(tmp_path / "params.yaml", scale_overrides("smoke"))
    monkeypatch.chdir(tmp_path)
    for name in ("WEIGHTLENS_MIRROR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WEIGHTLENS_DEVICE", "cpu")
    load_images.cache_clear()  # its key is a path below the working folder
    return tmp_path


@pytest.fixture(autouse=True)
def as_in_a_stage() -> None:
    """Tests draw the same numbers whatever ran before, and run on one thread."""
    torch.manual_seed(0)
    pin_threads()
