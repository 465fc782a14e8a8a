"""After steps: a workload's functions and a program in; which parameters each changes in a step, out."""

from collections.abc import Iterable, Sequence

from torch import nn

from spindle.errors import WorkloadError
from spindle.inputs.after_step import AfterStep
from spindle.runtime.programs.program import Program
from spindle.values.graph import parse_piece
from spindle.workload import Workload

AfterSteps = tuple[tuple[AfterStep, frozenset[str]], ...]
"""Functions in order, each with the parameters that it is for."""


def after_steps_of(workload: Workload, program: Program) -> AfterSteps:
    """The functions of a workload, checked. Raises WorkloadError for one that devices cannot run as one process."""
    parameters = dict(workload.named_parameters())
    modules = [component.module for component in workload.components.values()]
    sharded = {name for flat in program.flats for name in flat.parameters}
    held = (parse_piece(name) for bucket in program.buckets for name in bucket.parameters)
    cut = {piece.whole for piece in held if piece.count > 1}
    found = []
    for each in workload.after_steps:
        names = each.names(parameters)
        each.check(modules, [parameters[name] for name in names])
        in_parts = [name for name in names if name in sharded or name in cut]
        if in_parts and not each.is_elementwise(tuple(parameters[name].shape) for name in in_parts):
            raise _refused(each, in_parts[0], in_parts[0] in sharded)
        found.append((each, frozenset(names)))
    return tuple(found)


def run_after_step(steps: AfterSteps, stepped: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Run the functions on what an optimizer has just stepped, by name: parameters, their masters, or parts of them."""
    held: Sequence[tuple[str, nn.Parameter]] = list(stepped) if steps else ()
    for each, names in steps:
        for name, parameter in held:
            if parse_piece(name).whole in names:
                each.apply(parameter)


def _refused(each: AfterStep, name: str, is_sharded: bool) -> WorkloadError:
    component = name.partition(".")[0]
    how, remedy = (
        ("are sharded", "register it with shard='nothing', and plan again")
        if is_sharded
        else ("are cut by tensor parallelism", "register it without tensor_parallel=")
    )
    return WorkloadError(
        f"{each.where} computes with the whole of {name!r}, and the parameters of component {component!r} {how}, so "
        f"that no device has it; {remedy}, or use a function that treats each number by itself"
    )
