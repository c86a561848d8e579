"""The one error of this package that is the caller's to mend, and the end of many of its messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The caller gave something we cannot use.

    The message is one line: the rule, what arrived, what to do. The command line prints it without a traceback
    and ends with exit code 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message, " Did you mean x?", or nothing where nothing is near.

    >>> nearest("guidance", ["top_k", "guidance_scale"])
    ' Did you mean guidance_scale?'
    """
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""
