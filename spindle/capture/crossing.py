"""Crossing: a recording and the operator of each call in it; the values that pass from one operator to another out."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from spindle.capture.codes import Crossing
from spindle.capture.grouping import Key, Wired


def reads_of_others(wired: Wired, home: Mapping[int, str]) -> Iterator[tuple[str, int]]:
    """Each operator with each value of another one that it reads. `home`: operator of a node."""
    for number, own in home.items():
        for ref in wired.refs[number]:
            maker = wired.maker.get(ref)
            if maker is not None and home.get(maker, own) != own:
                yield own, ref


def crossing_values(
    wired: Wired, home: Mapping[int, str], loss: int, keys: Mapping[int, Key] | None = None
) -> dict[str, dict[int, Crossing]]:
    """Values that operators send to others, by operator: number of each, and what it is.

    `home`: operator of a node; `keys`: keys of glue under which it is known, None: its own.
    """
    nodes = wired.recording.nodes
    read = {loss, *(ref for _, ref in reads_of_others(wired, home))}
    found: dict[str, dict[int, Crossing]] = defaultdict(dict)
    calls = Counter[object]()
    for number in wired.live:
        if number in home:
            what: object = nodes[number].block or (wired.key(number) if keys is None else keys[number])
            sent = [(index, out) for index, out in enumerate(nodes[number].outs) if out in read]
            found[home[number]].update((out, (what, calls[what], index)) for index, out in sent)
            calls[what] += bool(sent)  # a loop over samples may send what its last turn gives
    return found


def with_gradient(wired: Wired) -> set[int]:
    """Values that the loss is differentiated by."""
    recording, found = wired.recording, set[int]()
    if recording.needs_grad[recording.loss]:
        found.add(recording.loss)
    for number in reversed(wired.live):
        if not found.isdisjoint(recording.nodes[number].outs):
            found.update(ref for ref in wired.refs[number] if recording.needs_grad[ref])
    return found


def graded(wired: Wired) -> dict[Key | str, int]:
    """Keys and block calls that the loss is differentiated through, and a node of each."""
    learning, nodes = with_gradient(wired), wired.recording.nodes
    own = (n for n in (*wired.blocks(), *wired.glue()) if not learning.isdisjoint(nodes[n].outs))
    return {nodes[n].block or wired.key(n): n for n in own}


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


def leaves_of_operators(wired: Wired, home: Mapping[int, str]) -> dict[str, set[str]]:
    """Names of the parameters and changing buffers that each operator reads."""
    leaves = wired.recording.leaves
    return {
        name: {leaves[ref] for n in own for ref in wired.refs[n] if ref in leaves}
        for name, own in members(wired, home).items()
    }
