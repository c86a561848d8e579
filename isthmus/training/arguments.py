"""Arguments of a network as a part of a run, read off its constructor: the one place that declares them.

The constructor is read as text: importing its module would import torch, and the command line is derived from runs.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import asdict, field, make_dataclass
from importlib.util import find_spec
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin

from typing_extensions import Doc

_TYPES = {"bool": bool, "float": float, "int": int, "str": str, "Literal": Literal, "Sequence": Sequence}


def arguments_of(place: str, names: Sequence[str], *, later: Sequence[str] = (), **types: Any) -> Any:
    """A frozen dataclass to derive from: those arguments of a constructor that a run may set, all None at first.

    None leaves an argument to the constructor, or to the model that is gone on from. Sequences become tuples, as on the
    command line, whose help is the line that the docstring has of each.

    Args:
        place: module, colon, class or function.
        names: arguments to take, in this order.
        later: further ones, which runs of before do not have: at None they are left out of run.json.
        types: what names in annotations mean, beside those of Python.

    Raises ValueError where there is no such place or argument.

    >>> sizes = arguments_of("isthmus.next_scale.tokenizer:MultiScaleVQVAE", ["codebook_size", "scale_sizes"])
    >>> sizes(scale_sizes=(1, 2))
    MultiScaleVQVAE(codebook_size=None, scale_sizes=(1, 2))
    """
    declared = _declared(place)
    fields = []
    for name in (*names, *later):
        if name not in declared:
            raise ValueError(f"{place} has no argument {name}, it has {', '.join(declared)}.")
        annotation, about = declared[name]
        hint = eval(annotation, {**_TYPES, **types})
        hint = tuple[get_args(hint)[0], ...] if get_origin(hint) is Sequence else hint
        default = field(default=None, metadata={"later": name in later})
        fields.append((name, Annotated[hint | None, Doc(about)], default))
    return make_dataclass(place.split(":")[1], fields, frozen=True, kw_only=True)


def given(settings: Any) -> dict[str, Any]:
    """The arguments that a run sets."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


def _declared(place: str) -> dict[str, tuple[str, str]]:
    """Name of every argument -> its type as it is written, and what is said of it."""
    module, name = place.split(":")
    spec = find_spec(module)
    source: Any = spec.loader if spec else None
    found = [node for node in ast.parse(source.get_source(module)).body if getattr(node, "name", None) == name]
    inner = [node for top in found for node in ast.walk(top) if isinstance(node, ast.FunctionDef)]
    function = next((f for f in inner if f in found or f.name == "__init__"), None)
    if function is None:
        raise ValueError(f"{place} must be a function, or a class with a constructor of its own.")
    about = _args_section(ast.get_docstring(found[0]) or "")  # pyright: ignore[reportArgumentType]  a class or function
    arguments = (*function.args.args, *function.args.kwonlyargs)
    return {a.arg: (ast.unparse(a.annotation), about.get(a.arg, "")) for a in arguments if a.annotation is not None}


def _args_section(docstring: str) -> dict[str, str]:
    r"""What the section Args says of each name, as sentences.

    >>> _args_section("Head.\n\nArgs:\n    width: of the\n        stream.\n\nRaises:\n    UserError: no.")
    {'width': 'Of the stream.'}
    """
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", docstring + "\n", re.MULTILINE)
    text = dedent(section[1]) if section else ""
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", text, re.MULTILINE)
    return {name: said[:1].upper() + " ".join(said.split())[1:] for name, said in entries}
