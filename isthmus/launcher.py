"""How many processes a launcher such as torchrun started, in the words of its variables."""

import os

from isthmus.errors import UserError


def launched_processes() -> int:
    """Processes that work together; one without a launcher.

    Raises:
        UserError: the variables say that there are several but not which of them this is, or are no numbers.
    """
    variables = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    said = ", ".join(f"{name}={value}" for name, value in variables.items() if value)
    if any(value and not value.isdecimal() for value in variables.values()):
        raise UserError(f"a launcher's variables are whole numbers, got {said}. Unset them, or start with torchrun.")
    count = int(variables["WORLD_SIZE"] or 1)
    if count > 1 and not variables["RANK"]:
        raise UserError(
            f"a launcher that starts several processes numbers them in RANK, got {said} alone. Start "
            "with torchrun or accelerate launch, or unset WORLD_SIZE for a single process."
        )
    return max(count, 1)
