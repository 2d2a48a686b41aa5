"""The published auditor is what its card says, small, and works where nothing was reproduced."""

import json
import shutil
from pathlib import Path

from reproduction import ROOT

from stages.common.work import fingerprint
from stages.recall import audit

FOLDER = ROOT / audit.RELEASED


def test_its_files_are_those_of_its_card_and_less_than_a_megabyte():
    card = json.loads((FOLDER / "auditor.json").read_text())
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()} - {"auditor.json"}
    assert files == set(card["sha256"])
    for name, sha256 in card["sha256"].items():
        assert fingerprint(FOLDER / name) == sha256, name
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1e6


def test_it_recalls_its_examples_in_an_empty_folder(tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(FOLDER, tmp_path / audit.RELEASED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["audit", "--example"])
    audit.main()
    text, notes = capsys.readouterr()
    assert "the published auditor is used" in notes and "none was made here" in notes
    assert "refused: " in text and "is turned round" in text and "not refused" not in text
    card = json.loads((FOLDER / "auditor.json").read_text())
    auditor = audit.Auditor.load(audit.RELEASED / audit.FILE)
    base = audit.load_base(audit.RELEASED / "base.safetensors")
    right = []
    for kind, read in (("whole", audit.read_change), ("adapter", audit.read_adapter)):
        path = audit.RELEASED / "examples" / ("adapter" if kind == "adapter" else "whole.safetensors")
        answer = audit.recall(read(path, base), str(path), kind, auditor, base)
        truth = card["examples"][kind]["true"]["present"]
        told = [found["probability"] > 0.5 for found in answer["present"]["found"].values()]
        right += [a == (b > 0.5) for a, b in zip(told, truth, strict=True)]
        values = [*answer["proportions"]["found"].values(), *answer["images"]["found"].values()]
        assert all(part["low"] < part["high"] for part in values)
    assert sum(right) >= 18  # of 20 bits: by guessing 10
