"""Options: what is typed on the command line, in; checked values, or one line that says what is wrong, out."""

import os
import re

import click

from spindle.errors import FormatError


def positive(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Floats of the command line may be nan, which every range lets in."""
    if value is not None and not 0 < value < float("inf"):
        raise click.BadParameter(f"{value} is not a positive number.")
    return value


def not_negative(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """The same where 0 is allowed."""
    if value is not None and not 0 <= value < float("inf"):
        raise click.BadParameter(f"{value} is not a number from 0 up.")
    return value


def duration(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """90s, 30m, 6h or 1d as seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhd])", value)
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not seconds:
        raise click.BadParameter(f"{value!r} is no time such as 90s, 30m, 6h or 1d.")
    return seconds


def pins(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """NAME=0-3,6 as devices by name."""
    found: dict[str, tuple[int, ...]] = {}
    for pin in given:
        name, _equals, devices = pin.rpartition("=")
        ends = [part.split("-") for part in devices.split(",")]
        if not name or not all(len(end) <= 2 and all(number.isdecimal() for number in end) for end in ends):
            raise click.BadParameter(f"{pin!r} is not NAME=DEVICES, for instance vision=0-3 or lm=0,2.")
        found[name] = tuple(device for end in ends for device in range(int(end[0]), int(end[-1]) + 1))
    return found


def at_least_one(context: click.Context, option: click.Parameter, value: int | None) -> int | None:
    """Counts of samples, devices, nodes."""
    if value is not None and value < 1:
        raise click.BadParameter(f"{value} is less than one.")
    return value


def device_counts(text: str) -> list[int]:
    """Device counts of "8,16,32"."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise FormatError(f"--devices is {text!r}; give counts of at least one, for instance 8,16,32")
    return counts


def check_directory(file: str | None) -> None:
    """Say so before the work is done when its result could not be written."""
    if file and not os.path.isdir(os.path.dirname(os.path.abspath(file))):
        raise FormatError(f"{file}: its directory does not exist; make it first")


def picture_file(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
    """A picture's file, whose name says what is written."""
    return _ending(file, ".svg", ".png")


def graph_file(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
    """The same where it may be a Mermaid flowchart too."""
    return _ending(file, ".svg", ".png", ".mmd")


def _ending(file: str | None, *suffixes: str) -> str | None:
    if file is not None and not file.endswith(suffixes):
        first, last = ", ".join(suffixes[:-1]), suffixes[-1]
        raise click.BadParameter(f"{file!r} says no kind of picture; let it end in {first} or {last}.")
    return file
