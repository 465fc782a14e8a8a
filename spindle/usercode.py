"""User code: which files are the user's own, which names their functions use, and where classes set attributes."""

import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from types import CodeType

_INSTALLED = ("site-packages", "dist-packages")


def is_own_file(file: str) -> bool:
    """Whether a file is of the user's own code: of no installed package, and not of Python itself."""
    return not any(name in file for name in _INSTALLED) and not file.startswith(
        tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    )


def names_used(code: CodeType) -> Iterator[str]:
    """Names that code, and functions inside of it, look up among globals and attributes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_used(constant)


def line_of(owner: type, attribute: str) -> str:
    """Where the class sets an attribute, outside of __init__ if it does."""
    try:
        source, first = inspect.getsourcelines(owner)
        file = inspect.getsourcefile(owner) or ""
    except (OSError, TypeError):
        return ""
    name, inside = rf"\.{re.escape(attribute)}\b", r"(\.\w+(\(\))?|\[[^\]]*\])*"
    changes = r"(\s*([-+*/|&]|//|\*\*)?=[^=]|\.(\w+_|append\w*|extend\w*|add|update|pop\w*)\()"
    sets = re.compile(rf"{name}{inside}{changes}|next\([^)]*{name}")
    lines = [first + index for index, text in enumerate(source) if sets.search(text)]
    return f"line {lines[-1]} of {os.path.basename(file)}" if lines else ""
