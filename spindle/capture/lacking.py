"""Lacking: the recording of a batch without one modality in; what its operators send each other, without those it
leaves out, out.

- A batch without images calls no layer of the image tower: these operators compute nothing, and send nothing.
- Glue is known by the layers that it waits for. Without them it waits for the layers before them.
- An operator that would have put images among words has nothing to do, and passes the words on as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spindle.capture.codes import TaskCode
from spindle.capture.crossing import crossing_values, reads_of_others, with_gradient
from spindle.capture.grouping import Key, Order, Wired
from spindle.errors import WorkloadError
from spindle.values.units import Place


class _Read(NamedTuple):
    """Value `number` is read by an operator, "" the loss. `learns`: a gradient comes back for it."""

    operator: str
    number: int
    learns: bool


class Lacking:
    """One recording of a batch that lacks `names`, of fields and units that the captured batch had."""

    def __init__(self, code: TaskCode, wired: Wired, names: Sequence[str], where: str) -> None:
        self.code, self.wired, self.nodes = code, wired, wired.recording.nodes
        self.where = f"{where}: a batch lacks {', '.join(map(repr, names))}, which the first batch had; without it"
        self.order = Order(code.waits)
        self.maker = {tensor: name for name in code.crossing for tensor in code.sent(name)}
        self.places = {code.tensors[what]: code.place(what) for sent in code.crossing.values() for what in sent}
        self.place: dict[int, Place | None] = {}  # how each value is cut that operators send

    def home(self) -> tuple[dict[int, str], dict[int, Key]]:
        """The operator of each node, and the key that its glue had when the task was captured.

        Raises WorkloadError where the task runs other code than then.
        """
        called = {self.nodes[n].block for n in self.wired.blocks()}
        unknown = sorted(called - self.code.blocks.keys())
        if unknown:
            raise self.refusal(f"the task calls {unknown[0].partition('@')[0]} more often")
        known: dict[Key, set[Key]] = {}
        for key in self.code.glue:
            site, frontier, component = key
            known.setdefault((site, self.order.without(frontier, called), component), set()).add(key)
        keys: dict[int, Key] = {}
        for n in self.wired.glue():
            key = self.wired.key(n)
            found = {key} if key in self.code.glue else known.get(key, set())
            if len({self.code.glue[other] for other in found}) != 1:
                node = self.nodes[n]
                name = getattr(node.function, "__name__", "code")
                raise self.refusal(f"the task runs {name!r}{f' ({node.line})' if node.line else ''} on other values")
            keys[n] = min(found)
        home = {n: self.code.glue[key] for n, key in keys.items()}
        return home | {n: self.code.blocks[self.nodes[n].block] for n in self.wired.blocks()}, keys

    def numbers(self, home: Mapping[int, str], keys: Mapping[int, Key]) -> dict[str, int]:
        """Which value of the recording each tensor is that operators send each other. Raises WorkloadError."""
        recording, found = self.wired.recording, dict[str, int]()
        for name, sent in crossing_values(self.wired, home, recording.loss, keys).items():
            for number, what in sent.items():
                self.place[number] = self.code.place(what)
                tensor = self.code.tensors.get(what)
                if tensor is not None and self.maker[tensor] == name:
                    found[tensor] = number
        learning = with_gradient(self.wired)
        new = sorted({recording.leaves[n] for n in learning & recording.leaves.keys()} - self.code.trained)
        if new:
            raise self.refusal(f"the task trains {new[0]!r}")
        back = (n for n in home if not learning.isdisjoint(self.nodes[n].outs))
        learned = {(home[n], ref) for n in back for ref in self.wired.refs[n] if ref in learning}
        reads = [_Read(*read, read in learned) for read in dict.fromkeys(reads_of_others(self.wired, home))]
        open_reads = [read for read in reads if not self._is_served(read, found)]
        routed = self._routed([*open_reads, _Read("", recording.loss, False)], home, found)
        if routed is None:
            first = open_reads[0] if open_reads else _Read("the loss", recording.loss, False)
            raise self.refusal(f"{first.operator!r} reads a value of {home[self.wired.maker[first.number]]!r}")
        return routed

    def _fits(self, tensor: str, read: "_Read") -> bool:
        """Whether a tensor may carry a value: it must be cut like it, and get a gradient where that comes back."""
        is_alike = self.places[tensor] == self.place[read.number]
        return is_alike and (not read.learns or tensor in self.code.learning)

    def _is_served(self, read: "_Read", found: Mapping[str, int]) -> bool:
        tensors = self.code.reads.get(read.operator, (self.code.loss,))
        return any(found.get(tensor) == read.number and self._fits(tensor, read) for tensor in tensors)

    def _routed(
        self, reads: Sequence["_Read"], home: Mapping[int, str], found: Mapping[str, int]
    ) -> dict[str, int] | None:
        """`found`, and tensors by which each value reaches what reads it, through operators that pass it on where need
        be; None where there is no way for all.
        """
        if not reads:
            return dict(found)
        read, rest = reads[0], reads[1:]
        if self._is_served(read, found):
            return self._routed(rest, home, found)
        for tensor in self.code.reads.get(read.operator, (self.code.loss,)):
            for way in self._ways(tensor, read.number, home, found):
                if all(self._fits(other, read) for other in way):
                    routed = self._routed(rest, home, {**found, **dict.fromkeys(way, read.number)})
                    if routed is not None:
                        return routed
        return None

    def _ways(
        self, tensor: str, number: int, home: Mapping[int, str], found: Mapping[str, int]
    ) -> Iterator[tuple[str, ...]]:
        """Tensors that would carry a value up to `tensor`, none of which carries another."""
        if tensor in found:
            return
        maker = self.maker[tensor]
        if maker == home[self.wired.maker[number]]:
            yield (tensor,)
            return
        for other in self.code.reads[maker]:
            if found.get(other) == number:
                yield (tensor,)
            else:
                yield from ((*way, tensor) for way in self._ways(other, number, home, found))

    def refusal(self, what: str) -> WorkloadError:
        """The error for a batch that is computed in another way."""
        return WorkloadError(
            f"{self.where} {what}, so it computes in another way; let it run the same lines with and without, or make "
            "such batches a task of their own"
        )
