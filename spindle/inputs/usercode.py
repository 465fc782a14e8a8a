"""User code: which files are the user's own, which names their functions use, what functions ask for, and where classes
set attributes.
"""

import inspect
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

_INSTALLED = ("site-packages", "dist-packages")

PAIRS = "named_parameters"
"""A function that makes an optimizer, and whose first argument has this name, gets (name, parameter) pairs."""


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


def arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function, as far as they are known."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some of C have none
        return {}


def takes_names(factory: Callable[..., Any]) -> bool:
    """Whether a function that makes an optimizer wants names with the parameters."""
    return next(iter(arguments(factory)), None) == PAIRS


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
