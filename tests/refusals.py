"""Refusals: tables of what a value refuses, and in which words.

A row is (what is tried, the value that the sentence must name, the rule, the remedy): house rule for all errors.
"""

from collections.abc import Callable, Mapping

import pytest

from spindle.errors import SpindleError

Refusal = tuple[Callable[[], object], str, str, str]
"""What is tried; then pieces of the message: value, rule, remedy."""


def each(table: Mapping[str, Refusal]) -> pytest.MarkDecorator:
    """One test a row; the row's key says what is wrong with it."""
    return pytest.mark.parametrize("refusal", list(table.values()), ids=list(table))


def check_refusal(refusal: Refusal, error: type[SpindleError]) -> None:
    """The error is exactly of that type, and its one to three lines name value, rule and remedy."""
    attempt, *pieces = refusal
    with pytest.raises(error) as caught:
        attempt()
    text = str(caught.value)
    assert type(caught.value) is error, text
    assert [piece for piece in pieces if piece not in text] == [], text
    assert len(text.splitlines()) <= 3, text
    assert text.isascii(), text
