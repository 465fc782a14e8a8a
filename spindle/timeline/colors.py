"""Colors: names of components and tasks in, colors out.

Found by search: the fills are as far apart as possible to eyes with each of the three color deficiencies (Machado et
al. 2009), measured in Oklab; any two of the first twelve at least 0.097 apart (Okabe and Ito's seven: 0.076), of all
sixteen 0.059. After sixteen they repeat, darker, then lighter. Lines outline tasks: dark ones on a light page, light
ones on a dark page.
"""

from collections.abc import Sequence

FILLS = (
    "#478ebc",
    "#eec235",
    "#973882",
    "#6aefa9",
    "#e09675",
    "#655ac0",
    "#53bfb6",
    "#b96c7b",
    "#928a07",
    "#ad9bf5",
    "#736131",
    "#ddc5f5",
    "#baaf0c",
    "#877ee9",
    "#8f5b64",
    "#a4caa0",
)
LINES_ON_LIGHT = (
    "#127d9d",
    "#c33c04",
    "#3c046d",
    "#8d6760",
    "#06343e",
    "#7855cf",
    "#901a0f",
    "#2a565e",
    "#711e90",
    "#55120b",
)
LINES_ON_DARK = (
    "#7eaafd",
    "#faaccd",
    "#e1fe80",
    "#d3a23b",
    "#92fefd",
    "#f776c4",
    "#c9d117",
    "#48dbfe",
    "#eedbb8",
    "#90c68b",
)
_REPEATS = ((0, 0.0), (0, 0.38), (255, 0.5))  # mixed with this gray, by this share


def fills(count: int) -> tuple[str, ...]:
    """`count` fill colors."""
    found = []
    for index in range(count):
        gray, share = _REPEATS[index // len(FILLS) % len(_REPEATS)]
        found.append(_mixed(FILLS[index % len(FILLS)], gray, share))
    return tuple(found)


def lines(count: int, *, dark: bool) -> tuple[str, ...]:
    """`count` line colors for a dark or a light page."""
    chosen = LINES_ON_DARK if dark else LINES_ON_LIGHT
    return tuple(chosen[index % len(chosen)] for index in range(count))


def channels(color: str) -> tuple[int, int, int]:
    """Red, green and blue of "#rrggbb", 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def text_on(color: str) -> str:
    """Black or white, whichever reads better on `color` (WCAG 2 contrast)."""
    return "#ffffff" if _luminance(channels(color)) < 0.179 else "#000000"


def _luminance(rgb: Sequence[int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mixed(color: str, gray: int, share: float) -> str:
    return "#" + "".join(f"{round(c * (1 - share) + gray * share):02x}" for c in channels(color))
