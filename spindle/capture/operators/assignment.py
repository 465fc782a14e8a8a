"""Assignment: the recording of a task's first batch in; which call belongs to which operator out, by name.

Glue is grouped so that every value that passes between operators can be cut, or mixes samples.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from spindle.capture.codes import Crossing, TaskCode
from spindle.capture.crossing import crossing_values, graded, leaves_of_operators, reads_of_others, with_gradient
from spindle.capture.grouping import Circle, Group, Key, Order, Wired, group
from spindle.capture.look.trials import Seen, place_of, spread_mixing
from spindle.capture.operators.naming import Namer
from spindle.errors import WorkloadError
from spindle.values.units import Place

Tied = Mapping[str, Mapping[str, str]]
"""By component: its own names of parameters that another component holds too, by the names that these have there."""


@dataclass(frozen=True)
class Assigned:
    """The operators of a task. `order`: their names, each after the operators whose values it reads; `components` by
    operator.
    """

    code: TaskCode
    order: list[str]
    components: Mapping[str, str]


def assigned(
    task: str, seen: Seen, wired: Wired, named: Mapping[str, Tensor], namer: Namer, tied: Tied | None = None
) -> Assigned:
    """Divide what was recorded of a task (`wired`) into operators; `named` are parameters and buffers by name, `tied`
    other names of these.

    Raises WorkloadError where its loss depends on no parameter, or not on the batch.
    """
    return _Assignment(task, seen, wired, named, namer, tied or {}).run()


def no_gradient(task: str) -> WorkloadError:
    """The error for a loss that nothing trained leads to."""
    return WorkloadError(
        f"task {task!r}: its loss needs no gradient; let it depend on a trained parameter, or give the task weight=0, "
        "with which it runs forward only"
    )


class _Assignment:
    def __init__(
        self, task: str, seen: Seen, wired: Wired, named: Mapping[str, Tensor], namer: Namer, tied: Tied
    ) -> None:
        self.tied = tied
        self.task, self.seen, self.wired, self.named, self.namer = task, seen, wired, named, namer
        self.findings, self.recording, self.nodes = seen.findings, wired.recording, wired.recording.nodes
        self.loss_maker = wired.maker.get(self.recording.loss, -1)

    def run(self) -> Assigned:
        names, components = self._names(self._groups())
        if self.loss_maker < 0:
            raise no_gradient(self.task)
        crossing = crossing_values(self.wired, names, self.recording.loss)
        code = self._code(names, crossing)
        return Assigned(code, self._order(names), components)

    def _groups(self) -> list[Group]:
        """Groups of glue, in which every value that passes between operators can be cut, or mixes samples."""
        findings = self.findings
        if self.loss_maker in self.wired.frontier and self.wired.key(self.loss_maker) in findings.constant:
            findings.mixing.add(self.wired.key(self.loss_maker))  # else each device would count all of it
        joining: frozenset[Key] = frozenset()
        while True:
            for wired in (self.wired, *self.seen.others):
                spread_mixing(wired, findings)
            groups = self._grouped(joining) or group(self.wired, findings.mixing)
            home = {n: f"{index}" for index, found in enumerate(groups) for n in found.nodes}
            home |= {n: self.nodes[n].block for n in self.wired.blocks()}
            crossing = crossing_values(self.wired, home, self.recording.loss)
            late = {
                what
                for found in crossing.values()
                for what, _, index in found.values()
                if not isinstance(what, str)
                and what not in findings.mixing
                and what not in findings.constant
                and place_of(findings, what, index) is None
            }
            mixed = {key for found in groups if found.mixes for key in found.keys}
            if not late and mixed <= findings.mixing:
                more = joining | self._varying(groups)
                if more == joining or self._grouped(more) is None:
                    return groups
                joining = more
            findings.mixing.update(late | mixed)  # type: ignore[arg-type]

    def _varying(self, groups: list[Group]) -> frozenset[Key]:
        """Keys that mix samples of which other recordings send more or fewer values to other operators: the pieces of
        a loop over samples, say, which only the glue that reads them can take.
        """
        glue = {key: f"{index}" for index, found in enumerate(groups) for key in found.keys}
        blocks = {self.nodes[n].block for n in self.wired.blocks()}
        found: set[Key] = set()
        usual: Counter[object] | None = None
        for wired in (self.wired, *self.seen.others):
            nodes = wired.recording.nodes
            if {nodes[n].block for n in wired.blocks()} != blocks:
                continue
            home = {n: glue[wired.key(n)] for n in wired.glue() if wired.key(n) in glue}
            home |= {n: nodes[n].block for n in wired.blocks()}
            sent = crossing_values(wired, home, wired.recording.loss).values()
            calls = Counter(what for values in sent for what, _, _ in values.values())
            usual = calls if usual is None else usual
            found |= {key for key in glue if calls[key] != usual[key]}
        return frozenset(found & self.findings.mixing)

    def _grouped(self, joining: frozenset[Key]) -> list[Group] | None:
        """The groups, in which these keys stay with what reads them; None where they cannot."""
        try:
            return group(self.wired, self.findings.mixing, joining)
        except Circle:
            return None

    def _names(self, groups: list[Group]) -> tuple[dict[int, str], dict[str, str]]:
        """The operator of each node, and the component of each operator; in the order in which they are computed."""
        names: dict[int, str] = {}
        components: dict[str, str] = {}
        order: list[tuple[int, Group | None]] = [(min(g.nodes), g) for g in groups if g.nodes]
        order += [(number, None) for number in self.wired.blocks()]
        for number, found in sorted(order, key=lambda pair: pair[0]):
            node = self.nodes[number]
            if found is None:
                component, name = self.namer.block(self.task, node.component, node.block.partition("@")[0])
                names[number] = name
            else:
                called = found.component.partition("@")[0]
                component = self.namer.component(called, self._sizes(found, called))
                role = "post" if found.has_frontier else "pre"
                if found.mixes:
                    component, role = ("loss", "") if self.loss_maker in found.nodes else (component, "mix")
                name = self.namer.glue(self.task, component, role)
                names |= dict.fromkeys(found.nodes, name)
            components[name] = component
        return names, components

    def _sizes(self, found: Group, called: str) -> dict[str, int]:
        """Numbers of the parameters that a group reads, by name: where it arose in a component that is tied to another,
        by that component's own.
        """
        leaves, tied = self.recording.leaves, self.tied.get(called, {})
        names = {leaves[r] for n in found.nodes for r in self.wired.refs[n] if r in leaves}
        return {tied.get(name, name): self.named[name].numel() for name in names if name in self.named}

    def _order(self, names: Mapping[int, str]) -> list[str]:
        """Operators, each after the operators whose values it reads; else by their first node."""
        waits: dict[str, set[str]] = {name: set() for name in names.values()}
        for number, name in names.items():
            waits[name] |= {names[s] for s in self.wired.sources[number] if s in names and names[s] != name}
        first = {name: number for number, name in sorted(names.items(), reverse=True)}
        order: dict[str, None] = {}
        while len(order) < len(waits):
            ready = [name for name in waits if name not in order and waits[name] <= order.keys()]
            assert ready, "operators wait for each other in a circle"
            order[min(ready, key=first.__getitem__)] = None
        return list(order)

    def _code(self, names: Mapping[int, str], crossing: Mapping[str, Mapping[int, Crossing]]) -> TaskCode:
        tensors: dict[Crossing, str] = {}
        for name, found in crossing.items():
            for index, what in enumerate(found.values()):
                tensors[what] = f"{self.task}/{name.partition('.')[2]}:{index}"
        number_of = {number: tensors[what] for found in crossing.values() for number, what in found.items()}
        reads: dict[str, dict[str, None]] = {name: {} for name in names.values()}
        for name, ref in reads_of_others(self.wired, names):
            reads[name][number_of[ref]] = None
        glue = {self.wired.key(n): name for n, name in names.items() if not self.nodes[n].block}
        blocks = {self.nodes[n].block: name for n, name in names.items() if self.nodes[n].block}
        self.own_leaves = leaves_of_operators(self.wired, names)
        waits = {self.nodes[n].block: self.wired.frontier[n] for n in self.wired.blocks()}
        self.block_order = Order(waits)
        for other in self.seen.others:
            self._take_other_way(other, glue, blocks, crossing, tensors)
        findings, leaves = self.findings, self.recording.leaves
        return TaskCode(
            task=self.task,
            glue=glue,
            blocks=blocks,
            crossing={name: tuple(found.values()) for name, found in crossing.items()},
            tensors=tensors,
            reads={name: tuple(found) for name, found in reads.items()},
            loss=number_of[self.recording.loss],
            held=self.seen.batch.held,
            waits=waits,
            places={
                what: tuple(place_of(findings, what, index) for index in range(len(slots)))
                for what, slots in findings.places.items()
            },
            trained=frozenset(leaves[n] for n in with_gradient(self.wired) & leaves.keys()),
            graded=frozenset(graded(self.wired)) | self._other_keys(),
            sites=self.seen.sites,
            stateful=self.seen.stateful,
            copies_batch=self.seen.copies_batch,
            writes=tuple(self.recording.writes),
            apart=self.seen.apart,
            by_sample=self.seen.by_sample,
            lines={self.nodes[n].block or self.wired.key(n): self.nodes[n].line for n in names if self.nodes[n].line},
        )

    def _other_keys(self) -> set[Key | str]:
        """Keys and block calls of code that only some samples run."""
        own = {*map(self.wired.key, self.wired.glue()), *(self.nodes[n].block for n in self.wired.blocks())}
        return {key for wired in self.seen.others for key in graded(wired) if key not in own}

    def _take_other_way(
        self,
        wired: Wired,
        glue: dict[Key, str],
        blocks: Mapping[str, str],
        crossing: Mapping[str, Mapping[int, Crossing]],
        tensors: dict[Crossing, str],
    ) -> None:
        """Code that only some samples run counts to the operator that it is connected with, of the same frontier and
        component; what it sends in place of what the operator sends otherwise has the same name.
        """
        nodes = wired.recording.nodes
        for n in wired.glue():
            self._take_like(wired, n, glue, same_place=True)
        self._join_connected(wired, glue)
        for n in wired.glue():
            if self._take_like(wired, n, glue, same_place=False):
                self._join_connected(wired, glue)
        home = {n: blocks.get(nodes[n].block, "") for n in wired.blocks()}
        home |= {n: glue.get(wired.key(n), "") for n in wired.glue()}
        if not all(home.values()):
            return
        for name, sent in crossing_values(wired, home, wired.recording.loss).items():
            usual = list(crossing.get(name, {}).values())
            if len(sent) == len(usual):
                for what, expected in zip(sent.values(), usual, strict=True):
                    if self._place(what) == self._place(expected):
                        tensors.setdefault(what, tensors[expected])

    def _join_connected(self, wired: Wired, glue: dict[Key, str]) -> None:
        """Glue that is connected with glue of an operator, and like it, counts to that operator."""
        mixing, nodes = self.findings.mixing, wired.recording.nodes
        changed = True
        while changed:
            changed = False
            for n in wired.glue():
                a = wired.key(n)
                for b in (wired.key(s) for s in wired.sources[n] if s in wired.frontier and not nodes[s].block):
                    alike = a[1:] == b[1:] and (a in mixing) == (b in mixing)
                    if alike and (a in glue) != (b in glue):
                        glue[a if b in glue else b] = glue[b if b in glue else a]
                        changed = True

    def _take_like(self, wired: Wired, number: int, glue: dict[Key, str], *, same_place: bool) -> bool:
        """Let a call of glue count to the first operator that could compute it: it waits for the same blocks of those
        that are called, stands in the same component, mixes samples or not, and has the parameters.
        """
        key, mixing = wired.key(number), self.findings.mixing
        if key in glue:
            return False
        called = {wired.recording.nodes[n].block for n in wired.blocks()}
        reads = leaves_of_operators(wired, {number: ""}).get("", set())
        for other, name in glue.items():
            alike = (
                other[2] == key[2] and (other in mixing) == (key in mixing) and (other[0] == key[0] or not same_place)
            )
            waits = self.block_order.without(other[1], called)
            if alike and waits == key[1] and reads <= self.own_leaves.get(name, set()):
                glue[key] = name
                return True
        return False

    def _place(self, what: Crossing) -> Place | None:
        return place_of(self.findings, what[0], what[2])
