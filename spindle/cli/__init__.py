"""The command line. Each command parses, calls the room that does the work, and prints; it decides nothing itself.

Exit codes: 0 fine, 1 checked and found wrong, 2 bad input or usage, 3 infeasible, 70 a bug of Spindle.
"""

# In order of use, which is that of the help.
from spindle.cli.commands import plans, pictures, calibration, runs, evaluation, checkpoints, flight, submit, exchange  # isort: skip
from spindle.cli import shell  # isort: skip
from spindle.cli.entry import main
from spindle.cli.group import cli

__all__ = [
    "calibration",
    "checkpoints",
    "cli",
    "evaluation",
    "exchange",
    "flight",
    "main",
    "pictures",
    "plans",
    "runs",
    "shell",
    "submit",
]
