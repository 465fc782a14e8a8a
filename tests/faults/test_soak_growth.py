"""What the soak calls growth: beyond what is tolerated, of ranks within an attempt, and of the driver."""

from collections.abc import Callable

import pytest
from soaking.growth import DRIVER_BYTES, RANK_BYTES, Held, Usage, grown

Bytes = Callable[[int], int]


def usages(*, rank: Bytes, driver: Bytes, files: Callable[[int], int] = lambda step: 9) -> list[Usage]:
    """Forty samples of one attempt with two ranks, and twenty between legs, when there are none."""
    found = []
    for number in range(60):
        between = number >= 40
        held = Held(rank(number), 9, 3)
        ranks = () if between else (held, Held(2**28, 9, 3))
        child = 2 if between else 4
        found.append(Usage(number, 1.0, 1, between, Held(driver(number), files(number), 1), ranks, child, 0, 0))
    return found


def test_what_is_flat_is_not_named() -> None:
    """Nor what grows at the start alone, or by less than is tolerated."""
    assert grown(usages(rank=lambda n: 2**28 + min(n, 4) * RANK_BYTES, driver=lambda n: 2**29)) == []
    assert grown(usages(rank=lambda n: 2**28 + n * RANK_BYTES // 60, driver=lambda n: 2**29)) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": lambda n: 2**28 + n * RANK_BYTES}, "memory of rank 0 (MiB): "),
        ({"driver": lambda n: 2**29 + n * DRIVER_BYTES}, "memory of the driver (MiB): "),
        ({"files": lambda n: 9 + n}, "open files of the driver: "),
    ],
)
def test_what_grows_is_named(given: dict[str, Bytes], said: str) -> None:
    told = grown(usages(**{"rank": lambda n: 2**28, "driver": lambda n: 2**29, **given}))
    assert told
    assert all(each.startswith(said) for each in told)
