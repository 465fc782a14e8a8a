"""Drawn: cases of a test that are drawn at random from its name, so that they are the same on every machine.

Unlike hypothesis, which begins with the smallest case whatever the test, and shrinks, each case here is an arbitrary
one: for tests of which one case takes a second. SPINDLE_FUZZ=10 tries ten times as many.
"""

import functools
import inspect
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

SEEDS = range(10**6)
TIMES = int(os.environ.get("SPINDLE_FUZZ", "1"))


def drawn(count: int, **choices: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test `count` times, times SPINDLE_FUZZ, with one of the `choices` for each of these arguments."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(request: pytest.FixtureRequest, **given: Any) -> None:
            for number in range(count * TIMES):
                draw = random.Random(f"{request.node.name} {number}")
                chosen = {name: draw.choice(values) for name, values in choices.items()}
                try:
                    test(**given, **chosen)
                except BaseException as error:
                    error.add_note(f"drawn case {number}: {chosen}")
                    raise

        own = inspect.signature(test)
        kept = [parameter for name, parameter in own.parameters.items() if name not in choices]
        request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = own.replace(parameters=[*kept, request])  # type: ignore[attr-defined]
        return run

    return decorated
