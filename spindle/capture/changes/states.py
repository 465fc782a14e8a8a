"""States: what each operator reads and changes of buffers in; which of these must keep the order of one process, out.

- Running statistics that nobody reads while training are kept by layer: what each batch adds is folded in afterwards.
- Any other buffer that some operator changes is a state: operators that touch it do so in the order of one process.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from spindle.capture.codes import OperatorPart
from spindle.capture.look.watching import Changes, statistics_of
from spindle.errors import WorkloadError
from spindle.inputs.usercode import line_of
from spindle.record.functions import counts_batches, updated_places
from spindle.record.recording import Node, Ref
from spindle.values.graph import Operator


@dataclass(frozen=True, slots=True)
class Touch:
    """An operator reads or changes a buffer, as call number `at` of its task. `layer`: it counts a batch into the
    running statistics of that layer; `again`: it changes it once more in backward; `inside`: a layer does, by its code.
    `line`: where, as far as that is known.
    """

    operator: str
    buffer: str
    at: int
    changes: bool
    layer: str = ""
    again: bool = False
    inside: bool = False
    line: str = ""

    @property
    def text(self) -> str:
        """How to call the buffer in a sentence."""
        return f"buffer {self.buffer!r}{f' ({self.line})' if self.line else ''}"


@dataclass(frozen=True)
class Buffers:
    """Buffers of a workload: their names by id, and modules by name."""

    name_by_id: Mapping[int, str]
    modules: Mapping[str, nn.Module]
    named: Mapping[str, Tensor]

    def layer_of(self, buffer: str) -> str:
        """The norm layer that counts batches in a buffer; "" for others."""
        layer = buffer.rpartition(".")[0]
        module = self.modules.get(layer)
        return layer if module is not None and counts_batches(module) else ""

    def below(self, path: str) -> Iterator[tuple[str, str]]:
        """Buffers of a module: full path, and the name that the workload knows each by."""
        for inner, buffer in self.modules[path].named_buffers():
            if id(buffer) in self.name_by_id:
                yield f"{path}.{inner}", self.name_by_id[id(buffer)]


def touches(
    operator: str, part: OperatorPart, changes: Mapping[str, Changes], numbers: Mapping[int, int], buffers: Buffers
) -> Iterator[Touch]:
    """What an operator does with buffers. `numbers`: place of each call in the recording, by its id."""
    for node in part.nodes:
        at = numbers[id(node)]
        if node.block:
            path = node.block.partition("@")[0]
            yield from _of_block(operator, path, at, changes.get(node.block, Changes()), buffers)
        else:
            yield from _of_glue(operator, node, at, part.recording.leaves, buffers)


def _of_block(operator: str, path: str, at: int, changes: Changes, buffers: Buffers) -> Iterator[Touch]:
    counted = {name: layer for layer in changes.statistics for name in statistics_of(layer, buffers.modules[layer])}
    for full, name in buffers.below(path):
        layer = name.rpartition(".")[0] if full in counted else ""
        again, changed = changes.again and full in changes.buffers, full in counted or full in changes.buffers
        owner, _, attribute = full.rpartition(".")
        line = line_of(type(buffers.modules[owner]), attribute) if full in changes.buffers else ""
        yield Touch(operator, name, at, changed, layer, again, True, line)


def _of_glue(operator: str, node: Node, at: int, leaves: Mapping[int, str], buffers: Buffers) -> Iterator[Touch]:
    counting = set(node.writes) if _counts(node, leaves) else set()
    reads = dict.fromkeys(leaves[ref] for ref in node.refs() if ref in leaves)
    for name in dict.fromkeys((*reads, *node.writes)):
        if name in buffers.named and not isinstance(buffers.named[name], nn.Parameter):
            layer = buffers.layer_of(name) if name in counting else ""
            yield Touch(operator, name, at, name in node.writes, layer, line=node.line)


def _counts(node: Node, leaves: Mapping[int, str]) -> bool:
    """Whether a call updates running statistics, or counts a batch, and reads neither."""
    if getattr(node.function, "__name__", "") in ("add_", "__iadd__"):
        name = leaves.get(node.args[0].index) if isinstance(node.args[0], Ref) else None
        return name is not None and name.endswith(".num_batches_tracked") and node.args[1:] == (1,)
    places = updated_places(node.function, node.args, node.kwargs)
    read = [ref.index for index, arg in enumerate(node.args) if index not in places for ref in _refs(arg)]
    return bool(places) and not any(leaves.get(number) in node.writes for number in read)


def _refs(value: object) -> list[Ref]:
    return [value] if isinstance(value, Ref) else []


def lines_of(found: Iterable[Touch]) -> dict[str, str]:
    """Where each buffer is changed, as far as that is known."""
    return {touch.buffer: touch.line for touch in found if touch.changes and touch.line}


def with_states(operators: Sequence[Operator], found: Iterable[Touch], in_flight: int = 1) -> tuple[Operator, ...]:
    """Operators that tell which running statistics they change, and which states they touch.

    Raises WorkloadError where an operator touches a state before and after another one of its task does, or where its
    backward does too, so that one process goes forward and backward by turns.
    """
    touched = list(found)
    changed = {touch.buffer for touch in touched if touch.changes}
    by_layer: dict[str, set[str]] = {}
    for touch in touched:
        if touch.layer:
            by_layer.setdefault(touch.layer, set()).add(touch.buffer)
    read = {touch.buffer for touch in touched if not touch.layer}
    counted = {layer: names for layer, names in by_layer.items() if not names & read}
    states = changed - {name for names in counted.values() for name in names}
    _check_turns([touch for touch in touched if touch.buffer in states], in_flight)
    _check_order(operators, [touch for touch in touched if touch.buffer in states])
    layers: dict[str, dict[str, None]] = {}
    own: dict[str, dict[str, None]] = {}
    for touch in touched:
        if touch.layer in counted:
            layers.setdefault(touch.operator, {})[touch.layer] = None
        elif touch.buffer in states:
            own.setdefault(touch.operator, {})[touch.buffer] = None
    return tuple(
        replace(op, statistics=tuple(layers.get(op.name, ())), states=tuple(own.get(op.name, ()))) for op in operators
    )


def _check_turns(touched: Sequence[Touch], in_flight: int) -> None:
    users: dict[str, set[str]] = {}
    for touch in touched:
        users.setdefault(touch.buffer, set()).add(touch.operator)
    for touch in touched:
        others = sorted(users[touch.buffer] - {touch.operator})
        if touch.again and (others or in_flight > 1):
            other = f"{others[0]!r} reads or changes too" if others else "several micro-batches change at once"
            raise WorkloadError(
                f"{touch.operator!r} changes {touch.text} under a checkpoint of its own, which runs again "
                f"in backward, and which {other}; switch the checkpoint off and name the component in the workload's "
                "recompute="
            )


def _check_order(operators: Sequence[Operator], touched: Sequence[Touch]) -> None:
    place = {op.name: index for index, op in enumerate(operators)}
    task = {op.name: op.task for op in operators}
    before: dict[tuple[str, str], Touch] = {}
    for touch in sorted(touched, key=lambda touch: (task[touch.operator], touch.at)):
        key = touch.buffer, task[touch.operator]
        other = before.get(key, touch)
        if place[touch.operator] < place[other.operator]:
            raise WorkloadError(
                f"task {key[1]!r} reads or changes {touch.text} in {touch.operator!r} before and after it "
                f"does so in {other.operator!r}, which runs apart from it; do it in one of the two alone"
            )
        before[key] = touch
