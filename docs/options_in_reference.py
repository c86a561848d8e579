"""For mkdocstrings: `Annotated[type, Option(default, text)]` is the type, default and docstring of an option."""

import ast
from typing import Any

import griffe


class OptionTexts(griffe.Extension):
    """Reads `isthmus.pipelines.options.Option` where a typed dictionary declares one."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Give the attribute the text and the default that its annotation holds."""
        match getattr(node, "annotation", None):
            case ast.Subscript(slice=ast.Tuple(elts=[_, ast.Call(func=ast.Name(id="Option"), args=[default, text])])):
                attr.docstring = griffe.Docstring(f"{ast.literal_eval(text)} Default: `{ast.unparse(default)}`.")
                annotation: Any = attr.annotation
                attr.annotation = annotation.slice.elements[0]
