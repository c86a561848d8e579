"""Arguments of a network as a part of a run, read off its constructor: the one place that declares them.

The constructor is read as text. Importing its module would import torch, which takes seconds, and presets and the
command line are derived from runs.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, make_dataclass
from importlib.util import find_spec
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin

from typing_extensions import Doc

_TYPES = {"bool": bool, "float": float, "int": int, "str": str, "Literal": Literal, "Sequence": Sequence}


def arguments_of(place: str, names: Sequence[str], **types: Any) -> Any:
    """A frozen dataclass to derive from: those arguments of a constructor that a run may set, all None at first.

    None leaves an argument to the constructor, or to the model that is gone on from. Sequences are tuples, as they are
    on the command line, whose help is what the docstring says of an argument: each of these needs its line there.

    Args:
        place: module, colon, class or function.
        names: arguments to take, in this order.
        types: what names in annotations mean, beside those of Python.

    Raises:
        ValueError: there is no such argument.

    >>> sizes = arguments_of("isthmus.next_scale.tokenizer:MultiScaleVQVAE", ["codebook_size", "scale_sizes"])
    >>> sizes(scale_sizes=(1, 2))
    MultiScaleVQVAE(codebook_size=None, scale_sizes=(1, 2))
    """
    declared = dict(_declared(place))
    if unknown := [name for name in names if name not in declared]:
        raise ValueError(f"{place} has no argument {unknown[0]}, it has {', '.join(declared)}.")
    fields = []
    for name in names:
        annotation, about = declared[name]
        hint = eval(annotation, {**_TYPES, **types})
        hint = tuple[get_args(hint)[0], ...] if get_origin(hint) is Sequence else hint
        fields.append((name, Annotated[hint | None, Doc(about)], None))
    return make_dataclass(place.split(":")[1], fields, frozen=True, kw_only=True)


def given(settings: Any) -> dict[str, Any]:
    """The arguments that a run sets."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


def _declared(place: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name of every argument, its type as it is written, and what is said of it."""
    module, name = place.split(":")
    spec = find_spec(module)
    source: Any = spec.loader if spec else None
    tree = ast.parse(source.get_source(module))
    found = next(node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name)
    inner = (node for node in ast.walk(found) if isinstance(node, ast.FunctionDef))
    function = found if isinstance(found, ast.FunctionDef) else next(n for n in inner if n.name == "__init__")
    about = _args_section(ast.get_docstring(found) or "")
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if argument.annotation is not None:
            yield argument.arg, (ast.unparse(argument.annotation), about.get(argument.arg, ""))


def _args_section(docstring: str) -> dict[str, str]:
    r"""What the section Args says of each name, as sentences.

    >>> _args_section("Head.\n\nArgs:\n    width: of the\n        stream.\n\nRaises:\n    UserError: no.")
    {'width': 'Of the stream.'}
    """
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", docstring + "\n", re.MULTILINE)
    text = dedent(section[1]) if section else ""
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", text, re.MULTILINE)
    return {name: said[:1].upper() + " ".join(said.split())[1:] for name, said in entries}
