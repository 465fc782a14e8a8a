"""Writes: a recording in; what it writes to parameters out, apart from what a planned step computes.

A task may change parameters by others alone, under no_grad: clamp a scale, move a teacher after its student. Such calls
do not read the batch, so each rank that holds the parameter can make them, before or after all that uses it.

They may read clocks: buffers that the task itself changes by constants alone, such as a count of steps. Each rank that
writes keeps a clock of its own for each such parameter, which goes on as the buffer does.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spindle.record.functions import NewData, SetData
from spindle.record.lazy import Refused
from spindle.record.recording import Aux, LeafWrite, Node, Recording, Ref, execute, tree
from spindle.values.graph import ParameterWrite

INSTEAD = "do it in the step() of an optimizer of your own, or make it a buffer"
"""What to do with a write to a parameter that no plan can follow."""

CLOCK = (
    "Keep a count of steps in a buffer that the task itself advances (state.step += 1), and compute what follows from "
    "it with tensors: p.lerp_(q, 1 - momentum) with momentum = 1 - 0.01 * torch.cos(state.step * rate)"
)
"""How what is written may change from step to step."""

MOST_NUMBERS = 64  # of a constant tensor that a write reads
_CLAMPS = ("clamp_", "clamp_min_", "clamp_max_", "clip_")
_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")


def take_out(recording: Recording, parameters: Iterable[str], of_block: Callable[[str], set[str]]) -> None:
    """Move the calls that write to parameters out of a recording, into its `writes`.

    `of_block`: parameters that a block holds, by its path. Raises Refused, which names the line, where what is written
    depends on the batch, or where the order of reads and writes could not be kept.
    """
    known = set(parameters)
    if any(known.intersection(node.writes) for node in recording.nodes):
        _Taker(recording, known, of_block).run()


class _Taker:
    def __init__(self, recording: Recording, parameters: set[str], of_block: Callable[[str], set[str]]) -> None:
        self.recording, self.parameters, self.of_block = recording, parameters, of_block
        recording.nodes[:] = [one for node in recording.nodes for one in self._singly(node)]
        self.nodes, self.leaves, self.maker = recording.nodes, recording.leaves, recording.makers()
        self.writing: dict[str, list[int]] = {}
        self.changing: dict[str, list[int]] = {}  # buffers
        for number, node in enumerate(self.nodes):
            for name in node.writes:
                (self.writing if name in parameters else self.changing).setdefault(name, []).append(number)

    def run(self) -> None:
        taken = {number for numbers in self.writing.values() for number in numbers}
        live = self._live(taken)
        writes = [self._write(target, numbers, live) for target, numbers in self.writing.items()]
        for write in writes:
            moved = [name for name in write.sources if name in self.writing]
            if moved:
                raise Refused(
                    f"it writes to parameter {write.target!r} ({write.line}) what it reads of {moved[0]!r}, to which "
                    f"it writes too; {INSTEAD}"
                )
        self.recording.writes = writes
        self.recording.nodes[:] = [node for number, node in enumerate(self.nodes) if number not in taken]

    def _singly(self, node: Node) -> list[Node]:
        """A call on lists of tensors as calls on one each."""
        first: Any = node.args[0] if node.args else None
        if type(first) not in (list, tuple) or not self.parameters.intersection(node.writes):
            return [node]
        count = len(first)

        def of(index: int) -> Any:
            return lambda value: [value[index]] if type(value) in (list, tuple) and len(value) == count else value

        return [
            replace(
                node,
                args=tuple(map(of(index), node.args)),
                kwargs={key: of(index)(value) for key, value in node.kwargs.items()},
                outs=[],
                writes=(self.recording.leaves[first[index].index],),
            )
            for index in range(count)
        ]

    def _live(self, taken: set[int]) -> set[int]:
        """Calls that the loss, a buffer or a block depends on."""
        stack = [n for n, node in enumerate(self.nodes) if (node.writes or node.block) and n not in taken]
        if self.recording.loss in self.maker:
            stack.append(self.maker[self.recording.loss])
        found: set[int] = set()
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                stack += [self.maker[ref] for ref in self.nodes[number].refs() if ref in self.maker]
        return found

    def _write(self, target: str, numbers: Sequence[int], live: set[int]) -> LeafWrite:
        cone = self._cone(target, numbers)
        nodes = [self.nodes[number] for number in cone]
        read = self._read(cone)
        clocks = tuple(name for name in read if name not in self.parameters)
        users = [n for n in live if n not in numbers and self._uses(self.nodes[n], target)]
        before, after = all(n > numbers[-1] for n in users), all(n < numbers[0] for n in users)
        if not before and not after:
            raise Refused(
                f"it reads parameter {target!r} before and after it writes to it ({self.nodes[numbers[0]].line}); "
                "write before anything reads it, or after all that does"
            )
        return LeafWrite(
            target=target,
            sources=tuple(name for name in read if name != target and name not in clocks),
            clocks=clocks,
            nodes=tuple(nodes),
            leaves={n: name for n, name in self.leaves.items() if name in read},
            aux={aux: self.recording.aux[aux] for node in nodes for aux in node.aux()},
            after=None if before and after else after,
            repeatable=not clocks and self._repeatable(target, numbers),
            line=self.nodes[numbers[0]].line,
            unnoticed=any(self.nodes[number].unnoticed for number in numbers),
            text=" ".join(map(self._text, nodes)),
            shapes={
                name: (self.recording.shapes[n], self.recording.dtypes[n])
                for n, name in self.leaves.items()
                if name in read
            },
        )

    def _read(self, cone: Iterable[int]) -> list[str]:
        """Parameters and buffers that some calls read."""
        refs = (ref for number in cone for ref in self.nodes[number].refs())
        return list(dict.fromkeys(self.leaves[ref] for ref in refs if ref in self.leaves))

    def _cone(self, target: str, numbers: Sequence[int]) -> list[int]:
        """The calls that write, and all that they read; with the calls that change the clocks among it."""
        found: set[int] = set()
        stack = list(numbers)
        while stack:
            number = stack.pop()
            if number in found:
                continue
            found.add(number)
            node = self.nodes[number]
            large = [aux for aux in node.aux() if self.recording.aux[aux].numel() > MOST_NUMBERS]
            strange = self.parameters.intersection(node.writes) and number not in numbers
            if node.block or node.draws or large or strange:
                raise self._refused(target, numbers[0], "what depends on the batch")
            stack += [self.maker[ref] for ref in node.refs() if ref in self.maker]
            for name in self._read([number]):
                if name not in self.parameters:
                    if name not in self.changing:
                        raise self._refused(
                            target, numbers[0], f"what it reads of buffer {name!r}, which others change"
                        )
                    stack += self.changing[name]
        own = [n for n in found if n not in numbers and self.nodes[n].writes]
        if own and not self.parameters.isdisjoint(self._read(self._makers(own))):
            name = next(name for n in own for name in self.nodes[n].writes)
            raise self._refused(target, numbers[0], f"what it reads of buffer {name!r}, which follows parameters")
        return sorted(found)

    def _makers(self, numbers: Iterable[int]) -> set[int]:
        """Calls, and all that they read."""
        found: set[int] = set()
        stack = list(numbers)
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                stack += [self.maker[ref] for ref in self.nodes[number].refs() if ref in self.maker]
        return found

    def _refused(self, target: str, number: int, what: str) -> Refused:
        line = f" ({self.nodes[number].line})" if self.nodes[number].line else ""
        if "embedding" in getattr(self.nodes[number].function, "__name__", ""):
            what = f"by max_norm= of an embedding, {what}"
        return Refused(f"it writes to parameter {target!r}{line} outside of the optimizer {what}; {INSTEAD}")

    def _uses(self, node: Node, target: str) -> bool:
        if node.block and target in self.of_block(node.block.partition("@")[0]):
            return True
        return any(self.leaves.get(ref) == target for ref in node.refs())

    def _repeatable(self, target: str, numbers: Sequence[int]) -> bool:
        """Whether to write twice is to write once."""
        nodes = [self.nodes[number] for number in numbers]
        names = [getattr(node.function, "__name__", "") for node in nodes]
        if all(name in _CLAMPS for name in names):
            return True
        overwrites = names[0] in _OVERWRITES or isinstance(nodes[0].function, SetData)
        first = self._cone(target, numbers[:1])
        own = [ref for n in first for ref in self.nodes[n].refs() if self.leaves.get(ref) == target]
        return overwrites and len(own) == 1  # as what is written to alone

    def _text(self, node: Node) -> str:
        """A call as text that is equal in every recording that makes it."""
        values = {out: index for index, n in enumerate(self.nodes) for out in n.outs}

        def named(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                known = self.leaves.get(leaf.index)
                maker = self.nodes[values[leaf.index]] if leaf.index in values else None
                return known or (getattr(maker.function, "__name__", "") if maker is not None else "?")
            if isinstance(leaf, Aux):
                return str(self.recording.aux[leaf.index].tolist())
            return repr(leaf)

        return f"{getattr(node.function, '__name__', 'call')}{tree(named, node.args)}{tree(named, node.kwargs)}"


def specs(task: str, writes: Iterable[LeafWrite]) -> tuple[ParameterWrite, ...]:
    """What a plan must know of a task's writes."""
    return tuple(
        ParameterWrite(
            task=task,
            target=w.target,
            sources=w.sources,
            after=w.after,
            repeatable=w.repeatable,
            unnoticed=w.unnoticed,
            line=w.line,
        )
        for w in writes
    )


@dataclass(frozen=True)
class OwnWrite:
    """A write as a rank makes it, and its own values of the clocks that it reads."""

    write: LeafWrite
    clocks: dict[str, Tensor]


def perform(write: LeafWrite, leaf: Callable[[str], Tensor], device: torch.device, is_within: bool = False) -> None:
    """Write to a parameter; `leaf` gives it and what is read. `is_within`: between a forward and its backward, which
    does not notice.
    """
    nodes, unnoticed = write.nodes, contextlib.ExitStack()
    if is_within:
        nodes = tuple(replace(n, function=NewData()) if isinstance(n.function, SetData) else n for n in nodes)
        keep: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter
        unnoticed.enter_context(keep(leaf(write.target)))
    with torch.no_grad(), unnoticed:
        execute(
            nodes,
            {},
            aux=lambda number: write.aux[number].to(device),
            leaf=leaf,
            leaves=write.leaves,
            blocks={},
            device=device,
        )


def differing(known: Sequence[LeafWrite], found: Sequence[LeafWrite]) -> str:
    """A parameter to which a recording writes in another way than another one; "" where there is none."""
    texts: Mapping[str, str] = {write.target: write.text for write in known}
    others = {write.target: write.text for write in found}
    return next((name for name in {**texts, **others} if texts.get(name) != others.get(name)), "")
