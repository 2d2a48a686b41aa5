"""The card says of which code a report is, and what was changed of it."""

import subprocess
from pathlib import Path

import pytest

from stages.report import card


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of a project, in the working folder."""
    (tmp_path / "stages").mkdir()
    for name, text in {
        "params.yaml": "a: 1\n",
        "stages/a.py": "1\n",
        "stages/README.md": "page\n",
        "dvc.lock": "\n",
    }.items():
        (tmp_path / name).write_text(text)
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    date = "2026-01-02T00:00:00"
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=x", f"--date={date}"]):
        subprocess.run(
            ["git", *words], cwd=tmp_path, check=True, env={"GIT_COMMITTER_DATE": date, "PATH": "/usr/bin:/bin"}
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("checkout")
def test_a_commit_is_named_with_its_date():
    assert card.commit().endswith(" of 2026-01-02")
    assert card.scale() == "params.yaml as committed"


def test_what_numbers_depend_on_is_said_to_be_changed_and_nothing_else(checkout):
    (checkout / "dvc.lock").write_text("stages\n")
    (checkout / "stages/README.md").write_text("another page\n")
    assert "changed" not in card.commit()
    (checkout / "stages/a.py").write_text("2\n")
    (checkout / "params.yaml").write_text("a: 2\n")
    assert card.commit().endswith("then changed: params.yaml, stages/a.py")
    assert card.scale() == "params.yaml changed: a: 2"


def test_outside_of_git_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert card.commit().startswith("unknown")
    assert card.scale() == "of params.yaml"


def test_the_machine_has_a_name():
    assert card.machine().endswith("cores")
