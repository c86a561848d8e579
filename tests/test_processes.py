import pytest

from isthmus.errors import UserError
from isthmus.processes import process_count


def test_processes_that_a_launcher_started(monkeypatch):
    def launched_with(**variables: str) -> int:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return process_count()

    assert launched_with() == launched_with(WORLD_SIZE="", RANK="") == 1
    assert launched_with(WORLD_SIZE="4", RANK="2", LOCAL_RANK="0") == 4
    with pytest.raises(UserError, match="unset WORLD_SIZE"):
        launched_with(WORLD_SIZE="4")
    with pytest.raises(UserError, match="whole numbers, got WORLD_SIZE=four"):
        launched_with(WORLD_SIZE="four")
