"""What the demonstration leaves is a run that can be forecast, and it is left in a folder of its own."""

import pytest

from stages.common.stage import InputError
from stages.forecast import leave_snapshots
from stages.forecast.snapshots import find_snapshots
from stages.forecast.trajectory import WINDOW


def test_snapshots_are_found_in_their_order_and_no_folder_is_filled_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["leave_snapshots", str(tmp_path / "run")])
    leave_snapshots.main()
    found = find_snapshots(tmp_path / "run", WINDOW + 1, None, False)
    assert [path.name for path in found.paths] == [f"step_{step}.pt" for step in range(0, 300, 10)]
    with pytest.raises(InputError, match="is there already"):
        leave_snapshots.main()
