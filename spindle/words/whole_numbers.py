"""Whole numbers: what a user gives where steps or samples are counted in; an error where it is none out."""

import operator
from collections.abc import Mapping

from spindle.errors import InputError


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number of any type (True and False are none), at least `least`.

    >>> is_whole(3, 1), is_whole(1.5, 1), is_whole("3", 1), is_whole(0, 1), is_whole(True, 1)
    (True, False, False, False, False)
    """
    if isinstance(value, bool):
        return False
    try:
        return operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        return False


def check_whole(given: Mapping[str, object], least: int = 1, *, error: type[InputError] = InputError) -> None:
    """Raise `error` for the first of these, by name, that is neither None nor a whole number of at least `least`."""
    for name, value in given.items():
        if value is not None and not is_whole(value, least):
            raise error(f"{name} is {value!r}; give a whole number, {least} or more")
