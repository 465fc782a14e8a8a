"""Commands that read and write files of other systems."""

import click

from spindle.cli.group import JSON, cli
from spindle.cli.kinds import FILE, SPEC_FILE
from spindle.cli.options import check_directory


@cli.command("import-galvatron")
@click.argument("mapping", type=SPEC_FILE)
@click.option("--output", "-o", type=FILE, required=True, help="The MetaGraph, for spindle plan.")
@JSON
def import_galvatron(mapping: str, output: str, as_json: bool) -> None:
    """Make a MetaGraph of Galvatron's profiles; MAPPING (.yaml) says which layers are which component.

    \b
    spindle import-galvatron galvatron.yaml -o graph.json
    spindle plan graph.json --cluster 1x8:a100-80g
    """
    from spindle.exchange.galvatron import read_galvatron
    from spindle.formats import dumps, write

    check_directory(output)
    found = read_galvatron(mapping)
    write(found, output)
    if as_json:
        click.echo(dumps(found))
        return
    click.echo(f"{'MetaOp':40} {'layers':>7} {'ms on 1 device':>15} {'GiB there':>10}")
    for metaop in found:
        gib = f"{metaop.memory[1] / 2**30:.2f}" if metaop.memory else "unknown"
        click.echo(f"{metaop.name[:40]:40} {metaop.layers:>7} {metaop.layers * metaop.times[1] * 1e3:>15.3f} {gib:>10}")
    click.echo(f"\nwritten to {output}")
