"""Words: numbers in, short text for people out."""

from collections.abc import Sequence

from spindle.timeline.items import View, have_own_axes

_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "\u00b5s"), (1e-9, "ns"))
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def seconds(value: float) -> str:
    """Four digits and the unit that suits: 0.01234 is "12.34 ms"."""
    if not value:
        return "0 s"
    factor, unit = next(((f, u) for f, u in _TIME_UNITS if abs(value) >= f * 0.99995), _TIME_UNITS[-1])
    return f"{_digits(value / factor, 4)} {unit}"


def seconds_on_axis(value: float, end: float) -> str:
    """A moment on an axis that ends at `end`: all its labels bear one unit."""
    factor, unit = next(((f, u) for f, u in _TIME_UNITS if end >= f), _TIME_UNITS[-1])
    return f"{_digits(value / factor, 4)} {unit}" if value else "0"


def size(num_bytes: float) -> str:
    """Three digits and the unit that suits: 2**31 is "2 GiB"."""
    factor, unit = next(((f, u) for f, u in _BYTE_UNITS if num_bytes >= f * 0.9995), _BYTE_UNITS[-1])
    return f"{_digits(num_bytes / factor, 3)} {unit}"


def percent(share: float, *, sign: bool = False) -> str:
    """0.1234 is "12.3 %"."""
    return f"{100 * share:{'+' if sign else ''}.1f} %"


def ranges(devices: Sequence[int]) -> str:
    """Devices as runs of neighbors: "0-3, 8"."""
    runs: list[list[int]] = []
    for device in sorted(devices):
        if runs and runs[-1][-1] + 1 == device:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def scales_in_words(views: Sequence[View]) -> str:
    """Which view is drawn smaller, and by how much; empty where all share one axis."""
    if not have_own_axes(views):
        return ""
    shorter, longer = sorted(views, key=lambda view: view.shown.step_s)
    ratio = longer.shown.step_s / shorter.shown.step_s
    number = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    return f"the {_noun(longer)} is drawn at 1/{number} of the {_noun(shorter)}'s scale"


def _noun(view: View) -> str:
    return "run" if view.source == "measured" else "plan"


def count(number: int, noun: str) -> str:
    """1 is "1 wave", 2 is "2 waves"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", "\u202f")


def _digits(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text
