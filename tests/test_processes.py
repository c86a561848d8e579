import pytest

from isthmus.errors import UserError
from isthmus.processes import process_count


@pytest.mark.parametrize(
    ("variables", "count", "message"),
    [
        ({}, 1, ""),
        ({"WORLD_SIZE": "", "RANK": ""}, 1, ""),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, 4, ""),
        ({"WORLD_SIZE": "4"}, 0, "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "four"}, 0, "whole numbers, got WORLD_SIZE=four"),
    ],
)
def test_processes_that_a_launcher_started(monkeypatch, variables, count, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not message:
        assert process_count() == count
        return
    with pytest.raises(UserError, match=message):
        process_count()
