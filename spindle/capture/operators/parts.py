"""Parts: a recording of some samples in; the calls of each operator in it out, checked against what was captured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from torch import Tensor

from spindle.capture.codes import BatchValues, CopiesIn, OperatorPart, TaskCode
from spindle.capture.crossing import crossing_values, graded, members, reads_of_others
from spindle.capture.grouping import Wired, wire
from spindle.capture.lacking import Lacking
from spindle.errors import WorkloadError
from spindle.record.recording import Recording
from spindle.record.run import Recorded
from spindle.record.shapes import Drawn
from spindle.record.substitutes.draws import Site
from spindle.record.writes import CLOCK, differing
from spindle.values.units import Bounds, Units


@dataclass(frozen=True)
class TaskPart:
    """A recording of samples `bounds`, divided into operators. `shapes`: shapes of the tensors that pass between
    operators. Of a batch that lacks a modality, `absent` are tensors that do not, and `idle` operators that compute
    nothing. `recording`, with the tensors `aux` computed from these samples. `is_plain`: nothing that it takes of the
    batch brings samples together; of `aux`, the tensors `by_entry` do not.
    """

    task: str
    bounds: Bounds
    operators: Mapping[str, OperatorPart]
    shapes: Mapping[str, tuple[int, ...]]
    recording: Recording
    aux: Sequence[Tensor]
    is_plain: bool = False
    by_entry: Mapping[int, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()

    def begin(self, operators: Iterable[str]) -> None:
        """Begin to bring to the device what these operators read of the batch."""
        for part in (self.operators[name] for name in operators if name in self.operators):
            for number in part.aux_read():
                part.values.begin(number)

    def of_others(
        self, code: TaskCode, recorded: Recorded, aux: Sequence[Tensor], bounds: Bounds, units: Units
    ) -> "TaskPart":
        """The same for other samples of the same shapes, from which `aux` was computed."""
        old = next(iter(self.operators.values())).values
        values = BatchValues(aux, old.where)

        def own(part: OperatorPart) -> OperatorPart:
            sites = code.sites.get(part.block, ()) if part.block else ()
            drawn = recorded.drawn.get(part.block, Drawn())
            found = _own_sites(sites, drawn, units, bounds) if sites else ()
            return OperatorPart(part.recording, part.nodes, part.inputs, part.outputs, values, part.block, found)

        operators = {name: own(part) for name, part in self.operators.items()}
        return replace(self, bounds=bounds, operators=operators, aux=aux)


def divide(
    code: TaskCode,
    recorded: Recorded,
    bounds: Bounds,
    units: Units,
    device: CopiesIn,
    where: str,
    lacks: Sequence[str] = (),
) -> TaskPart:
    """The operators of a recording, which read what was computed from the batch on a device. `lacks`: fields and units
    that its batch has none of, but the captured one had.

    Raises WorkloadError, which begins with `where`, when the task ran code or called layers in another way than when
    it was captured.
    """
    wired = wire(recorded.recording, code.stateful)
    other = differing(code.writes, recorded.recording.writes)
    if other:
        raise WorkloadError(
            f"{where}: it writes to parameter {other!r} in another way than when it was captured; a task must write "
            f"the same in every step. {CLOCK}"
        )
    if lacks:
        lacking = Lacking(code, wired, lacks, where)
        home, keys = lacking.home()
        numbers = lacking.numbers(home, keys)
        if len(recorded.drawn[""].shapes) != len(code.sites.get("", ())):
            raise lacking.refusal("the task draws other random numbers")
    else:
        home = _home(code, wired, where)
        numbers = _numbers(code, wired, home, where)
    nodes, values = recorded.recording.nodes, BatchValues(recorded.recording.aux, device)
    members_by_name = members(wired, home)
    operators = {}
    for name in code.reads:
        own = members_by_name.get(name, [])
        block = next((nodes[n].block for n in own if nodes[n].block), "")
        sent = [numbers[tensor] for tensor in code.sent(name) if tensor in numbers]
        if own or sent:
            operators[name] = OperatorPart(
                recorded.recording,
                [nodes[n] for n in own],
                [numbers[tensor] for tensor in code.reads[name] if tensor in numbers],
                sent,
                values,
                block,
                _own_sites(code.sites.get(block, ()), recorded.drawn.get(block, Drawn()), units, bounds)
                if block
                else (),
            )
    shapes = {tensor: recorded.recording.shapes[number] for tensor, number in numbers.items()}
    absent = frozenset(tensor for name in code.crossing for tensor in code.sent(name)) - shapes.keys()
    return TaskPart(
        code.task,
        bounds,
        operators,
        shapes,
        recorded.recording,
        recorded.recording.aux,
        is_plain=recorded.is_plain,
        by_entry=recorded.replay.by_entry if recorded.replay is not None else {},
        absent=absent,
        idle=frozenset(code.reads.keys() - members_by_name.keys()),
    )


INSTEAD = (
    "use torch.where in place of if, or have a module branch, or loop over parts of the batch, that is named in "
    "layers= of its component: layers may. It can be the component itself: layers=[module]"
)
"""What to do where code between layers takes other ways for other batches."""


def _numbers(code: TaskCode, wired: Wired, home: Mapping[int, str], where: str) -> dict[str, int]:
    """Which value of the recording each tensor is that operators send each other."""
    crossing = crossing_values(wired, home, wired.recording.loss)
    numbers: dict[str, int] = {}
    for name, expected in code.crossing.items():
        sent = crossing.get(name, {})
        if [code.tensors.get(what) for what in sent.values()] != [code.tensors[what] for what in expected]:
            same = len(sent) == len(expected)
            sends = "other values than" if same else f"{len(sent)} values to other operators, and {len(expected)}"
            raise WorkloadError(
                f"{where}: operator {name!r} sends {sends} when it was captured{_left_out(code, wired, name)}; a task "
                f"must compute in the same way in every step ({INSTEAD})"
            )
        numbers |= {code.tensors[what]: number for number, what in sent.items()}
    _check_reads(code, wired, home, {number: tensor for tensor, number in numbers.items()}, where)
    _check_gradients(code, wired, where)
    return numbers


def _check_gradients(code: TaskCode, wired: Wired, where: str) -> None:
    """Raise WorkloadError where the task trains what it did not when it was captured: no plan brings the gradient."""
    for key, number in graded(wired).items():
        if key not in code.graded:
            node = wired.recording.nodes[number]
            name = node.block.partition("@")[0] or getattr(node.function, "__name__", "code")
            raise WorkloadError(
                f"{where}: {name!r}{f' ({node.line})' if node.line else ''} gets a gradient, and got none when it was "
                "captured; begin with a batch for which all gradients are on, or switch them off (no_grad, "
                "set_grad_enabled) in every step alike"
            )


def _check_reads(code: TaskCode, wired: Wired, home: Mapping[int, str], named: Mapping[int, str], where: str) -> None:
    """Raise WorkloadError where an operator reads a value of another that it did not read when it was captured."""
    for own, ref in reads_of_others(wired, home):
        if named[ref] not in code.reads[own]:
            raise WorkloadError(
                f"{where}: operator {own!r} reads a value of {home[wired.maker[ref]]!r}, which it did not when it was "
                f"captured{_left_out(code, wired, own)}; a task must compute in the same way in every step ({INSTEAD})"
            )


def _left_out(code: TaskCode, wired: Wired, operator: str) -> str:
    """Where the code of an operator stands that was captured and does not run now, in words."""
    now = {wired.key(number) for number in wired.glue()}
    lines = (code.lines.get(key, "") for key, name in code.glue.items() if name == operator and key not in now)
    line = next(filter(None, lines), "")
    return f", and does not run {line}" if line else ""


def _home(code: TaskCode, wired: Wired, where: str) -> dict[int, str]:
    """The operator of each node."""
    nodes = wired.recording.nodes
    home: dict[int, str] = {}
    for number in wired.live:
        node = nodes[number]
        if node.block:
            if node.block not in code.blocks:
                raise _called_otherwise(code, node.block, where, line=node.line)
            home[number] = code.blocks[node.block]
        elif number not in wired.repeated:
            found = code.glue.get(wired.key(number))
            if found is None:
                raise WorkloadError(
                    f"{where}: it runs {getattr(node.function, '__name__', 'code')!r}"
                    f"{f' ({node.line})' if node.line else ''} where it did not when it was captured, or on values of "
                    f"other layers; a task must compute in the same way in every step ({INSTEAD})"
                )
            home[number] = found
    missing = sorted(code.blocks.keys() - {nodes[n].block for n in wired.blocks()})
    if missing:
        raise _called_otherwise(code, missing[0], where, missing=True)
    return home


def _called_otherwise(
    code: TaskCode, scope: str, where: str, *, line: str = "", missing: bool = False
) -> WorkloadError:
    path, _, number = scope.partition("@")
    calls = sum(other.partition("@")[0] == path for other in code.blocks)
    times = {0: "not at all", 1: "once", 2: "twice"}
    now = int(number or 0) if missing else int(number or 0) + 1
    line = line or code.lines.get(scope, "")
    called, before = times.get(now, f"{now} times"), times.get(calls, f"{calls} times")
    return WorkloadError(
        f"{where}: calls {path}{f' ({line})' if line else ''} {called}, but {before} when it was captured; a task must "
        "call the same layers in every step, or let the module that chooses be one layer, named in layers="
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
