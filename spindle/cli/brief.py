"""Brief: the text of an error as one to three lines of fewer than 100 columns.

- Lines are wrapped at spaces. A word that is wider than a line, most often a path, loses its middle.
- In a longer text shorter words lose their middle, too, and then the text itself: its beginning says what is wrong,
  and what follows the last semicolon is the remedy.
- `SPINDLE_DEBUG=1` shows the whole text.
"""

import textwrap

COLUMNS = 99
ROWS = 3
_MORE = "  "
_CUT = "..."
_WORDS = (COLUMNS - len(_MORE), 80, 60, 40)  # columns that a word may have: the most with which the text fits
_MOST = 4000  # characters that are looked at; the middle of a longer text would be left out anyway


def brief(text: str, *, rows: int = ROWS) -> list[str]:
    """At most `rows` lines of at most COLUMNS columns; a line of the text that goes on in a new one is indented there.

    Lines that are given share the rows: one each, and the first ones that need more get what is left. Of more lines
    than rows the first and the last ones stay.
    """
    given = [words for line in _without_middle(text, _MOST).splitlines() if (words := line.split())] or [[_CUT]]
    if len(given) > rows:
        given = [[*given[0], _CUT], *given[len(given) - rows + 1 :]]
    lines: list[str] = []
    for index, words in enumerate(given):
        lines += _fitted(words, rows - len(lines) - (len(given) - index - 1))
    return lines


def _fitted(words: list[str], rows: int) -> list[str]:
    """The words on at most `rows` lines; the first word stays."""
    for most in _WORDS:
        words = [_without_middle(word, most) for word in words]
        lines = _wrapped(words)
        if len(lines) <= rows:
            return lines
    half = rows * COLUMNS // 2
    start = next((index + 1 for index in reversed(range(len(words) - 1)) if words[index].endswith(";")), len(words))
    head, remedy = _within(words[:start], 2 * half), words[start:]
    if _within(remedy, half) != remedy:
        remedy = [*_within(remedy, half), _CUT]
    while len(head) > 1 and len(_wrapped([*head, _CUT, *remedy])) > rows:
        head.pop()
    return _wrapped([*head, _CUT, *remedy])


def _wrapped(words: list[str]) -> list[str]:
    line = " ".join(words)
    return textwrap.wrap(line, COLUMNS, subsequent_indent=_MORE, break_long_words=False, break_on_hyphens=False)


def _within(words: list[str], most: int) -> list[str]:
    """The first words, of at most `most` characters together with their spaces."""
    kept: list[str] = []
    for word in words:
        most -= len(word) + 1
        if most < 0:
            break
        kept.append(word)
    return kept


def _without_middle(text: str, most: int) -> str:
    """The text, with "..." in place of its middle where it has more than `most` characters."""
    if len(text) <= most:
        return text
    start = (most - len(_CUT)) // 2
    return f"{text[:start]}{_CUT}{text[len(text) - (most - len(_CUT) - start) :]}"
