"""How tests call a stage as its command line does."""

from types import ModuleType

import pytest


def start(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **items: str) -> None:
    """Call a stage's main() with one `--item value` for each keyword."""
    words = [word for name, value in items.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["stage", *words])
    module.main()
