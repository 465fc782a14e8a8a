"""Nearest: an unknown name and the known ones in; the likely meant one out, for messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words that follow a wrong name in a message; "" where no known name is close.

    >>> did_you_mean("hiden", ["hidden", "heads"]), did_you_mean("optimizer", ["heads"])
    (" (did you mean 'hidden'?)", '')
    """
    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(name.lower(), by_lower, 1, 0.7)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
