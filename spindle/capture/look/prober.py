"""Prober: trials in; which glue and which blocks mix samples, out.

- A value is sharded over the batch when its parts, put together along some dimension by the rows of some unit, are what
  the whole batch gives; or when all parts give the same. Other values mix samples, or count them.
- Recorded calls run for real on these samples, with parameters moved off zeros and ones, which hide everything. What
  blocks give is made up; one block of each kind runs, to see whether it mixes samples itself.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spindle.capture.grouping import Key, Wired
from spindle.capture.look.refusals import writes_parameter
from spindle.capture.look.trials import Findings, Part, Trial, fits
from spindle.capture.look.watching import (
    Changes,
    OwnState,
    Watched,
    WritesParameter,
    changes_in_backward,
    examined,
)
from spindle.errors import WorkloadError
from spindle.record.changes.copies import copied
from spindle.record.functions import counts_batches
from spindle.record.on_meta.made_up import MadeUpProducts, give_numbers, made_up
from spindle.record.recording import Aux, Node, Recording, Ref, execute, tree
from spindle.record.skeleton import BlockInfo
from spindle.record.substitutes.checkpoints import Planned, going
from spindle.record.substitutes.draws import Site, Stream, drawing_from
from spindle.record.substitutes.randomness import Drawing
from spindle.values.units import Place

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_MASK = 1e30  # infinities, and the least numbers of a type, stand in attention masks and masked logits
_JITTERED = 10_000_000  # numbers of a parameter; larger ones are no zeros

_FILLED = frozenset(
    f"{before}{name}{after}"
    for name in ("zeros", "ones", "full", "empty", "tensor")
    for before, after in (("", ""), ("new_", ""), ("", "_like"))
) | {"zero_", "fill_", "to", "type_as"}
"""Functions that may read of a value its shape and type alone."""

_CPU = torch.device("cpu")
OTHERS = 9  # numbers on which a block that branches is looked at
LARGE = 1e4  # what a mask adds stays as it is

FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError, KeyError)
"""What code raises that cannot run on the samples it is given."""


@dataclass(frozen=True, slots=True)
class _Block:
    """What is known of a kind of block: whether it mixes samples, and what it changes."""

    mixes: bool
    changes: Changes


class Prober:
    """Runs recordings of one task for real, and compares parts with wholes."""

    def __init__(
        self,
        task: str,
        parameters: Mapping[str, Tensor],
        blocks: Mapping[str, BlockInfo],
        findings: Findings,
        sites: Mapping[str, tuple[Site, ...]],
        cut: Collection[str] = (),
        branching: Collection[str] = (),
    ) -> None:
        """`parameters` and changing buffers by name; `blocks` by path; `cut`: components of tensor parallelism;
        `branching`: kinds of blocks whose code looks at its numbers.
        """
        self.task, self.parameters, self.blocks = task, parameters, blocks
        self.findings, self.sites, self.cut, self.branching = findings, sites, cut, branching
        self.known_blocks: dict[object, _Block] = {}  # by kind and way of calling
        self.on_meta = any(value.is_meta for value in parameters.values())
        self.generator = torch.Generator().manual_seed(0)
        self.jittered: dict[str, Tensor] = {}
        self.varying: set[Key] = set()  # keys whose results differ by sample in some trial

    def _products(self) -> contextlib.AbstractContextManager[object]:
        return MadeUpProducts() if self.on_meta else contextlib.nullcontext()

    def look_at_changes(self, trial: Trial) -> None:
        """See what blocks change, where nothing shows how samples are cut."""
        self._values(trial, trial.whole, {})

    def look(self, trial: Trial, only: Collection[Key] | None = None) -> None:
        """Add what one trial shows to the findings, of some keys alone if these are given."""
        made: dict[tuple[str, int], Tensor] = {}
        whole = self._values(trial, trial.whole, made)
        parts = [self._values(trial, part, made) for part in trial.parts]
        wired, numbers = trial.whole.wired, defaultdict[Key, list[int]](list)
        for number in wired.glue():
            numbers[wired.key(number)].append(number)
        for key, calls in whole.items():
            if only is not None and key not in only:
                continue
            others = [part.get(key, []) for part in parts]
            if trial.variant and any(v is None for each in (calls, *others) for call in each for v in call):
                continue  # numbers that it cannot take (a class that there is not) say nothing of it
            nodes = [wired.recording.nodes[number] for number in numbers[key]]
            verdict = "mixes" if any(n.writes for n in nodes) else self._compared(trial, key, calls, others)
            if verdict == "constant" and not any(getattr(n.function, "__name__", "") in _FILLED for n in nodes):
                zeros = all(_is_zero(value) for call in calls for value in call)
                if zeros or self._read_rows(numbers[key], wired):
                    verdict = "mixes"  # a sum of what is masked, or all() of a condition: alike by chance
            if verdict == "mixes":
                self.findings.mixing.add(key)
            elif verdict == "constant" and key not in self.varying:
                self.findings.constant.add(key)
            else:
                self.varying.add(key)
                self.findings.constant.discard(key)

    def _read_rows(self, numbers: Iterable[int], wired: Wired) -> bool:
        """Whether calls read values that have rows per sample."""
        nodes = wired.recording.nodes
        read = {source for number in numbers for source in wired.sources[number] if source in wired.frontier}
        return any(
            any(self.findings.places.get(nodes[s].block, ())) if nodes[s].block else wired.key(s) in self.varying
            for s in read
        )

    def _compared(self, trial: Trial, key: Key, calls: list[list[Any]], others: list[list[list[Any]]]) -> str:
        """ "rows" when the parts put together are the whole, "constant" when all are the same, "unknown" when their
        shapes do not compare (what is computed from them tells), else "mixes".
        """
        places = self.findings.places.get(key, [])
        widths = [len(call) for call in calls]
        if all([len(call) for call in other] == widths for other in others):
            verdicts = {
                self._result(
                    trial, value, [other[n][index] if index < len(other[n]) else None for other in others], place
                )
                for n, call in enumerate(calls)
                for index, (value, place) in enumerate(zip(call, places, strict=False))
            }
            return next((verdict for verdict in ("mixes", "unknown", "rows") if verdict in verdicts), "constant")
        if not trial.covers:
            return "unknown"
        flat = [value for call in calls for value in call]  # called once a sample, say: all in order must be the same
        joined = [value for other in others for call in other for value in call]
        if any(value is None for value in (*flat, *joined)):
            return "mixes"
        if [value.shape for value in flat] != [value.shape for value in joined]:
            return "unknown"
        return "rows" if all(_close(a, b) for a, b in zip(joined, flat, strict=True)) else "mixes"

    @staticmethod
    def _result(trial: Trial, whole: Any, parts: list[Any], places: tuple[Place, ...]) -> str:
        if whole is None or any(part is None for part in parts) or _is_endless(whole):
            return "mixes"  # what is NaN in the whole is NaN in the parts, too, however it was computed
        for place in places if all(part.ndim == whole.ndim for part in parts) else ():
            if _are_rows(trial, whole, parts, place):
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
        with torch.no_grad(), drawing_from(stream), self._products():
            for number in wired.live:
                node = recording.nodes[number]
                if node.block:
                    self._probe_block(trial, part, node, values)
                    values.update(self._made_up(trial, part, node, made))
                    continue
                self._run(number, wired, values)
                if number not in wired.repeated:
                    results = [values.get(out) for out in node.outs]
                    found[wired.key(number)].append([None if r is None else r.clone() for r in results])
        return found

    def _run(self, number: int, wired: Wired, values: dict[int, Tensor]) -> None:
        recording = wired.recording
        if all(ref in values or ref in recording.leaves for ref in wired.refs[number]):
            with suppress(*FAILURES):
                self._execute(recording.nodes[number], recording, values)

    def _execute(
        self,
        node: Node,
        recording: Recording,
        values: dict[int, Tensor],
        blocks: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        aux: Sequence[Tensor] | None = None,
    ) -> None:
        """Run one call; `values` takes what it gives. `aux`: in place of what was computed from the batch."""
        execute(
            [node],
            values,
            aux=(recording.aux if aux is None else aux).__getitem__,
            leaf=self._leaf,
            leaves=recording.leaves,
            blocks=blocks,
            device=_CPU,
        )

    def _leaf(self, name: str) -> Tensor:
        """A parameter moved off zeros and ones; one on the meta device is made up."""
        if name not in self.jittered:
            value = self.parameters[name].detach()
            if value.is_meta:
                self.jittered[name] = made_up(value, self.generator)
                return self.jittered[name]
            value = value.cpu()
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
        """Results of a block, made up: results of a part are cut from the results of the whole."""
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
                value = trial.cut(whole, part, place[0])
            else:
                value = whole if tuple(whole.shape) == shape else self._random(shape, dtype)
            yield out, value

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.randn(tuple(shape), generator=self.generator).to(dtype)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _probe_block(self, trial: Trial, part: Part, node: Node, values: dict[int, Tensor]) -> None:
        """See once for each kind of block, and each way in which it is called, whether it mixes samples: it runs on the
        whole's arguments, cut. The same layer keeps padded texts apart, and not packed ones without a mask; and parts
        of a batch may give it something else than the whole does, such as no mask where all their texts are full.
        """
        unlike = sorted(
            leaf for name, component, leaf in trial.apart if (name, component) == (node.block, node.component)
        )
        variant = trial.variant if node.aux() else ""
        kind = (self._block(node).kind, self._way(node, values), tuple(unlike), variant)
        if kind not in self.known_blocks and part is trial.whole:
            self.known_blocks[kind] = self._examined_block(trial, node, values)
        known = self.known_blocks.get(kind)
        if known is None:
            return
        if known.mixes:
            self.findings.mixing_blocks.add(node.block)
        if known.changes:
            self.findings.changes[node.block] = known.changes.below(node.block.partition("@")[0])

    def _way(self, node: Node, values: dict[int, Tensor]) -> object:
        """What a call gives to a block: constants, types and dimensions of the model's values, and tensors of the
        batch; and how its results are cut.
        """

        def described(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                value = values.get(leaf.index)
                return None if value is None else (value.ndim, str(value.dtype))
            if isinstance(leaf, Aux):
                return "batch", leaf.index  # another mask may let samples see each other
            return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf).__qualname__

        return repr((tree(described, node.args), tree(described, node.kwargs), self.findings.places.get(node.block)))

    def _block(self, node: Node) -> BlockInfo:
        return self.blocks[node.block.partition("@")[0]]

    def _examined_block(self, trial: Trial, node: Node, values: dict[int, Tensor]) -> _Block:
        module = _twin(self._block(node).module, self.generator)
        watched = Watched(module)
        whole = self._block_results(trial, trial.whole, node, values, module)
        if whole is None:  # it cannot run here (it needs a device, say); unless it has, nothing is known against it
            counting = frozenset(path for path, m in module.named_modules() if counts_batches(m))
            return _Block(self._block(node).kind in self.branching, Changes(counting))
        run = partial(self._block_results, trial, trial.whole, node, values=values, module=module)
        try:
            changes = examined(watched, whole, run, partial(run, other=OTHERS))
        except WritesParameter as state:
            kept = node.block.partition("@")[0].partition(".")[0] in self.cut
            raise writes_parameter(self.task, node.block, self._block(node).module, str(state), cut=kept) from None
        except OwnState as state:
            kind = type(self._block(node).module).__name__
            raise WorkloadError(f"task {self.task!r}: {node.block} (a {kind}) {state}") from None
        after: dict[str, Tensor] = {}
        if changes.buffers:
            watched.rewind()
            run()
            after = {name: value for name, value in watched.changed().items() if name in changes.buffers}
            watched.rewind()
            changes = replace(changes, again=changes_in_backward(watched, run(learns=True)))
        parts = []
        for part in trial.parts:
            watched.rewind()
            results = self._part_results(trial, part, node, values, module)
            if results is None:
                return _Block(True, changes)
            parts.append(results)
            mine = watched.changed() if changes.buffers else {}
            if any(not _close(mine.get(name, value.new_empty(0)), after[name]) for name, value in after.items()):
                return _Block(True, changes)  # what it leaves behind is of all samples
        mixes = self._mixes(trial, node, whole, parts)
        if not mixes and not changes and self._block(node).kind in self.branching:
            mixes = any(self._mixes_other(trial, node, values, module, number) for number in range(1, OTHERS))
        return _Block(mixes, changes)

    def _mixes(self, trial: Trial, node: Node, whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> bool:
        """Whether what a block gives of parts is not, put together, what it gives of the whole."""
        places = self.findings.places.get(node.block, [])
        verdicts = {
            self._result(trial, value, [part[index] for part in parts], place)
            for index, (value, place) in enumerate(zip(whole, places, strict=False))
            if parts
        }
        return bool({"mixes", "unknown"} & verdicts)

    def _mixes_other(self, trial: Trial, node: Node, values: dict[int, Tensor], module: nn.Module, number: int) -> bool:
        """The same of other numbers: a branch on one sample may go the same way for whole and parts by chance."""
        whole = self._block_results(trial, trial.whole, node, values, module, other=number)
        parts = [self._part_results(trial, part, node, values, module, number) for part in trial.parts]
        if whole is None or all(map(_is_endless, whole)):  # code that cannot take such numbers
            return False
        if any(part is None for part in parts):
            return True
        return self._mixes(trial, node, whole, [part for part in parts if part is not None])

    def _part_results(
        self,
        trial: Trial,
        part: Part,
        node: Node,
        values: dict[int, Tensor],
        module: nn.Module,
        other: int = 0,
    ) -> list[Tensor] | None:
        twin = next((n for n in part.wired.blocks() if part.wired.recording.nodes[n].block == node.block), None)
        if twin is None:
            return None
        given = self._cut_arguments(trial, part, node, part.wired.recording.nodes[twin], values)
        return None if given is None else self._block_results(trial, part, *given, module, other=other)

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
                value = trial.cut(value, part, (unit, cut[0]))
            given[own] = value
        return twin, given

    def _block_results(
        self,
        trial: Trial,
        part: Part,
        node: Node,
        values: dict[int, Tensor],
        module: nn.Module,
        learns: bool = False,
        other: int = 0,
    ) -> list[Tensor] | None:
        """What a block gives; where it `learns`, with a graph; on `other` numbers than those of the samples, of which
        there are several.
        """
        scope = node.block
        stream = Stream(step=part.step, task=self.task, low=part.bounds[0], high=part.bounds[1], units=trial.units)

        def run(*args: Any, **kwargs: Any) -> Any:
            with Drawing(scope, self.sites.get(scope, ())), going(Planned()):
                return module.forward(*args, **kwargs)

        own = {number: _disturbed(value, other) for number, value in values.items()} if other else dict(values)
        aux = [_disturbed(value, other) for value in part.wired.recording.aux] if other else None
        try:
            with torch.set_grad_enabled(learns), drawing_from(stream), self._products():
                self._execute(node, part.wired.recording, own, {scope: run}, aux)
        except Exception:  # a block may need anything; what it cannot do here it may do at run time
            if learns:
                return None
            found = self._block_results(trial, part, node, values, module, learns=True, other=other)
            return None if found is None else [value.detach().clone() for value in found]  # it asked for gradients
        return [own[out] if learns else own[out].clone() for out in node.outs]


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of a module on the CPU, its parameters moved off zeros and ones, and made up where they
    are on the meta device.
    """
    twin = copied(module, [module])
    made = {name for name, parameter in twin.named_parameters() if parameter.is_meta}
    give_numbers(twin, lambda value: made_up(value, generator))
    twin = twin.to("cpu")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name not in made and parameter.is_floating_point() and parameter.numel() <= _JITTERED:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    return twin


def _disturbed(value: Tensor, number: int) -> Tensor:
    """Other numbers, which follow from the numbers one by one: near to them, or anywhere between -1 and 1."""
    if not value.is_floating_point():
        return value
    if number == OTHERS:
        return value * 0.7 + 0.3
    return torch.where(value.abs() < LARGE, torch.sin(value * (40 + 7 * number) + number), value)


def _are_rows(trial: Trial, whole: Tensor, parts: Sequence[Tensor], place: Place) -> bool:
    """Whether parts are their rows of the whole: put together, where they are all samples."""
    if trial.covers:
        return _close(torch.cat(list(parts), place[1]), whole)
    try:
        rows = [trial.cut(whole, part, place) for part in trial.parts]
    except (ValueError, IndexError, RuntimeError):  # the whole is not cut by this place
        return False
    return all(map(_close, parts, rows))


def _is_zero(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.numel()) and not bool(value.count_nonzero())


def _is_endless(value: Any) -> bool:
    """Whether no entry is a number, as in a loss that is NaN."""
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.numel()) and bool(value.isnan().all())


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
