"""User code: which files are the user's own, and which names their functions use."""

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
