"""The command that reads flight records."""

import textwrap
from pathlib import Path

import click

from spindle.cli.group import JSON, cli
from spindle.cli.kinds import FOLDER
from spindle.cli.terminal import WIDTH, json_text


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--last", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Events to show, the newest."
)
@JSON
def flight(folder: str, last: int, as_json: bool) -> None:
    """Say what the ranks of a run did last, which stopped first, and what the others waited for.

    FOLDER: of a run that ended badly, as given to --checkpoints, or of one of its records (FOLDER/flight/3).

    \b
    spindle flight runs/a
    spindle flight runs/a/flight/1 --last 100
    """
    from dataclasses import asdict

    from spindle.runtime.faults.flight_report import first_stopped, read_flight, rows, sentences

    record = read_flight(Path(folder))
    events = record.events()[-last:]
    if as_json:
        rank, why = first_stopped(record)
        ranks = [
            {name: value for name, value in asdict(each).items() if name != "events"}
            | {"last_s": each.last_s, "place": each.place and each.place.text}
            for each in record.ranks
        ]
        values = {"record": str(record.folder), "end": record.end.model_dump() if record.end else None}
        stopped = {"first_stopped": rank.rank, "why": why, "ranks": ranks}
        shown = [asdict(event) | {"kind": event.kind.name.lower()} for event in events]
        click.echo(json_text(values | stopped | {"events": shown}))
        return
    for sentence in sentences(record):
        click.echo(textwrap.fill(sentence, WIDTH, subsequent_indent="  "))
    click.echo("")
    for row in rows(events, record.last_s):
        click.echo(row if len(row) <= WIDTH else f"{row[: WIDTH - 3]}...")
