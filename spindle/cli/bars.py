"""Bars: what the command line shows while it works, on stderr."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import click

from spindle.cli.terminal import WIDTH, is_silent

PATIENCE_S = 2.0  # what takes longer shows a bar


class progress:  # noqa: N801 - used like a function
    """A bar with the time left on a terminal; elsewhere a line every ten seconds. On stderr."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None
        self.printed_s = time.monotonic()

    def __enter__(self) -> Callable[..., None]:
        if sys.stderr.isatty() and not is_silent():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = _bar(*columns, TextColumn("{task.description}", markup=False))
            self.bar.start()
            self.bar.add_task("", total=None)
        return self.update

    def update(self, done: int, total: int, text: str = "") -> None:
        """So much is done; `text` stands behind the bar."""
        if self.bar is not None:
            self.bar.update(0, completed=done, total=total, description=text[: WIDTH // 2])
        elif time.monotonic() - self.printed_s > 10.0 and not is_silent():
            self.printed_s = time.monotonic()
            click.echo(f"{self.title} {done}/{total}  {text}".rstrip()[:WIDTH], err=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


class busy:  # noqa: N801 - used like a function
    """For work that cannot say how far it is: after two seconds a bar on a terminal, nothing elsewhere. On stderr.

    It shows the seconds left of `limit_s`, where the work keeps to a limit, else those gone by. Gives a function that
    says what is done now.
    """

    def __init__(self, title: str, limit_s: float | None = None) -> None:
        self.stderr = sys.stderr
        self.bar: Any = None
        self.shown = False
        self.timer = threading.Timer(PATIENCE_S, self._show)
        self.timer.daemon = True
        self.doing(title, limit_s)

    def doing(self, title: str, limit_s: float | None = None) -> None:
        """From now on the work is `title`."""
        self.title, self.limit_s = title, limit_s
        self.began_s = time.monotonic()

    def __enter__(self) -> Callable[..., None]:
        if sys.stderr.isatty() and not is_silent():
            # Here, not when the bar is shown: importing rich draws random numbers, which a trace would take for the
            # model's; and what redirects stderr for a while would hold ours if another thread put it there meanwhile.
            from rich.file_proxy import FileProxy

            self.bar = _bar(*self._columns(), transient=True, redirect_stderr=False)
            self.bar.add_task("", total=None)
            sys.stderr = FileProxy(self.bar.console, self.stderr)  # what is said meanwhile stands above the bar
            self.timer.start()
        return self.doing

    def _columns(self) -> tuple[Any, ...]:
        from rich.progress import BarColumn, ProgressColumn
        from rich.text import Text

        status = self

        class Title(ProgressColumn):
            """What is done now."""

            def render(self, task: Any) -> Text:
                return Text(status.title)

        class Clock(ProgressColumn):
            """Seconds left, or gone by; moves the bar behind it."""

            def render(self, task: Any) -> Text:
                task.completed = time.monotonic() - status.began_s
                left_s = (status.limit_s or 0.0) - task.completed
                if left_s > 0:
                    task.total = status.limit_s
                    return Text(f"at least {left_s:.0f} s left")  # what the limit does not bind comes on top
                task.total = None  # what is not bound by the limit still goes on, and the bar says that it knows no end
                return Text(f"{task.completed:.0f} s")

        return Title(), Clock(), BarColumn()

    def _show(self) -> None:
        self.shown = True
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        if self.bar is None:
            return
        self.timer.join()  # it may just be drawing
        if self.shown:
            self.bar.stop()
        sys.stderr.flush()
        sys.stderr = self.stderr


def _bar(*columns: Any, **options: Any) -> Any:
    """A bar of rich on what is stderr now; what the user's code prints to a pipe still goes there."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=sys.stdout.isatty(), **options)
