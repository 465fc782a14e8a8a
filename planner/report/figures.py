"""Figures: numbers in, their text out, as all reports of the planner print them."""

import re
from math import floor, log10
from textwrap import wrap

WIDTH = 100
INDENT = 11  # of what follows the title of a line
_GLUE = "\x00"  # in place of a space at which no line ends


def seconds(value_s: float) -> str:
    """Three significant digits.

    >>> seconds(0.41234), seconds(12.0), seconds(1234.5), seconds(0.0)
    ('0.412 s', '12.0 s', '1234 s', '0 s')
    """
    return f"{three_digits(value_s)} s"


def three_digits(value: float) -> str:
    """Three significant digits, or all before the point."""
    if not value:
        return "0"
    return f"{value:.{max(0, 2 - floor(log10(abs(value))))}f}"


def counted(value: float) -> str:
    """Three significant digits, with thousands and millions in letters."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= unit:
            return f"{three_digits(value / (1e3 if unit == 1e4 else unit))}{letter}"
    return three_digits(value)


def size(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def clip(text: str, width: int = WIDTH) -> str:
    """The text, cut where it is longer than the width."""
    return text if len(text) <= width else text[: width - 3] + "..."


def titled(title: str, text: str) -> list[str]:
    """Lines of a text beside its title, folded at spaces, though not between a number and its unit."""
    kept = re.sub(r"(?<=\d) (?=(?:s|ms|%|GiB|MiB|k|M|G)\b|%)", _GLUE, text)
    lines = wrap(
        kept,
        WIDTH - 2,  # a command goes on in a line that ends in a backslash
        initial_indent=f"{title:<{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_GLUE, " ") for line in lines]
