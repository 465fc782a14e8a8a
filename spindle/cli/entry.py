"""The entry point: runs the command line, and turns what goes wrong into one to three lines and an exit code."""

import os
import sys
import traceback
import warnings

import click
from click.exceptions import NoArgsIsHelpError

from spindle.cli.group import cli
from spindle.cli.terminal import painted, say, show_warning
from spindle.errors import SpindleError

BUG = 70
_MOST = 1500


def main() -> None:
    """Run the command line; errors become one to three lines on stderr and an exit code, warnings one line."""
    warnings.showwarning = show_warning
    try:
        status = cli.main(standalone_mode=False)
    except NoArgsIsHelpError as error:  # `spindle` alone shows what there is
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context else ""
        say(f"{_name()} {_short(error.format_message())}{hint}")
        sys.exit(2)
    except SpindleError as error:
        say("\n".join((f"{_name()} {_short(str(error))}", *_more(error))))
        sys.exit(error.exit_code)
    except SystemExit as error:  # commands end by click's exit; this one would pass for ours
        if "click" in traceback.extract_tb(error.__traceback__)[-1].filename:  # who read our output has gone
            raise
        say(f"{_name()} the workload's own code ended the process (SystemExit {error.code}); mend it")
        sys.exit(SpindleError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{_name()} interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SPINDLE_DEBUG"):
            raise
        say(
            f"{_name()} a bug of Spindle: {type(error).__name__}: {_short(str(error))}\n"
            "Set SPINDLE_DEBUG=1 to see where, and please report it."
        )
        sys.exit(BUG)
    sys.exit(status if isinstance(status, int) else 0)


def _more(error: SpindleError) -> list[str]:
    """The traceback of a worker, or how to see it."""
    notes: list[str] = getattr(error, "__notes__", [])
    flight = [f"`spindle flight {error.flight}` shows what each rank did last."] if error.flight else []
    if os.environ.get("SPINDLE_DEBUG"):
        return flight + notes
    hints = flight + ["Set SPINDLE_DEBUG=1 to see the traceback."] * bool(notes)
    return [" ".join(hints)] if hints else []


def _short(text: str) -> str:
    """A message without what a terminal would obey, cut where a long name would fill the screen."""
    from spindle.harmless import harmless  # which help does not need

    return harmless(text if len(text) <= _MOST else f"{text[: _MOST - 3]}...")


def _name() -> str:
    return painted("spindle:", "red")
