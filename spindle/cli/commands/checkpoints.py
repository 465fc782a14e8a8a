"""The command about checkpoints."""

import math
from datetime import datetime
from pathlib import Path

import click

from spindle.cli.group import JSON, cli
from spindle.cli.kinds import FOLDER
from spindle.cli.terminal import folded, json_text

_SHOWN = 12


@cli.command()
@click.argument("folder", type=FOLDER)
@click.argument("other", type=FOLDER, required=False)
@click.option("--verify", is_flag=True, help="Read all files, and compare them with their checksums.")
@JSON
def checkpoints(folder: str, other: str | None, verify: bool, as_json: bool) -> None:
    """List the checkpoints in FOLDER, or compare two of them, FOLDER and OTHER. Exit 1 for what is damaged or differs.

    \b
    spindle checkpoints runs/a --verify
    spindle checkpoints runs/a/step-00000400 runs/b/step-00000400
    """
    if other is not None:
        _compare(Path(folder), Path(other), as_json=as_json)
    else:
        _list(Path(folder), verify=verify, as_json=as_json)


def _list(folder: Path, *, verify: bool, as_json: bool) -> None:
    from spindle.runtime.checkpoints.checkpoint_report import rows_of

    rows = rows_of(folder, verify=verify)
    if as_json:
        values = [
            {"path": str(row.path), "step": row.step, "run": row.run, "seed": row.seed, "files": row.num_files,
             "bytes": row.num_bytes, "written_s": row.written_s, "problem": row.problem or None}
            for row in rows
        ]  # fmt: skip
        click.echo(json_text({"verified": verify, "checkpoints": values}))
    else:
        click.echo(f"{'checkpoint':24} {'files':>5} {'GiB':>9}  {'written':19}  run")
        for row in rows:
            if row.problem:
                click.echo(folded(f"{row.path.name:24} DAMAGED: {row.problem}", indent=25))
                continue
            written = datetime.fromtimestamp(row.written_s).isoformat(" ", "seconds")
            size = f"{row.num_bytes / 2**30:.3f}"
            click.echo(f"{row.path.name:24} {row.num_files:>5} {size:>9}  {written:19}  {row.run[:8]}")
        click.echo(
            "all bytes are as they were written" if verify else "names and sizes were checked; --verify reads all"
        )
    if any(row.problem for row in rows):
        click.get_current_context().exit(1)


def _compare(first: Path, second: Path, *, as_json: bool) -> None:
    from spindle.runtime.checkpoints.checkpoint_report import count_tensors, differences

    found = list(differences(first, second))
    count = count_tensors(first)
    if as_json:
        values = [{"name": row.name, "kind": row.kind, "largest": _number(row.largest)} for row in found]
        click.echo(json_text({"equal": not found, "tensors": count, "differences": values}))
    elif not found:
        click.echo(f"equal: {count} tensors, bit for bit")
    else:
        click.echo(f"{len(found)} of {count} tensors differ")
        for row in sorted(found, key=lambda row: -row.largest)[:_SHOWN]:
            click.echo(folded(f"{row.name}  {f'by up to {row.largest:.3g}' if row.kind == 'differs' else row.kind}"))
        if len(found) > _SHOWN:
            click.echo(f"and {len(found) - _SHOWN} more; --json lists all")
    if found:
        click.get_current_context().exit(1)


def _number(value: float) -> float | None:
    """A number as JSON has it; none where one of two is no finite number."""
    return value if math.isfinite(value) else None
