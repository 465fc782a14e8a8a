"""Analysis: recordings of a few samples, whole and in parts, in; which glue mixes samples, and how values are cut, out.

- A value is sharded over the batch when its parts, put together along some dimension by the rows of some unit, are what
  the whole batch gives; or when all parts give the same. Other values mix samples, or count them.
- Recorded calls run for real on these samples, with parameters moved off zeros and ones, which hide everything. What
  blocks give is made up; one block of each kind runs, to see whether it mixes samples itself.
- Several batches are looked at, and one whose entries are moved about, since real ones can hide mixing (equal lengths,
  masks of ones).
"""

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spindle.capture.grouping import Key, Wired
from spindle.graph import SAMPLES
from spindle.record.draws import Site, Stream, drawing_from
from spindle.record.randomness import Drawing
from spindle.record.recording import Node, execute
from spindle.units import Bounds, Place, Units

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_MASK = 1e30  # infinities, and the least numbers of a type, stand in attention masks and masked logits
_JITTERED = 10_000_000  # numbers of a parameter; larger ones are no zeros

FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError, KeyError)
"""What code raises that cannot run on the samples it is given."""


@dataclass(frozen=True)
class Part:
    """A recording of samples `bounds` of a batch, as in step `step`, and the shapes of what was drawn: by scope, "" for
    the glue.
    """

    bounds: Bounds
    wired: Wired
    draws: Mapping[str, Sequence[tuple[int, ...]]]
    step: int = 0


@dataclass(frozen=True)
class Trial:
    """Recordings of some samples of one batch: together, and in two parts."""

    units: Units
    whole: Part
    parts: tuple[Part, ...]


@dataclass
class Findings:
    """What is known of a task's values.

    `places`: for each key of glue or name of a block call, and each of its results, the units and dimensions along
    which it may be cut; () when it cannot. `constant`: keys whose results are the same for all samples. `mixing`: keys
    that mix samples, `mixing_blocks` block calls that do.
    """

    places: dict[object, list[tuple[Place, ...]]] = field(default_factory=dict)
    constant: set[object] = field(default_factory=set)
    mixing: set[Key] = field(default_factory=set)
    mixing_blocks: set[str] = field(default_factory=set)


# -- shapes -----------------------------------------------------------------------------------------------------------


def places_of(trials: Sequence[Trial]) -> dict[object, list[tuple[Place, ...]]]:
    """Where each result of each key of glue and each block call may be cut, by shapes."""
    found: dict[object, list[tuple[Place, ...] | None]] = {}  # None: only seen without entries, which tell nothing
    for trial in trials:
        whole = _results(trial.whole.wired)
        parts = [_results(part.wired) for part in trial.parts]
        for key, calls in whole.items():
            others = [part.get(key, []) for part in parts]
            width = len(calls[0])
            if any(len(other) != len(calls) for other in others) or any(len(c) != width for c in calls):
                found[key] = [() for _ in range(width)]
                continue
            for index in range(width):
                for number, call in enumerate(calls):
                    shapes = [other[number][index] if index < len(other[number]) else () for other in others]
                    here = None if 0 in call[index] else _candidates(call[index], shapes, trial)
                    slots = found.setdefault(key, [])
                    slots += [None] * (index + 1 - len(slots))
                    was = slots[index]
                    slots[index] = here if was is None else tuple(p for p in was if here is None or p in here)
    return {key: [slot or () for slot in slots] for key, slots in found.items()}


def _results(wired: Wired) -> dict[object, list[list[tuple[int, ...]]]]:
    """Shapes of results by key, one list a call."""
    found: dict[object, list[list[tuple[int, ...]]]] = defaultdict(list)
    recording = wired.recording
    for number in (*wired.glue(), *wired.blocks()):
        node = recording.nodes[number]
        found[node.block or wired.key(number)].append([recording.shapes[out] for out in node.outs])
    return found


def _candidates(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]], trial: Trial) -> tuple[Place, ...]:
    """Units and dimensions whose rows explain the sizes of all parts."""
    return tuple(
        (unit, dim)
        for dim in range(len(whole))
        for unit in (SAMPLES, *(u for u in trial.units.counts if u != SAMPLES))
        if whole[dim]
        and any(part[:dim] + part[dim + 1 :] == whole[:dim] + whole[dim + 1 :] for part in parts if len(part) > dim)
        and all(_explains(unit, dim, whole, part, piece, trial) for part, piece in zip(parts, trial.parts, strict=True))
    )


def _explains(unit: str, dim: int, whole: tuple[int, ...], part: tuple[int, ...], piece: Part, trial: Trial) -> bool:
    if len(part) != len(whole) or part[:dim] + part[dim + 1 :] != whole[:dim] + whole[dim + 1 :]:
        return False
    return trial.units.rows(unit, *trial.whole.bounds) > 0 and fits(trial, unit, whole[dim], part[dim], piece)


def fits(trial: Trial, unit: str, whole: int, own: int, part: Part) -> bool:
    """Whether `own` entries are the share of a part's rows of `unit` in the `whole` entries of all."""
    total = trial.units.rows(unit, *trial.whole.bounds)
    return own * total == whole * trial.units.rows(unit, *part.bounds)


def sites_of(trials: Sequence[Trial]) -> dict[str, tuple[Site, ...]]:
    """Of each scope that draws, along which unit and dimension the samples of each draw lie."""
    found: dict[str, tuple[Site, ...]] = {}
    for scope in dict.fromkeys(scope for trial in trials for scope, shapes in trial.whole.draws.items() if shapes):
        sites: list[Site] = []
        for index in range(max(len(trial.whole.draws.get(scope, ())) for trial in trials)):
            seen: tuple[Place, ...] | None = None
            shape: tuple[int, ...] = ()
            for trial in trials:
                shapes = [piece.draws.get(scope, ()) for piece in (trial.whole, *trial.parts)]
                if any(len(s) <= index for s in shapes):
                    continue
                shape = shapes[0][index]
                here = _candidates(shape, [s[index] for s in shapes[1:]], trial)
                seen = here if seen is None else tuple(p for p in seen if p in here)
            sites.append(Site(seen[0][1], 0, (), seen[0][0]) if seen else Site(-1, 0, shape))
        found[scope] = tuple(sites)
    return found


# -- values -----------------------------------------------------------------------------------------------------------


class Prober:
    """Runs recordings of one task for real, and compares parts with wholes."""

    def __init__(
        self,
        task: str,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        kinds: Mapping[str, str],
        findings: Findings,
        sites: Mapping[str, tuple[Site, ...]],
        known_blocks: dict[str, bool],
    ) -> None:
        """`parameters` and changing buffers by name; `modules` and `kinds` of blocks by path. `known_blocks`: whether
        each kind of block mixes samples; found here for those that are new.
        """
        self.task, self.parameters, self.modules, self.kinds = task, parameters, modules, kinds
        self.findings, self.sites, self.known_blocks = findings, sites, known_blocks
        self.generator = torch.Generator().manual_seed(0)
        self.jittered: dict[str, Tensor] = {}
        self.varying: set[Key] = set()  # keys whose results differ by sample in some trial

    def look(self, trial: Trial, only: Collection[Key] | None = None) -> None:
        """Add what one trial shows to the findings, of some keys alone if these are given."""
        made: dict[tuple[str, int], Tensor] = {}
        whole = self._values(trial, trial.whole, made)
        parts = [self._values(trial, part, made) for part in trial.parts]
        for key, calls in whole.items():
            if only is not None and key not in only:
                continue
            others = [part.get(key, []) for part in parts]
            verdict = self._compared(key, calls, others)
            if verdict == "mixes":
                self.findings.mixing.add(key)
            elif verdict == "constant" and key not in self.varying:
                self.findings.constant.add(key)
            else:
                self.varying.add(key)
                self.findings.constant.discard(key)

    def _compared(self, key: Key, calls: list[list[Any]], others: list[list[list[Any]]]) -> str:
        """ "rows" when the parts put together are the whole, "constant" when all are the same, "unknown" when their
        shapes do not compare (what is computed from them tells), else "mixes".
        """
        places = self.findings.places.get(key, [])
        widths = [len(call) for call in calls]
        if all([len(call) for call in other] == widths for other in others):
            verdicts = {
                self._result(value, [other[n][index] if index < len(other[n]) else None for other in others], place)
                for n, call in enumerate(calls)
                for index, (value, place) in enumerate(zip(call, places, strict=False))
            }
            return next((verdict for verdict in ("mixes", "unknown", "rows") if verdict in verdicts), "constant")
        flat = [value for call in calls for value in call]  # called once a sample, say: all in order must be the same
        joined = [value for other in others for call in other for value in call]
        if any(value is None for value in (*flat, *joined)):
            return "mixes"
        if [value.shape for value in flat] != [value.shape for value in joined]:
            return "unknown"
        return "rows" if all(_close(a, b) for a, b in zip(joined, flat, strict=True)) else "mixes"

    @staticmethod
    def _result(whole: Any, parts: list[Any], places: tuple[Place, ...]) -> str:
        if whole is None or any(part is None for part in parts):
            return "mixes"
        for _, dim in places:
            if all(p.ndim == whole.ndim for p in parts) and _close(torch.cat(parts, dim), whole):
                return "rows"
        if not places and (not whole.numel() or any(part.shape != whole.shape for part in parts)):
            return "unknown"  # nothing without entries is a constant, either
        return "constant" if all(_close(part, whole) for part in parts) else "mixes"

    def _values(self, trial: Trial, part: Part, made: dict[tuple[str, int], Tensor]) -> dict[Key, list[list[Any]]]:
        """Results of glue by key, one list a call; None for what cannot be computed."""
        wired, recording = part.wired, part.wired.recording
        stream = Stream(step=part.step, task=self.task, low=part.bounds[0], high=part.bounds[1], units=trial.units)
        values: dict[int, Tensor] = {}
        found: dict[Key, list[list[Any]]] = defaultdict(list)
        with torch.no_grad(), drawing_from(stream):
            for number in wired.live:
                node = recording.nodes[number]
                if node.block:
                    self._probe_block(trial, part, node, values)
                    values.update(self._made_up(trial, part, node, made))
                    continue
                self._run(node, recording, values)
                if number not in wired.repeated:
                    results = [values.get(out) for out in node.outs]
                    found[wired.key(number)].append([None if r is None else r.clone() for r in results])
        return found

    def _run(self, node: Node, recording: Any, values: dict[int, Tensor]) -> None:
        if any(ref not in values and ref not in recording.leaves for ref in node.refs()):
            return
        try:
            execute(
                [node],
                values,
                aux=recording.aux.__getitem__,
                leaf=self._leaf,
                leaves=recording.leaves,
                blocks={},
                device=torch.device("cpu"),
            )
        except FAILURES:
            return

    def _leaf(self, name: str) -> Tensor:
        """A parameter moved off zeros and ones; one on the meta device is made up."""
        if name not in self.jittered:
            value = self.parameters[name].detach()
            value = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.cpu()
            if value.is_floating_point() and value.numel() <= _JITTERED:
                noise = torch.randn(value.shape, generator=self.generator)
                value = value + noise.to(value.dtype) * 0.02
            elif not isinstance(self.parameters[name], nn.Parameter):
                value = value.clone()  # recorded calls may write to a buffer
            self.jittered[name] = value
        return self.jittered[name]

    def _made_up(
        self, trial: Trial, part: Part, node: Node, made: dict[tuple[str, int], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Results of a block, made up: those of a part are cut from those of the whole."""
        recording = part.wired.recording
        places = self.findings.places.get(node.block, [])
        for index, out in enumerate(node.outs):
            shape, dtype = recording.shapes[out], recording.dtypes[out]
            whole = made.get((node.block, index))
            place = places[index][:1] if index < len(places) else ()
            if whole is None:
                value = self._random(shape, dtype)
                if part is trial.whole:
                    made[node.block, index] = value
            elif place:
                unit, dim = place[0]
                span = trial.units.span(unit, whole.shape[dim], trial.whole.bounds, part.bounds)
                value = whole.narrow(dim, *span)
            else:
                value = whole if tuple(whole.shape) == shape else self._random(shape, dtype)
            yield out, value

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.randn(tuple(shape), generator=self.generator).to(dtype)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _probe_block(self, trial: Trial, part: Part, node: Node, values: dict[int, Tensor]) -> None:
        """See once for each kind of block whether it mixes samples: it runs on the whole's arguments, cut."""
        path = node.block.partition("@")[0]
        kind = self.kinds[path]
        if kind not in self.known_blocks and part is trial.whole:
            self.known_blocks[kind] = self._block_mixes(trial, node, values)
        if self.known_blocks.get(kind):
            self.findings.mixing_blocks.add(node.block)

    def _block_mixes(self, trial: Trial, node: Node, values: dict[int, Tensor]) -> bool:
        path = node.block.partition("@")[0]
        module = _twin(self.modules[path], self.generator)
        whole = self._block_results(trial, trial.whole, node, values, module)
        places = self.findings.places.get(node.block, [])
        if whole is None:
            return False  # it cannot run here (it needs a device, say); nothing is known against it
        parts = []
        for part in trial.parts:
            twin = next((n for n in part.wired.blocks() if part.wired.recording.nodes[n].block == node.block), None)
            if twin is None:
                return True
            given = self._cut_arguments(trial, part, node, part.wired.recording.nodes[twin], values)
            results = None if given is None else self._block_results(trial, part, *given, module)
            if results is None:
                return True
            parts.append(results)
        verdicts = [
            self._result(value, [part[index] for part in parts], place)
            for index, (value, place) in enumerate(zip(whole, places, strict=False))
        ]
        return bool({"mixes", "unknown"} & set(verdicts))

    def _cut_arguments(
        self, trial: Trial, part: Part, node: Node, twin: Node, values: dict[int, Tensor]
    ) -> tuple[Node, dict[int, Tensor]] | None:
        """The same call in a part, and what it reads there, cut from what the whole reads."""
        recording = part.wired.recording
        given: dict[int, Tensor] = {}
        for ref, own in zip(node.refs(), twin.refs(), strict=True):
            if ref in trial.whole.wired.recording.leaves:  # a parameter, of which all parts read the same
                continue
            if ref not in values:
                return None
            value, shape = values[ref], recording.shapes[own]
            cut = [d for d, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if a != b]
            if len(cut) > 1:
                return None
            if cut:
                unit = next(
                    (u for u in trial.units.counts if fits(trial, u, value.shape[cut[0]], shape[cut[0]], part)), None
                )
                if unit is None:
                    return None
                span = trial.units.span(unit, value.shape[cut[0]], trial.whole.bounds, part.bounds)
                value = value.narrow(cut[0], *span)
            given[own] = value
        return twin, given

    def _block_results(
        self, trial: Trial, part: Part, node: Node, values: dict[int, Tensor], module: nn.Module
    ) -> list[Tensor] | None:
        scope = node.block
        stream = Stream(step=part.step, task=self.task, low=part.bounds[0], high=part.bounds[1], units=trial.units)

        def run(*args: Any, **kwargs: Any) -> Any:
            with Drawing(scope, self.sites.get(scope, ())):
                return module.forward(*args, **kwargs)

        recording = part.wired.recording
        own = dict(values)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(drawing_from(stream))
                execute(
                    [node],
                    own,
                    aux=recording.aux.__getitem__,
                    leaf=self._leaf,
                    leaves=recording.leaves,
                    blocks={scope: run},
                    device=torch.device("cpu"),
                )
        except Exception:  # a block may need anything; what it cannot do here it may do at run time
            return None
        return [own[out].clone() for out in node.outs]


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of a module on the CPU, its parameters moved off zeros and ones; those on the meta device made up."""
    twin = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.detach().zero_()
    twin = twin.to("cpu")
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.numel() <= _JITTERED:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    return twin


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding: each entry as exactly as the largest one that is no mask."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCE.get(b.dtype, 2e-4)
    a, b = (value.detach().to(torch.promote_types(value.dtype, torch.float32)) for value in (a, b))
    if not b.numel():
        return True
    scale, distance = float(b.abs().max()), float((a - b).abs().max())
    if math.isfinite(distance) and scale < _MASK:
        return distance <= tolerance * max(scale, 1e-30)
    a, b = (torch.nan_to_num(value.double(), nan=7.0) for value in (a, b))
    size = b.abs()
    scale = float(size[size < _MASK].max()) if bool((size < _MASK).any()) else 0.0
    return bool(((a - b).abs() <= tolerance * torch.where(size < _MASK, max(scale, 1e-30), size)).all())


def spread_mixing(wired: Wired, findings: Findings) -> None:
    """Glue that reads glue which mixes samples counts as mixing too, up to the next block."""
    nodes = wired.recording.nodes
    changed = True
    while changed:
        changed = False
        for n in wired.glue():
            key = wired.key(n)
            if key in findings.mixing:
                continue
            reads = (s for s in wired.sources[n] if s not in wired.repeated and not nodes[s].block)
            if any(wired.key(s) in findings.mixing for s in reads):
                findings.mixing.add(key)
                changed = True


def place_of(findings: Findings, key: object, index: int) -> Place | None:
    """How result `index` of a key or block call is cut; None when it only exists whole."""
    places = findings.places.get(key, [])
    return places[index][0] if index < len(places) and places[index] else None
