"""The entry point: runs the command line, and turns what goes wrong into one to three lines and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

from spindle.cli.group import cli
from spindle.cli.terminal import WIDTH, painted, show_warning, tell
from spindle.errors import SpindleError

BUG = 70


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
        _refuse(error.format_message(), f"Try '{context.command_path} --help'." if context else "")
        sys.exit(2)
    except SpindleError as error:
        _refuse(str(error), _hints(error), getattr(error, "__notes__", ()))
        sys.exit(error.exit_code)
    except SystemExit as error:  # commands end by click's exit; this one would pass for ours
        if "click" in traceback.extract_tb(error.__traceback__)[-1].filename:  # who read our output has gone
            raise
        _refuse(f"the workload's own code ended the process (SystemExit {error.code}); mend it")
        sys.exit(SpindleError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _refuse("interrupted")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SPINDLE_DEBUG"):
            raise
        hint = "Set SPINDLE_DEBUG=1 to see where, and please report it."
        _refuse(f"a bug of Spindle: {type(error).__name__}: {error}", hint)
        sys.exit(BUG)
    sys.exit(status if isinstance(status, int) else 0)


def _hints(error: SpindleError) -> str:
    """Where to read more about a run that failed, on one line if it fits, or ""."""
    hints = [f"`spindle flight {error.flight}` shows what each rank did last."] if error.flight else []
    if getattr(error, "__notes__", ()) and not os.environ.get("SPINDLE_DEBUG"):
        hints.append("Set SPINDLE_DEBUG=1 to see the traceback.")
    line = " ".join(hints)
    return line if len(line) < WIDTH else "\n".join(hints)


def _refuse(text: str, hint: str = "", notes: Sequence[str] = ()) -> None:
    """One to three lines on stderr, without what a terminal would obey; SPINDLE_DEBUG shows all, with the notes."""
    from spindle.cli.brief import ROWS, brief  # which help does not need
    from spindle.words.harmless import harmless

    text, hint = harmless(f"spindle: {text}"), harmless(hint)
    if os.environ.get("SPINDLE_DEBUG"):
        lines = [text, hint, *notes]
    else:
        after = brief(hint, rows=ROWS - 1) if hint else []
        lines = [*brief(text, rows=ROWS - len(after)), *after]
    tell("\n".join(filter(None, lines)).replace("spindle:", painted("spindle:", "red"), 1))
