"""What long work shows: a bar in a terminal or a notebook, and elsewhere, such as in a file, a line now and then."""

import logging
import sys
import time
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger("isthmus")

# seconds between lines, and between those that wait for the next measurement
_BETWEEN_LINES = 30
_WITHOUT_NEWS = 300


class Display:
    """Counts what is done, of `total` things (None: nobody knows), of which `initial` were done earlier.

    Lines go to the logger `isthmus`, at the level INFO. They begin with the word `what` and tell images per second,
    with `images_each` in every `unit`. Of several processes one is `shown`.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, *, initial: int = 0, images_each: int = 1, shown: bool = True
    ) -> None:
        has_bar = _in_terminal() or _in_notebook()
        self._bar: tqdm[Any] = tqdm(total=total, initial=initial, desc=what, unit=unit, disable=not (shown and has_bar))
        self._what, self._total, self._unit, self._images_each = what, total, unit, images_each
        self._lines = shown and not has_bar
        self._done = self._done_before = initial
        self._values = ""
        # the first measurement is told at once; work that ends soon tells nothing else
        self._last_line, self._told = time.monotonic(), False

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._bar.update(count)
        patience = _WITHOUT_NEWS if self._values else _BETWEEN_LINES
        if self._lines and time.monotonic() - self._last_line > patience:
            self._line()

    def measured(self, values: dict[str, str], *, images: int) -> None:
        """Show what was measured after the last step, and how many images were seen."""
        self._bar.set_postfix(values, images=images)
        self._values = "".join(f", {name} {value}" for name, value in values.items())
        due = not self._told or self._done == self._total
        if self._lines and (due or time.monotonic() - self._last_line > _BETWEEN_LINES):
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        rate = (self._done - self._done_before) / max(now - self._last_line, 1e-9)
        of_all = "" if self._total is None else f"/{self._total}"
        left = "" if self._total is None else f", {duration((self._total - self._done) / max(rate, 1e-9))} left"
        speed = f"{rate * self._images_each:.3g} images/s"
        logger.info("%s: %s %d%s, %s%s%s", self._what, self._unit, self._done, of_all, speed, self._values, left)
        self._last_line, self._done_before, self._told = now, self._done, True

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """A time in its largest fitting unit.

    >>> duration(59.6), duration(150), duration(3600 * 30), duration(86400 * 3)
    ('60 s', '2 min', '30.0 h', '3.0 days')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def _in_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
