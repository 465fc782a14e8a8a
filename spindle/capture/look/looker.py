"""Looker: one task and its first batches in; what capture needs to know of them out."""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spindle.capture.codes import computing_in
from spindle.capture.facts import Slot
from spindle.capture.grouping import Key, Wired, wire
from spindle.capture.look.history import History
from spindle.capture.look.prober import Prober
from spindle.capture.look.refusals import (
    Moved,
    Raised,
    Unsettled,
    check_loss,
    explained,
    looped,
    no_other_generators,
)
from spindle.capture.look.samples import (
    PROBE_SAMPLES,
    TRIALS,
    disturbed,
    far_apart,
    few_of,
    first_batches,
    flags,
    modalities,
    one_apart,
    other_few,
    shortened,
    singly,
    twice,
)
from spindle.capture.look.trials import Findings, Part, Seen, Trial, places_of, sites_of
from spindle.capture.look.watching import Held
from spindle.errors import SpindleWarning, WorkloadError
from spindle.inputs.batch import SampledBatch, with_own_tensors
from spindle.record.changes.copies import attributes_kept
from spindle.record.on_meta.known_shapes import KnownShapes
from spindle.record.recording import LeafWrite, Recording, tensors_in
from spindle.record.run import Failure, Recorded, record
from spindle.record.skeleton import Skeleton
from spindle.record.substitutes.draws import Site, Stream
from spindle.record.substitutes.randomness import Undrawn, undrawn
from spindle.record.writes import CLOCK, INSTEAD, differing
from spindle.values.units import Bounds, Place, Units
from spindle.workload import Task, Workload

CHANCES = 8  # steps in which the layers called are compared, where numbers are drawn that may decide that

_CPU = torch.device("cpu")


class Looker:
    """Looks at one task of a workload."""

    def __init__(
        self,
        workload: Workload,
        skeleton: Skeleton,
        task: Task,
        shapes: KnownShapes,
        whole: frozenset[str] = frozenset(),
    ) -> None:
        """`whole` names components that are taken whole; `shapes`: of operations, known from other tasks."""
        self.workload, self.skeleton, self.task = workload, skeleton, task
        self.whole, self.shapes = whole, shapes
        self.sites: Mapping[str, tuple[Site, ...]] | None = None  # where it draws; None: not known yet
        self.writes: tuple[object, Sequence[LeafWrite]] | None = None  # of which samples; None: not known
        self.few: list[
            tuple[Bounds, tuple[Bounds, ...]]
        ] = []  # samples that are looked at, and parts of them, by batch
        self.on_meta = any(parameter.is_meta for _, parameter in workload.named_parameters())
        self.copies_batch: bool | None = None  # whether it writes to its batch; None: not known yet
        self.apart: set[Slot] = set()  # constants of calls that differ between parts of a batch and the whole
        self.by_sample: dict[Slot, float] = {}  # how many calls a sample makes; 0: they are of the batch
        self.is_plain = True  # nothing was computed from the batch alone
        self.batches: Sequence[SampledBatch] = ()
        self.history = History(self)

    def look(self) -> Seen:
        """See `_look`; once more where blocks change buffers that were taken as constants, which glue may read."""
        seen = self._look()
        found = seen.findings.changes.values()
        changed = {name for changes in found for name in changes.buffers}
        layers = {layer for changes in found for layer in changes.statistics}
        changed |= {name for name in seen.read if name.rpartition(".")[0] in layers}
        if changed <= self.skeleton.stateful:
            return seen
        self._set_stateful(changed)
        return self._look()

    def _look(self) -> Seen:
        """Record some batches of the task. Raises WorkloadError when its code cannot be run as planned, TakeWhole when
        a component must be taken whole.
        """
        batches = first_batches(self.task)
        self.history.begin()
        self.skeleton.keep_apart(self.task.function)
        try:
            batches = self.batches = self._longest_first(batches)
            self.few = self.few or [few_of(batch.units) for batch in batches]
            try:
                return self._found(batches)
            except Raised as error:
                self._choose_others(batches, error)
                return self._found(batches)
        finally:
            self.history.put_back()

    def _longest_first(self, batches: list[SampledBatch]) -> list[SampledBatch]:
        """First the batch of which the task runs most code, where batches say by a flag which way it goes."""
        if len({repr(flags(batch)) for batch in batches}) < 2:
            return batches
        length: dict[int, tuple[int, int, int]] = {}
        for batch in batches:
            calls = 0
            with suppress(Exception), attributes_kept(self.history.modules):  # what it raises it raises later too
                calls = len(self.record_samples(batch, few_of(batch.units)[0]).recording.nodes)
            length[id(batch)] = len(batch.held), calls, sum(bool(value) for _, value in flags(batch))
            self.writes = None
        self.history.put_back()
        return sorted(batches, key=lambda batch: length[id(batch)], reverse=True)

    def _found(self, batches: Sequence[SampledBatch]) -> Seen:
        self.sites, self.writes = None, None
        self.apart.clear()
        self.by_sample.clear()
        self.is_plain = True
        modules = self.history.modules
        with attributes_kept(modules, self.skeleton.steady.is_settled):
            held = Held(modules)
            self._find_changing_buffers(batches[0])
            self.history.refuse_made_by_first(batches[0], held)
        self.skeleton.read.clear()
        self.history.refuse_unlike(batches[0])
        return self._looked(batches)

    def _choose_others(self, batches: Sequence[SampledBatch], error: Raised) -> None:
        """Look at other numbers of samples, where the task's code takes whole batches but not the few samples that are
        usual. Raises `error` where it takes no part of a batch.
        """
        self.sites, self.writes = None, None
        for number, batch in enumerate(batches):
            few, size = self.few[number], batch.units.num_samples
            refused = self._refused(batch, few)
            if refused is None:
                continue
            if self._refused(batch, ((0, size), ())) is not None:
                raise error
            if len(batch.units.counts) > 1:  # packed fields that do not fit each other are no matter of numbers
                raise WorkloadError(
                    f"{error}. It was called with {refused} of the batch's {size} samples, which all together it "
                    "takes, as plans give parts of a batch to devices. Let rows= tell of every packed field how many "
                    "rows each sample has, and compute numbers of samples (a batch vector, say) in the task"
                ) from error
            found = next((few for few in other_few(batch.units) if self._refused(batch, few) is None), None)
            if found is None:
                raise WorkloadError(
                    f"{error}. It was tried with {refused} of the batch's {size} samples, which all together it takes: "
                    "plans give parts of a batch to devices, so let it take any number of samples that divides these. "
                    "Where samples belong together in groups or pairs, let a group be one sample, by rows=: see "
                    "docs/packed.md"
                ) from error
            self.few[number] = found

    def _refused(self, batch: SampledBatch, few: tuple[Bounds, tuple[Bounds, ...]]) -> int | None:
        """Of how many samples, of all and of their parts, the task raises; None where it takes all of these."""
        for bounds in (few[0], *few[1]):
            try:
                self.record_samples(batch, bounds)
            except Raised:
                return bounds[1] - bounds[0]
            finally:
                self.writes = None
        return None

    def _looked(self, batches: Sequence[SampledBatch]) -> Seen:
        few = self.few
        trials = self._trials(batches, few)
        self._take_loops_as_one(trials)
        self._take_loops_apart(trials)
        self.sites = sites = sites_of(trials)
        if sites:
            trials = self._trials(batches, few)
        telling = [trial for trial in trials if len(trial.parts) > 1]
        others = self._other_ways(batches[0], trials)
        trials, telling = trials + others, telling and telling + others
        findings = Findings(places_of(telling or trials))
        prober = self._prober(findings)
        for trial in telling:
            self._compare(trial, prober)
        if not telling:
            prober.look_at_changes(self._short(trials[0]))
        if not telling and batches[0].units.num_samples > 1:
            self._take_as_mixing(trials, findings)
        self._look_at_disturbed(batches[0], *few[0], prober)
        trials += self._lacking_ways(batches[0], trials[0].parts[0].bounds, prober)
        every = batches[0].units.whole
        whole = self.record_samples(batches[0], every)
        self._refuse_chance(batches[0], few[0][0], whole)
        self._warn_of_attention(whole)
        self._warn_of_caches(batches[0])
        return Seen(
            batch=batches[0],
            whole=whole,
            few=whole if few[0][0] == every else self.record_samples(batches[0], few[0][0]),
            few_bounds=few[0][0],
            findings=findings,
            sites=sites,
            stateful=frozenset(self.skeleton.stateful),
            copies_batch=bool(self.copies_batch),
            read=frozenset(self.skeleton.read),
            apart=frozenset(self.apart),
            by_sample={slot: rate for slot, rate in self.by_sample.items() if rate},
            others=tuple(_recordings(trials)),
        )

    def _take_loops_as_one(self, trials: Sequence[Trial]) -> None:
        """Raise Unsettled where the task calls components in a loop that is longer for other samples: from then on all
        calls of these count as one, since a later batch may have more.
        """
        lengths: dict[tuple[int, str], set[int]] = defaultdict(set)  # of the loop around a place in the code
        for wired in _recordings(trials):
            calls: dict[tuple[int, str], set[str]] = defaultdict(set)
            for node in wired.live_nodes():
                calls[node.site, node.component.partition("@")[0]].add(node.component)
            for place, names in calls.items():
                lengths[place].add(len(names))
        components = {component for (_, component), found in lengths.items() if component and len(found) > 1}
        if components - self.skeleton.uncounted:
            self.skeleton.uncounted |= components
            raise Unsettled

    def _take_loops_apart(self, trials: Sequence[Trial]) -> None:
        """Raise TakeApart where a component calls its layers more often for other samples."""
        counts: dict[tuple[str, str], set[int]] = defaultdict(set)
        lines: dict[str, str] = {}
        for wired in _recordings(trials):
            called: Counter[tuple[str, str]] = Counter()
            for node in (node for node in wired.live_nodes() if node.block):
                path = node.block.partition("@")[0]
                called[path, node.component] += 1
                lines.setdefault(path, node.line)
            for call, times in called.items():
                counts[call].add(times)
        can = {c.name for c in self.workload.components.values() if c.tensor_parallel == 1}
        inner = {path for (path, _), times in counts.items() if len(times) > 1 and path not in can}
        looping = sorted(path for path in inner if path.partition(".")[0] in can)
        if looping:
            raise looped(self.task, looping, lines[looping[0]])

    def _compare(self, trial: Trial, prober: Prober, only: Set[Key] | None = None) -> None:
        """See what a trial shows, of some keys alone if these are given."""
        prober.look(self._short(trial), only)
        self.apart |= trial.apart
        for slot, rate in trial.by_sample.items():
            known = self.by_sample.get(slot, rate)
            self.by_sample[slot] = max(rate, known) if rate and known else 0.0

    def _take_as_mixing(self, trials: Sequence[Trial], findings: Findings) -> None:
        """No batch seen shows how its samples are cut: all that the task computes exists whole only."""
        warnings.warn(
            f"task {self.task.name!r}: its first batch has rows of a packed field in one sample only, so nothing shows "
            "how its values are cut by sample, and each of its operators runs on one device; start with a batch in "
            "which two samples have rows, or give a list of batches",
            SpindleWarning,
            stacklevel=6,
        )
        for wired in (trial.whole.wired for trial in trials):
            findings.mixing.update(wired.key(n) for n in wired.glue())
            findings.mixing_blocks.update(wired.recording.nodes[n].block for n in wired.blocks())

    def _prober(self, findings: Findings) -> Prober:
        assert self.sites is not None
        named: dict[str, Tensor] = {**dict(self.workload.named_parameters()), **dict(self.workload.named_buffers())}
        blocks = {block.path: block for block in self.skeleton.blocks}
        cut = {c.name for c in self.workload.components.values() if c.tensor_parallel > 1}
        return Prober(self.task.name, named, blocks, findings, self.sites, cut, self.skeleton.rules)

    # -- trials ---------------------------------------------------------------------------------------------------

    def _trials(self, batches: Sequence[SampledBatch], few: Sequence[tuple[Bounds, tuple[Bounds, ...]]]) -> list[Trial]:
        return [self._trial(batch, *samples) for batch, samples in zip(batches, few, strict=True)]

    def _trial(self, batch: SampledBatch, whole: Bounds, parts: Sequence[Bounds], step: int = 0) -> Trial:
        made = [self._part(batch, bounds, step) for bounds in (whole, *parts)]
        return Trial(batch, made[0], tuple(made[1:]))

    def _short(self, trial: Trial) -> Trial:
        """The same trial of short texts, where parameters are on the meta device: such models are too large to compute
        texts of full length here. The trial itself where other code would run.
        """
        for batch in shortened(trial.batch) if self.on_meta else ():
            bounds = [part.bounds for part in trial.parts]
            try:
                found = self._trial(batch, trial.whole.bounds, bounds, trial.whole.step)
            except Exception:  # code that needs texts of one length
                continue
            if found.goes_the_same_way(trial):
                return found
        return trial

    def _part(self, batch: SampledBatch, bounds: Bounds, step: int = 0) -> Part:
        recorded = self.record_samples(batch, bounds, step)
        draws = {scope: drawn.shapes for scope, drawn in recorded.drawn.items()}
        return Part(bounds, wire(recorded.recording, self.skeleton.stateful), draws, step)

    def _other_ways(self, batch: SampledBatch, trials: Sequence[Trial]) -> list[Trial]:
        """Trials of samples for which the task runs code that it did not run for a whole: a mask of ones is left out,
        say. These samples twice are a whole that goes the same way.
        """
        known = {key for trial in trials for key in _keys(trial.whole.wired)}
        found: list[Trial] = []
        recorded = {part.bounds: part for part in trials[0].parts}
        singles = [(i, i + 1) for i in range(min(PROBE_SAMPLES, batch.units.num_samples))]
        for bounds in dict.fromkeys([*recorded, *singles]):
            trial = self._other_way(batch, bounds, known, recorded.get(bounds))
            if trial is not None:
                known |= _keys(trial.whole.wired)
                found.append(trial)
        return found

    def _other_way(
        self, batch: SampledBatch, bounds: Bounds, known: Set[object], part: Part | None = None
    ) -> Trial | None:
        """A trial of these samples twice, if the task can take them alone, and runs code that is not known. `part`: of
        these samples, where it has been recorded.
        """
        try:
            if _keys((part or self._part(batch, bounds)).wired) <= known:
                return None
            doubled = twice(batch, bounds)
            half = doubled.units.num_samples // 2
            return self._trial(doubled, (0, 2 * half), ((0, half), (half, 2 * half)))
        except Exception:  # samples without an image, say, which code of users may not be able to take
            return None

    def _lacking_ways(self, batch: SampledBatch, bounds: Bounds, prober: Prober) -> list[Trial]:
        """Trials of samples that lack a modality: what code the task runs then, and how its values are cut."""
        places = prober.findings.places
        found: list[Trial] = []
        for names in modalities(batch):
            trial = self._other_way(batch.without(names), bounds, places.keys())
            if trial is not None:
                new = _keys(trial.whole.wired) - places.keys()
                places.update((key, slots) for key, slots in places_of([trial]).items() if key in new)
                self._compare(trial, prober, new)
                found.append(trial)
        return found

    def _look_at_disturbed(self, batch: SampledBatch, whole: Bounds, parts: tuple[Bounds, ...], prober: Prober) -> None:
        """Batches whose numbers were moved about count in code that all their parts run: the few samples,
        and these twice as drawn in other steps, since few are in order by chance.
        """
        generator, own = torch.Generator().manual_seed(0), batch.part(*whole)
        fields = {name: disturbed(value, generator) for name, value in own.items()}
        units = Units({unit: counts[: whole[1]] for unit, counts in batch.units.counts.items()})
        others = [fields]
        apart = {name: one_apart(own[name], dim) for name, (_, dim) in batch.places.items()}
        if any(value is not own[name] for name, value in apart.items()):
            others.append({**own, **apart})
        for other in (SampledBatch(other, units, batch.places) for other in others if len(parts) > 1):
            seen = self._look_at_other(other, whole, parts, prober)
            if seen is not None and not self.is_plain:
                self._look_at_singles(other, seen, prober)
        if len(parts) > 1 and not self.is_plain:
            self._look_at_singles(batch, self._part(batch, whole), prober)
            for name, (unit, dim) in batch.places.items():
                for number, value in enumerate(far_apart(own[name], unit, dim)):
                    far = SampledBatch({**own, name: value}, units, batch.places)
                    variant, alone = f"{name} {number}", ((0, 1), (1, whole[1]))
                    if self._look_at_other(far, whole, alone, prober, variant=variant) is None:
                        self._look_at_other(far, whole, parts, prober, variant=variant)
        end = 2 * whole[1]
        for step in range(1, 1 + (TRIALS if self.sites and self.sites.get("") else 1)):
            doubled = twice(batch, whole, step)
            cut = singly(doubled.units) if step == 1 else ((0, whole[1]), (whole[1], end))
            self._look_at_other(doubled, (0, end), cut, prober, step)

    def _look_at_other(
        self,
        batch: SampledBatch,
        whole: Bounds,
        parts: Sequence[Bounds],
        prober: Prober,
        step: int = 0,
        variant: str = "",
    ) -> Part | None:
        """What its whole is, where the task takes it. `variant`: what the batch has that layers have not seen."""
        try:
            trial = replace(self._trial(batch, whole, parts, step), variant=variant)
        except Exception:
            return None
        self._take_in(trial, prober)
        return trial.whole

    def _look_at_singles(self, batch: SampledBatch, whole: Part, prober: Prober) -> None:
        """Samples one by one, where they take something else than all: a full text alone may need no mask."""
        for low in range(*whole.bounds):
            with suppress(Exception):
                trial = Trial(batch, whole, (self._part(batch, (low, low + 1)),))
                if not trial.apart <= self.apart:
                    self._take_in(trial, prober)

    def _take_in(self, trial: Trial, prober: Prober) -> None:
        """What another trial shows of code that all its parts run."""
        same = set.intersection(*(_keys(part.wired) for part in (trial.whole, *trial.parts)))
        places, known = places_of([trial]), prober.findings.places
        found: dict[object, list[tuple[Place, ...]]] = {}
        for key, slots in known.items():
            own = places.get(key, slots)
            found[key] = [tuple(p for p in was if p in now) for was, now in zip(slots, own, strict=False)]
            if isinstance(key, str) and found[key] != slots:  # a block: its results are not cut in another way
                return
        known.update((key, slots) for key, slots in found.items() if key in same)
        self._compare(trial, prober, same)

    # -- one recording --------------------------------------------------------------------------------------------

    def record_samples(self, batch: SampledBatch, bounds: Bounds, step: int = 0) -> Recorded:
        """A recording of some samples. Of the first few, and where the task writes to its batch, on copies of them."""
        fields = batch.part(*bounds)
        if self.copies_batch is not False:
            fields = with_own_tensors(fields)
        versions = [(tensor, tensor._version) for tensor in tensors_in(fields)]
        stream = Stream(step=step, task=self.task.name, low=bounds[0], high=bounds[1], units=batch.units)
        found = self._recorded(fields, stream)
        self.copies_batch = bool(self.copies_batch) or any(tensor._version != version for tensor, version in versions)
        if self.skeleton.steady.unsettled:
            raise Unsettled
        self.is_plain &= found.is_plain and not _asks_in_layers(found.recording)
        check_loss(self.task, found)
        self._check_writes(found, (id(batch), bounds, step))
        return found

    def _check_writes(self, found: Recorded, samples: object) -> None:
        """What the task writes to parameters is the same for all samples."""
        if self.writes is None:
            self.writes = samples, found.recording.writes
        known, writes = self.writes
        name = differing(writes, found.recording.writes)
        if name:
            line = next((w.line for w in (*writes, *found.recording.writes) if w.target == name), "")
            how = " by max_norm=" if any(w.text.startswith("embedding") for w in writes if w.target == name) else ""
            what = f"changes from call to call. {CLOCK}" if samples == known else f"depends on the batch; {INSTEAD}"
            raise WorkloadError(
                f"task {self.task.name!r} writes{how} to parameter {name!r}{f' ({line})' if line else ''} outside of "
                f"the optimizer what {what}"
            )

    def _recorded(self, fields: Mapping[str, Any], stream: Stream) -> Recorded:
        noted = Undrawn(self.shapes)
        try:
            with noted:
                found = record(
                    self.skeleton,
                    self.task.function,
                    fields,
                    stream=stream,
                    sites=None if self.sites is None else self.sites.get("", ()),
                    autocast=computing_in(self.workload.precision, _CPU),
                )
        except Failure as failure:
            raise explained(self.task, failure, self.whole, self.workload.components) from failure.error
        if noted.lines:
            raise undrawn(f"task {self.task.name!r}", [f"{name} ({line})" for name, line in noted.lines.items()])
        return found

    def _find_changing_buffers(self, batch: SampledBatch) -> None:
        """Record until no buffer that is taken as a constant changes."""
        bounds, drawn = self.few[0][0], None
        for attempt in range(10):
            buffers = self.skeleton.buffers()
            before = {name: (buffer._version, buffer.clone()) for name, buffer in buffers.items()}
            by_line, drawn = drawn is not None, None
            try:
                with no_other_generators(self.task, by_line=by_line):
                    self.record_samples(batch, bounds)
            except Moved as error:
                drawn = error
            changed = set(self.skeleton.changed)
            for name, (version, value) in before.items():
                if buffers[name]._version != version or name in changed:
                    changed.add(name)
                    with torch.no_grad():
                        buffers[name].copy_(value)
            if drawn is not None and attempt:  # the first call may import modules, which may draw
                raise drawn
            if changed <= self.skeleton.stateful and drawn is None:
                return
            self._set_stateful(changed)

    def _set_stateful(self, changed: set[str]) -> None:
        """Record these buffers as such that change from now on; what was recorded of writes is out of date."""
        self.skeleton.set_stateful(changed)
        self.writes = None

    def _refuse_chance(self, batch: SampledBatch, bounds: Bounds, known: Recorded) -> None:
        """No layer may be left out by a number that is drawn: ranks wait for what a layer sends."""
        if not any(math.prod(shape) == 1 for shape in known.drawn[""].shapes):
            return
        calls = {node.block for node in known.recording.nodes}
        for step in range(1, CHANCES):
            recorded = self.record_samples(batch, bounds, step)
            differing = sorted(calls ^ {node.block for node in recorded.recording.nodes})
            if differing:
                raise WorkloadError(
                    f"task {self.task.name!r} calls {differing[0]} in some steps and leaves it out in others, by a "
                    "number that it draws (layerdrop); every step must call the same layers: set layerdrop=0 in the "
                    "model's config"
                )

    # -- warnings -------------------------------------------------------------------------------------------------

    def _warn_of_attention(self, found: Recorded) -> None:
        if any(drawn.written_out for drawn in found.drawn.values()):
            warnings.warn(
                f"task {self.task.name!r}: attention with dropout cannot use a fused kernel, since its mask must not "
                "depend on the plan, and takes more time and memory on GPUs; set attention dropout to 0 "
                "(attention_dropout=0)",
                SpindleWarning,
                stacklevel=6,
            )

    def _warn_of_caches(self, batch: SampledBatch) -> None:
        if self.skeleton.configs and "position_ids" in batch.fields and "attention_mask" not in batch.fields:
            warnings.warn(
                f"task {self.task.name!r}: the model's config has use_cache=True, which is off in planned runs; "
                "transformers looks for packed texts in position_ids only where it is off, so set "
                "config.use_cache=False, for a plain run to compute the same",
                SpindleWarning,
                stacklevel=6,
            )


def _asks_in_layers(recording: Recording) -> bool:
    """Whether a layer is given masks, lengths or the like of the batch, of which it may ask something."""
    given = {number for node in recording.nodes if node.block for number in node.aux()}
    return any(not recording.aux[number].is_floating_point() for number in given)


def _keys(wired: Wired) -> set[Key]:
    return {wired.key(number) for number in wired.glue()}


def _recordings(trials: Sequence[Trial]) -> Iterator[Wired]:
    """All recordings of some trials, of wholes and parts."""
    return (part.wired for trial in trials for part in (trial.whole, *trial.parts))
