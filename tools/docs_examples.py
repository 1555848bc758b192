"""Extension of griffe for the site: what our docstrings head `Example` is shown as code, as Google's `Examples` are."""

import re

import griffe

_HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Renames the section before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)
