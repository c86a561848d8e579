"""Class labels as people give them: by name, by number, or none at all.

One rule: a whole number is the number of a class, a text is its name. On the command line everything is text, so a word
is a name where a class has it, and else a number; `id:2` and `name:2` say which.
"""

import difflib
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from isthmus.errors import UserError

logger = logging.getLogger("isthmus")

Label = SupportsIndex | str | None
"""A whole number of any make, a name, or None for no class."""
_NO_CLASS = ("null", "none")


def listed_names(names: Sequence[str], shown: int = 20) -> str:
    """Names with commas between them; one that has a comma stands in quotes.

    >>> listed_names(["tench, Tinca tinca", "face"])
    "'tench, Tinca tinca', face"
    """
    return ", ".join(repr(name) if "," in name else name for name in names[:shown])


def whole_number(value: object, name: str) -> int:
    """A whole number of any make (Python's, numpy's, torch's) as Python's own; UserError for anything else.

    >>> whole_number(7, "seed")
    7
    """
    if "bool" not in str(getattr(value, "dtype", type(value).__name__)):
        try:
            return operator.index(value)  # pyright: ignore[reportArgumentType]  the error is what is asked for
        except (TypeError, RuntimeError, ValueError):
            pass
    raise UserError(f"{name} must be a whole number, got {value!r}. Pass an integer.")


def elements(values: object) -> list[Any] | None:
    """The elements of a list, an array or a tensor; None for a single value."""
    values = getattr(values, "tolist", lambda: values)()  # numpy's and torch's
    return list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else None


def label_list(class_labels: object) -> list[Any]:
    """Labels as a list, whichever way they were given; `resolve_labels` says which of them are none."""
    several = elements(class_labels)
    return [class_labels] if several is None else several


def names_in_order(class_names: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the classes 0, 1, 2, ... of a mapping of index (as text) to name; JSON sorts 10 before 2.

    Raises UserError where the indices are not those of all classes, each once.

    >>> names_in_order({"0": "face", "10": "k", "1": "b"} | {str(i): str(i) for i in range(2, 10)})[-1]
    'k'
    """
    wanted = [str(index) for index in range(len(class_names))]
    if set(class_names) != set(wanted):
        strange = next(index for index in class_names if index not in wanted)
        raise UserError(
            f"class names are listed by the numbers 0..{len(wanted) - 1}, each once, got {strange!r}. Pass one name "
            "per class, in the order of the class ids."
        )
    return tuple(class_names[index] for index in wanted)


def resolve_labels(labels: object, *, class_names: Mapping[str, str], num_classes: int) -> list[int]:
    """Class ids of labels (one or several: names, whole numbers or None); the id of None is `num_classes`.

    `class_names` maps the index (as text) to the name, and may be empty. Raises UserError where a name is unknown (the
    nearest ones are named) or belongs to several classes, a number is out of range or none, or there are no classes.

    >>> resolve_labels(["flag", 0, None], class_names={"0": "face", "1": "flag"}, num_classes=2)
    [1, 0, 2]
    """
    return [_resolve(label, class_names, num_classes) for label in label_list(labels)]


def labels_from_words(words: Sequence[str], class_names: Mapping[str, str]) -> list[Label]:
    """Labels as they are typed: a name, a number, or `null` (or `none`) for no class.

    A word that is a name and could be a number or null as well is the name. `id:2` is the class numbered 2, `id:null`
    no class, `name:2` the class named 2. Raises UserError where what follows `id:` is no number.

    >>> labels_from_words(["flag", "0", "null", "id:1"], {"0": "face", "1": "flag"})
    ['flag', 0, None, 1]
    """
    return [_from_word(word, class_names) for word in words]


def _from_word(word: str, class_names: Mapping[str, str]) -> Label:
    kind, colon, rest = word.partition(":")
    if word in class_names.values():
        number = _number(word)
        if number is not None and class_names.get(str(number), word) != word:
            logger.info("the class %s is the one named so; the one numbered %d is id:%d", word, number, number)
        return word
    if colon and kind == "name":
        return rest
    if colon and kind == "id":
        if rest not in _NO_CLASS and _number(rest) is None:
            raise UserError(f"id: is followed by the number of a class, got {word}. A name is written name:{rest}.")
        word = rest
    if word in _NO_CLASS:
        return None
    number = _number(word)
    return word if number is None else number


def _number(word: str) -> int | None:
    return int(word) if word.removeprefix("-").isdecimal() else None


def _resolve(label: object, class_names: Mapping[str, str], num_classes: int) -> int:
    if label is None:
        return num_classes
    if num_classes == 0:
        raise UserError(f"this model has no classes, got the class {label!r}. Leave out the classes.")
    if isinstance(label, str):
        return _by_name(str(label), class_names, num_classes)
    number = whole_number(label, f"a class is a name, or its number in 0..{num_classes - 1}, which")
    if not 0 <= number < num_classes:
        raise UserError(f"class ids must lie in 0..{num_classes - 1}, got {number}. None is the null label.")
    return number


def _by_name(label: str, class_names: Mapping[str, str], num_classes: int) -> int:
    found = [int(index) for index, name in class_names.items() if name == label]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"the name {label!r} belongs to the classes {found}. Pass one of these numbers instead, on the "
            "command line as id:NUMBER."
        )
    if not class_names:
        raise UserError(f"this model's classes have no names, got {label!r}. Pass an index in 0..{num_classes - 1}.")
    names = list(dict.fromkeys(class_names.values()))
    # one of several names of a class: "tench, Tinca tinca"
    close = [name for name in names if label in name.split(", ")][:3]
    close = close or difflib.get_close_matches(label, names, n=3, cutoff=0.5)
    some = listed_names(names, 12) + (" ..." if len(names) > 12 else "")
    quoted = (repr(name) if "," in name else name for name in close)
    hint = f"Did you mean {' or '.join(quoted)}?" if close else f"It has {some}."
    raise UserError(f"this model has no class {label!r}. {hint}")
