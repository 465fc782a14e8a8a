"""Parts: a recording of some samples in; the calls of each operator in it out, checked against what was captured."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from spindle.capture.codes import BatchValues, Crossing, OperatorPart, TaskCode
from spindle.capture.grouping import Wired, wire
from spindle.errors import WorkloadError
from spindle.record.draws import Site
from spindle.record.run import Recorded
from spindle.record.shapes import Drawn
from spindle.units import Bounds, Units


@dataclass(frozen=True)
class TaskPart:
    """A recording of samples `bounds`, divided into operators. `shapes`: shapes of the tensors that pass
    between operators.
    """

    task: str
    bounds: Bounds
    operators: Mapping[str, OperatorPart]
    shapes: Mapping[str, tuple[int, ...]]

    def of_others(
        self, code: TaskCode, recorded: Recorded, aux: Sequence[Tensor], bounds: Bounds, units: Units
    ) -> "TaskPart":
        """The same for other samples of the same shapes, from which `aux` was computed."""
        old = next(iter(self.operators.values())).values
        values = BatchValues(aux, old.device)

        def own(part: OperatorPart) -> OperatorPart:
            sites = code.sites.get(part.block, ()) if part.block else ()
            drawn = recorded.drawn.get(part.block, Drawn())
            found = _own_sites(sites, drawn, units, bounds) if sites else ()
            return OperatorPart(part.recording, part.nodes, part.inputs, part.outputs, values, part.block, found)

        return TaskPart(self.task, bounds, {name: own(part) for name, part in self.operators.items()}, self.shapes)


def reads_of_others(wired: Wired, home: Mapping[int, str]) -> Iterator[tuple[str, int]]:
    """Each operator with each value of another one that it reads. `home`: operator of a node."""
    for number, own in home.items():
        for ref in wired.refs[number]:
            maker = wired.maker.get(ref)
            if maker is not None and home.get(maker, own) != own:
                yield own, ref


def crossing_values(wired: Wired, home: Mapping[int, str], loss: int) -> dict[str, dict[int, Crossing]]:
    """Values that operators send to others, by operator: number of each, and what it is. `home`: operator of a node."""
    nodes = wired.recording.nodes
    read = {loss, *(ref for _, ref in reads_of_others(wired, home))}
    found: dict[str, dict[int, Crossing]] = defaultdict(dict)
    calls = Counter[object]()
    for number in wired.live:
        if number in home:
            what: object = nodes[number].block or wired.key(number)
            sent = [(index, out) for index, out in enumerate(nodes[number].outs) if out in read]
            found[home[number]].update((out, (what, calls[what], index)) for index, out in sent)
            calls[what] += bool(sent)  # a loop over samples may send what its last turn gives
    return found


def members(wired: Wired, home: Mapping[int, str]) -> dict[str, list[int]]:
    """Nodes of each operator in order, with the nodes that are repeated inside of it."""
    found: dict[str, set[int]] = defaultdict(set)
    for number, name in home.items():
        own = found[name]
        own.add(number)
        stack = [s for s in wired.sources[number] if s in wired.repeated]
        while stack:
            source = stack.pop()
            if source not in own:
                own.add(source)
                stack.extend(wired.sources[source])
    return {name: sorted(own) for name, own in found.items()}


def divide(
    code: TaskCode, recorded: Recorded, bounds: Bounds, units: Units, device: torch.device, where: str
) -> TaskPart:
    """The operators of a recording. Raises WorkloadError, which begins with `where`, when the task ran code or called
    layers in another way than when it was captured.
    """
    wired = wire(recorded.recording, code.stateful)
    home = _home(code, wired, where)
    nodes = recorded.recording.nodes
    crossing = crossing_values(wired, home, recorded.recording.loss)
    numbers: dict[str, int] = {}
    for name, expected in code.crossing.items():
        sent = crossing.get(name, {})
        if [code.tensors.get(what) for what in sent.values()] != [code.tensors[what] for what in expected]:
            raise WorkloadError(
                f"{where}: operator {name!r} sends {len(sent)} values to others, but {len(expected)} when it was "
                "captured, or others; a task must compute in the same way in every step"
            )
        numbers |= {code.tensors[what]: number for number, what in sent.items()}
    _check_reads(code, wired, home, {number: tensor for tensor, number in numbers.items()}, where)
    values = BatchValues(recorded.recording.aux, device)
    operators = {}
    for name, own in members(wired, home).items():
        block = next((nodes[n].block for n in own if nodes[n].block), "")
        operators[name] = OperatorPart(
            recorded.recording,
            [nodes[n] for n in own],
            [numbers[tensor] for tensor in code.reads[name]],
            [numbers[code.tensors[what]] for what in code.crossing.get(name, ())],
            values,
            block,
            _own_sites(code.sites.get(block, ()), recorded.drawn.get(block, Drawn()), units, bounds) if block else (),
        )
    shapes = {tensor: recorded.recording.shapes[number] for tensor, number in numbers.items()}
    return TaskPart(code.task, bounds, operators, shapes)


def _check_reads(code: TaskCode, wired: Wired, home: Mapping[int, str], named: Mapping[int, str], where: str) -> None:
    """Raise WorkloadError where an operator reads a value of another that it did not read when it was captured."""
    for own, ref in reads_of_others(wired, home):
        if named[ref] not in code.reads[own]:
            raise WorkloadError(
                f"{where}: operator {own!r} reads a value of {home[wired.maker[ref]]!r}, which it did not when it was "
                "captured; a task must compute in the same way in every step"
            )


def _home(code: TaskCode, wired: Wired, where: str) -> dict[int, str]:
    """The operator of each node."""
    nodes = wired.recording.nodes
    home: dict[int, str] = {}
    for number in wired.live:
        node = nodes[number]
        if node.block:
            if node.block not in code.blocks:
                raise _called_otherwise(code, node.block, where)
            home[number] = code.blocks[node.block]
        elif number not in wired.repeated:
            found = code.glue.get(wired.key(number))
            if found is None:
                raise WorkloadError(
                    f"{where}: it runs {getattr(node.function, '__name__', 'code')!r}"
                    f"{f' ({node.line})' if node.line else ''} where it did not when it was captured, or on values of "
                    "other layers; a task must compute in the same way in every step (use torch.where in place of if, "
                    "and let the first batch take every way)"
                )
            home[number] = found
    missing = sorted(code.blocks.keys() - {nodes[n].block for n in wired.blocks()})
    if missing:
        raise _called_otherwise(code, missing[0], where, missing=True)
    return home


def _called_otherwise(code: TaskCode, scope: str, where: str, *, missing: bool = False) -> WorkloadError:
    path, _, number = scope.partition("@")
    calls = sum(other.partition("@")[0] == path for other in code.blocks)
    times = {0: "not at all", 1: "once", 2: "twice"}
    now = int(number or 0) if missing else int(number or 0) + 1
    return WorkloadError(
        f"{where}: calls {path} {times.get(now, f'{now} times')}, but {times.get(calls, f'{calls} times')} when it was "
        "captured; a task must call the same layers in every step"
    )


def _own_sites(sites: tuple[Site, ...], drawn: Drawn, units: Units, bounds: Bounds) -> tuple[Site, ...]:
    """Where a block's draws stand in this recording: the sizes beside the samples may be others in every batch."""
    return tuple(_own_site(site, shape, units, bounds) for site, shape in zip(sites, drawn.shapes, strict=False))


def _own_site(site: Site, shape: tuple[int, ...], units: Units, bounds: Bounds) -> Site:
    if site.dim < 0:
        return replace(site, inner=shape)
    rows = units.rows(site.unit, *bounds)
    per_row = Fraction(shape[site.dim], rows) if rows else Fraction(0)
    inner = (*shape[: site.dim], *shape[site.dim + 1 :])
    return replace(site, per_sample=int(per_row) if per_row.denominator == 1 else 0, inner=inner)
