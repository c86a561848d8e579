"""Class labels as people give them: by name, by index, or none at all."""

import difflib
from collections.abc import Mapping, Sequence

from isthmus.errors import UserError

Label = int | str | None


def names_in_order(class_names: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the classes 0, 1, 2, ...; as text, which is how JSON sorts them, 10 comes before 2.

    Args:
        class_names: index (as text) -> name, in any order; may be empty.

    Raises:
        UserError: the indices are not those of all classes, each once.

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


def resolve_labels(labels: Sequence[Label], *, class_names: Mapping[str, str], num_classes: int) -> list[int]:
    """Class ids of labels; None is the null label, whose id is `num_classes`.

    Args:
        labels: names, indices in 0..num_classes - 1, or None.
        class_names: index (as text) -> name; may be empty.
        num_classes: 0 for a model without classes, which takes None only.

    Raises:
        UserError: a name is unknown (the nearest ones are named) or belongs to several classes, an index is out of
            range, or the model has no classes.

    >>> resolve_labels(["flag", 0, None], class_names={"0": "face", "1": "flag"}, num_classes=2)
    [1, 0, 2]
    """
    return [_resolve(label, class_names, num_classes) for label in labels]


def labels_from_words(words: Sequence[str], class_names: Mapping[str, str]) -> list[Label]:
    """Labels as they are typed: a name, an index, or `null` (or `none`) for no class.

    >>> labels_from_words(["flag", "0", "null"], {"0": "face", "1": "flag"})
    ['flag', 0, None]
    """
    return [_from_word(word, class_names) for word in words]


def _from_word(word: str, class_names: Mapping[str, str]) -> Label:
    if word in class_names.values():
        return word
    if word in ("null", "none"):
        return None
    return int(word) if word.lstrip("-").isdigit() else word


def _resolve(label: Label, class_names: Mapping[str, str], num_classes: int) -> int:
    if label is None:
        return num_classes
    if num_classes == 0:
        raise UserError(f"this model has no classes, got the class {label!r}. Leave out the classes.")
    if isinstance(label, str):
        return _by_name(label, class_names, num_classes)
    if isinstance(label, bool) or not 0 <= label < num_classes:
        raise UserError(f"class ids must lie in 0..{num_classes - 1}, got {label}. None is the null label.")
    return int(label)


def _by_name(label: str, class_names: Mapping[str, str], num_classes: int) -> int:
    found = [int(index) for index, name in class_names.items() if name == label]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"the name {label!r} belongs to the classes {found}. Pass one of these indices instead.")
    if not class_names:
        raise UserError(f"this model's classes have no names, got {label!r}. Pass an index in 0..{num_classes - 1}.")
    names = list(dict.fromkeys(class_names.values()))
    close = difflib.get_close_matches(label, names, n=3, cutoff=0.5)
    some = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
    hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {some}."
    raise UserError(f"this model has no class {label!r}. {hint}")
