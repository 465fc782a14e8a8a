"""Colors: as far apart for color-blind eyes as the search that found them promised."""

import itertools
import math

import pytest

from spindle.timeline.colors import FILLS, LINES_ON_DARK, LINES_ON_LIGHT, channels, fills, lines, text_on

# Machado, Oliveira and Fernandes 2009, severity 1
PROTAN = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTAN = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
TRITAN = ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900))
NORMAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
Vector = tuple[float, ...]


def times(matrix: tuple[Vector, ...], vector: Vector) -> Vector:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def oklab(color: str, eye: tuple[Vector, ...]) -> Vector:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    seen = tuple(min(max(c, 0.0), 1.0) for c in times(eye, tuple(linear)))
    cones = times(
        (
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        ),
        seen,
    )
    return times(
        (
            (0.2104542553, 0.7936177850, -0.0040720468),
            (1.9779984951, -2.4285922050, 0.4505937099),
            (0.0259040371, 0.7827717662, -0.8086757660),
        ),
        tuple(math.cbrt(c) for c in cones),
    )


@pytest.mark.parametrize("eye", [NORMAL, PROTAN, DEUTAN, TRITAN], ids=["normal", "protan", "deutan", "tritan"])
@pytest.mark.parametrize(
    ("colors", "least"), [(FILLS[:12], 0.084), (FILLS, 0.05), (LINES_ON_LIGHT, 0.075), (LINES_ON_DARK, 0.068)]
)
def test_any_two_are_apart(colors: tuple[str, ...], least: float, eye: tuple[Vector, ...]) -> None:
    apart = min(math.dist(oklab(a, eye), oklab(b, eye)) for a, b in itertools.combinations(colors, 2))
    assert apart >= least


def test_more_names_than_colors_get_shades() -> None:
    found = fills(40)
    assert found[:16] == FILLS
    assert len(set(found)) == 40
    assert len(lines(30, dark=True)) == 30


def contrast(color: str, other: str) -> float:
    def luminance(rgb: str) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(rgb)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(color), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("fill", FILLS)
def test_text_can_be_read_on_every_fill(fill: str) -> None:
    """WCAG 2 asks 4.5 of small text."""
    assert contrast(fill, text_on(fill)) >= 4.5


@pytest.mark.parametrize("line", [*LINES_ON_LIGHT, *LINES_ON_DARK])
def test_outlines_stand_out_from_the_page(line: str) -> None:
    assert contrast(line, "#ffffff" if line in LINES_ON_LIGHT else "#171b21") >= 4.5
