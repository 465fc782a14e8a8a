"""Commands that read and write files of other systems."""

import json

import click

from spindle.cli.group import JSON, PLAN, cli, read_plan
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
    from spindle.files.formats import dumps, write

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


@cli.command("export-plan")
@PLAN
@click.option("--format", "form", type=click.Choice(["megatron"]), required=True, help="Whose file to write.")
@click.option("--language", default="language", show_default=True, help="Which component is its language module.")
@click.option("--output", "-o", type=FILE, required=True, help="The parallelisms by module, as JSON.")
@JSON
def export_plan(plan_file: str, form: str, language: str, output: str, as_json: bool) -> None:
    """Write PLAN as another system's configuration, where it has one. Exit 1 where it has none.

    megatron: module_parallelisms of Megatron-Bridge's MegatronMIMOParallelismConfig; the schedule is Megatron's own.

    \b
    spindle export-plan plan.json --format megatron --language llm -o megatron.json
    """
    from spindle.exchange.megatron import module_parallelisms, ranks
    from spindle.files.formats import write_text

    check_directory(output)
    found = module_parallelisms(read_plan(plan_file), language)
    values = {"module_parallelisms": found}
    write_text(json.dumps(values, indent=1) + "\n", output)
    if as_json:
        click.echo(json.dumps(values))
        return
    click.echo(f"{'module':40} {'ranks':>11} {'tensor':>7} {'data':>5}")
    for name, parallelism in found.items():
        places = ranks(parallelism)
        sizes = parallelism["tensor_model_parallel_size"], parallelism["data_parallel_size"]
        click.echo(f"{name[:40]:40} {f'{places.start}-{places.stop - 1}':>11} {sizes[0]:>7} {sizes[1]:>5}")
    click.echo(f"\nwritten to {output}")
