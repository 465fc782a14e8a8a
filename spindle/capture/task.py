"""One task looked at: recordings of its first batches, whole and in parts, in; what capture needs to know out."""

import inspect
import itertools
import math
import os
import random
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spindle.capture.analysis import Findings, Part, Prober, Trial, places_of, sites_of
from spindle.capture.codes import computing_in
from spindle.capture.grouping import Key, Wired, wire
from spindle.capture.operators import Seen
from spindle.errors import SpindleWarning, WorkloadError
from spindle.graph import SAMPLES
from spindle.record.draws import GLOBAL_GENERATORS, Site, Stream
from spindle.record.lazy import LazyRead, Refused, Stranger
from spindle.record.randomness import Undrawn, undrawn
from spindle.record.run import Failure, Recorded, record
from spindle.record.skeleton import Skeleton
from spindle.units import Bounds, Place, SampledBatch, Units
from spindle.workload import Task, Workload

PROBE_SAMPLES = 5
CHANCES = 8  # steps in which the layers called are compared, where numbers are drawn that may decide that
LOOKED_AT, TRIALS = 8, 3  # batches of a list that are read, and those of different shapes among them that are used

_CPU = torch.device("cpu")


class TakeWhole(Exception):
    """A component's own code cannot be recorded, so that it must run as one operator."""

    def __init__(self, component: str, warning: str) -> None:
        super().__init__(warning)
        self.component, self.warning = component, warning


@dataclass
class Looker:
    """Looks at the tasks of one workload; `known_blocks` holds whether each kind of block mixes samples."""

    workload: Workload
    skeleton: Skeleton
    known_blocks: dict[str, bool]
    whole: frozenset[str] = frozenset()

    def look(self, task: Task) -> Seen:
        """Record some batches of a task. Raises WorkloadError when its code cannot be run as planned, TakeWhole when a
        component must be taken whole.
        """
        batches = first_batches(task)
        self._copies_batch: bool | None = None  # whether the task writes to its batch; None: not known yet
        self._find_changing_buffers(task, batches[0])
        few = [_few(batch.units) for batch in batches]
        shaped = [self._trial(task, batch, *samples, None) for batch, samples in zip(batches, few, strict=True)]
        sites = sites_of(shaped)
        trials = shaped if not sites else self._trials(task, batches, few, sites)
        telling = [trial for trial in trials if len(trial.parts) > 1]
        others = self._other_ways(task, batches[0], trials, sites)
        trials, telling = trials + others, telling and telling + others
        findings = Findings()
        findings.places = places_of(telling or trials)
        prober = self._prober(task, findings, sites)
        for trial in telling:
            prober.look(trial)
        if not telling and batches[0].units.num_samples > 1:
            self._take_as_mixing(task, trials, findings)
        self._look_at_disturbed(task, batches[0], few[0], sites, prober)
        whole = self._record(task, batches[0], (0, batches[0].units.num_samples), sites)
        self._refuse_chance(task, batches[0], few[0][0], sites, whole)
        self._warn_of_attention(task, whole)
        self._warn_of_caches(task, batches[0])
        return Seen(
            batch=batches[0],
            whole=whole,
            few=self._record(task, batches[0], few[0][0], sites),
            few_bounds=few[0][0],
            findings=findings,
            sites=sites,
            stateful=frozenset(self.skeleton.stateful),
            copies_batch=bool(self._copies_batch),
            others=tuple(part.wired for trial in trials for part in (trial.whole, *trial.parts)),
        )

    def _take_as_mixing(self, task: Task, trials: Sequence[Trial], findings: Findings) -> None:
        """No batch seen shows how its samples are cut: all that the task computes exists whole only."""
        warnings.warn(
            f"task {task.name!r}: its first batch has rows of a packed field in one sample only, so nothing shows how "
            "its values are cut by sample, and each of its operators runs on one device; start with a batch in which "
            "two samples have rows, or give a list of batches",
            SpindleWarning,
            stacklevel=6,
        )
        for wired in (trial.whole.wired for trial in trials):
            findings.mixing.update(wired.key(n) for n in wired.glue())
            findings.mixing_blocks.update(wired.recording.nodes[n].block for n in wired.blocks())

    def _prober(self, task: Task, findings: Findings, sites: Mapping[str, tuple[Site, ...]]) -> Prober:
        named: dict[str, Tensor] = {**dict(self.workload.named_parameters()), **dict(self.workload.named_buffers())}
        paths = {block.path: block for block in self.skeleton.blocks}
        modules = {path: block.module for path, block in paths.items()}
        kinds = {path: block.kind for path, block in paths.items()}
        return Prober(task.name, named, modules, kinds, findings, sites, self.known_blocks)

    def _trials(
        self,
        task: Task,
        batches: Sequence[SampledBatch],
        few: Sequence[tuple[Bounds, tuple[Bounds, ...]]],
        sites: Mapping[str, tuple[Site, ...]],
    ) -> list[Trial]:
        return [self._trial(task, batch, *samples, sites) for batch, samples in zip(batches, few, strict=True)]

    def _trial(
        self,
        task: Task,
        batch: SampledBatch,
        whole: Bounds,
        parts: tuple[Bounds, ...],
        sites: Mapping[str, tuple[Site, ...]] | None,
        step: int = 0,
    ) -> Trial:
        made = [self._part(task, batch, bounds, sites, step) for bounds in (whole, *parts)]
        return Trial(batch.units, made[0], tuple(made[1:]))

    def _other_ways(
        self, task: Task, batch: SampledBatch, trials: Sequence[Trial], sites: Mapping[str, tuple[Site, ...]]
    ) -> list[Trial]:
        """Trials of samples for which the task runs code that it did not run for a whole: a mask of ones is left out,
        say. These samples twice are a whole that goes the same way.
        """
        known = {key for trial in trials for key in _keys(trial.whole.wired)}
        found: list[Trial] = []
        singles = [(i, i + 1) for i in range(min(PROBE_SAMPLES, batch.units.num_samples))]
        for bounds in dict.fromkeys([part.bounds for part in trials[0].parts] + singles):
            try:
                keys = _keys(self._part(task, batch, bounds, sites).wired)
                if keys <= known:
                    continue
                twice = _twice(batch, bounds)
                half = twice.units.num_samples // 2
                trial = self._trial(task, twice, (0, 2 * half), ((0, half), (half, 2 * half)), sites)
            except Exception:  # samples without an image, say, which code of users may not be able to take alone
                continue
            known |= keys
            found.append(trial)
        return found

    def _part(
        self,
        task: Task,
        batch: SampledBatch,
        bounds: Bounds,
        sites: Mapping[str, tuple[Site, ...]] | None,
        step: int = 0,
    ) -> Part:
        recorded = self._record(task, batch, bounds, sites, step)
        draws = {scope: drawn.shapes for scope, drawn in recorded.drawn.items()}
        return Part(bounds, wire(recorded.recording, self.skeleton.stateful), draws, step)

    def _look_at_disturbed(
        self,
        task: Task,
        batch: SampledBatch,
        samples: tuple[Bounds, tuple[Bounds, ...]],
        sites: Mapping[str, tuple[Site, ...]],
        prober: Prober,
    ) -> None:
        """Batches whose numbers were moved about count in code that all their parts run: the few samples,
        and these twice as drawn in other steps, since few are in order by chance.
        """
        generator = torch.Generator().manual_seed(0)
        whole, parts = samples
        fields = {name: _disturbed(value, generator) for name, value in batch.part(*whole).items()}
        units = Units({unit: counts[: whole[1]] for unit, counts in batch.units.counts.items()})
        if len(parts) > 1:
            self._look_at_other(task, SampledBatch(fields, units, batch.places), whole, parts, sites, prober)
        end = 2 * whole[1]
        for step in range(1, 1 + (TRIALS if sites.get("") else 1)):
            twice = _twice(batch, whole, step)
            cut = _singly(twice.units) if step == 1 else ((0, whole[1]), (whole[1], end))
            self._look_at_other(task, twice, (0, end), cut, sites, prober, step)

    def _look_at_other(
        self,
        task: Task,
        batch: SampledBatch,
        whole: Bounds,
        parts: tuple[Bounds, ...],
        sites: Mapping[str, tuple[Site, ...]],
        prober: Prober,
        step: int = 0,
    ) -> None:
        try:
            trial = self._trial(task, batch, whole, parts, sites, step)
        except Exception:
            return
        same = set.intersection(*(_keys(part.wired) for part in (trial.whole, *trial.parts)))
        places, known = places_of([trial]), prober.findings.places
        found: dict[object, list[tuple[Place, ...]]] = {}
        for key, slots in known.items():
            own = places.get(key, slots)
            found[key] = [tuple(p for p in was if p in now) for was, now in zip(slots, own, strict=False)]
            if isinstance(key, str) and found[key] != slots:  # a block: its results are not cut in another way
                return
        known.update((key, slots) for key, slots in found.items() if key in same)
        prober.look(trial, same)

    # -- one recording --------------------------------------------------------------------------------------------

    def _record(
        self,
        task: Task,
        batch: SampledBatch,
        bounds: Bounds,
        sites: Mapping[str, tuple[Site, ...]] | None,
        step: int = 0,
    ) -> Recorded:
        """A recording of some samples. Of the first few, and where the task writes to its batch, on copies of them."""
        fields = batch.part(*bounds)
        if self._copies_batch is not False:
            fields = {name: value.clone() if isinstance(value, Tensor) else value for name, value in fields.items()}
        versions = {name: value._version for name, value in fields.items() if isinstance(value, Tensor)}
        stream = Stream(step=step, task=task.name, low=bounds[0], high=bounds[1], units=batch.units)
        noted = Undrawn()
        try:
            with noted:
                found = record(
                    self.skeleton,
                    task.function,
                    fields,
                    stream=stream,
                    sites=None if sites is None else sites.get("", ()),
                    autocast=computing_in(self.workload.precision, _CPU),
                )
        except Failure as failure:
            raise self._explained(task, failure) from failure.error
        if noted.names:
            raise undrawn(f"task {task.name!r}", noted.names)
        self._copies_batch = bool(self._copies_batch) or any(
            fields[name]._version != version for name, version in versions.items()
        )
        if found.result is not None or found.recording.loss < 0:
            raise WorkloadError(_no_loss(task, found.result))
        _check_loss(task, found)
        self._refuse_written_parameters(task, found)
        return found

    def _find_changing_buffers(self, task: Task, batch: SampledBatch) -> None:
        """Record until no buffer that is taken as a constant changes."""
        bounds = _few(batch.units)[0]
        for attempt in range(10):
            buffers = self.skeleton.buffers()
            before = {name: (buffer._version, buffer.clone()) for name, buffer in buffers.items()}
            drawn = None
            try:
                with _no_other_generators(task):
                    self._record(task, batch, bounds, None)
            except _Moved as error:
                drawn = error
            changed = set(self.skeleton.changed)
            for name, (version, value) in before.items():
                if buffers[name]._version != version:
                    changed.add(name)
                    with torch.no_grad():
                        buffers[name].copy_(value)
            if drawn is not None and attempt:  # the first call may import modules, which may draw
                raise drawn
            if changed <= self.skeleton.stateful and drawn is None:
                return
            self.skeleton.set_stateful(changed)

    def _refuse_chance(
        self, task: Task, batch: SampledBatch, bounds: Bounds, sites: Mapping[str, tuple[Site, ...]], known: Recorded
    ) -> None:
        """No layer may be left out by a number that is drawn: ranks wait for what a layer sends."""
        if not any(math.prod(shape) == 1 for shape in known.drawn[""].shapes):
            return
        calls = {node.block for node in known.recording.nodes}
        for step in range(1, CHANCES):
            recorded = self._record(task, batch, bounds, sites, step)
            differing = sorted(calls ^ {node.block for node in recorded.recording.nodes})
            if differing:
                raise WorkloadError(
                    f"task {task.name!r} calls {differing[0]} in some steps and leaves it out in others, by a number "
                    "that it draws (layerdrop); every step must call the same layers: set layerdrop=0 in the model's "
                    "config"
                )

    def _refuse_written_parameters(self, task: Task, found: Recorded) -> None:
        parameters = {name for name, _ in self.workload.named_parameters()}
        written = sorted({n for node in found.recording.nodes for n in node.writes if n in parameters})
        if written:
            raise WorkloadError(
                f"task {task.name!r} writes to parameter {written[0]!r} outside of the optimizer, which the other "
                "ranks would not see; do it after the step, in a callback"
            )

    def _explained(self, task: Task, failure: Failure) -> Exception:
        """What to tell the user of a task function that raised while it was recorded."""
        error = failure.error
        if isinstance(error, WorkloadError):
            return error
        place = _place(error, task)
        if isinstance(error, Stranger):
            return WorkloadError(
                f"task {task.name!r}{place} uses a trainable parameter ({error}) of no component, which "
                "would never be trained; register its module by workload.component(...), or freeze it"
            )
        component = failure.component.partition("@")[0] or failure.block.partition(".")[0]
        if component and component not in self.whole and not _is_users(error):
            return TakeWhole(component, _whole_warning(task, component, error))
        if isinstance(error, NotImplementedError):
            return WorkloadError(
                f"task {task.name!r}{place}: it takes as many rows as a value computed from parameters tells (y[y > "
                "0], nonzero(), unique()); use torch.where, or put it into a module and register that"
            )
        if isinstance(error, LazyRead):
            return WorkloadError(
                f"task {task.name!r}{place}: it branches on a value computed from parameters (if, while, int(), "
                ".item()); use torch.where, or put it into a module and register that"
            )
        if isinstance(error, Refused):
            return WorkloadError(f"task {task.name!r}{place}: {error}")
        remedy = "Mend that line"
        if "cuda" in str(error).lower() or "NVIDIA" in str(error):
            remedy = "Leave devices out (.cuda(), .to(device)): modules and batches are moved to where they run"
        return WorkloadError(
            f"task {task.name!r} raised {type(error).__name__} while it was recorded{place}: {_reason(error)}. {remedy}"
        )

    def _warn_of_attention(self, task: Task, found: Recorded) -> None:
        if any(drawn.written_out for drawn in found.drawn.values()):
            warnings.warn(
                f"task {task.name!r}: attention with dropout cannot use a fused kernel, since its mask must not depend "
                "on the plan, and takes more time and memory on GPUs; set attention dropout to 0 (attention_dropout=0)",
                SpindleWarning,
                stacklevel=6,
            )

    def _warn_of_caches(self, task: Task, batch: SampledBatch) -> None:
        if self.skeleton.configs and "position_ids" in batch.fields and "attention_mask" not in batch.fields:
            warnings.warn(
                f"task {task.name!r}: the model's config has use_cache=True, which is off in planned runs; "
                "transformers looks for packed texts in position_ids only where it is off, so set "
                "config.use_cache=False, for a plain "
                "run to compute the same",
                SpindleWarning,
                stacklevel=6,
            )


def first_batches(task: Task) -> list[SampledBatch]:
    """The first batch of a task; of a list also others of different shapes, which show how sizes vary.

    Raises WorkloadError when the loader raises, or gives what a task cannot take.
    """
    if type(task.data) not in (list, tuple):
        return _read_on(task, task.sampled(task.first_batch()))
    found: list[SampledBatch] = []
    for batch in itertools.islice(task.data, LOOKED_AT):  # type: ignore[arg-type]
        one = task.sampled(batch)
        if all(one.shapes != other.shapes for other in found) and len(found) < TRIALS:
            found.append(one)
    return found or [task.sampled(task.first_batch())]


def _read_on(task: Task, first: SampledBatch) -> list[SampledBatch]:
    """The first batch, and, where it cannot tell packed fields apart (one image in each sample, say), one that can."""
    alike = {pair for pair in _pairs(first.units) if not _told_apart(first.units, pair)}
    if not alike:
        return [first]
    with suppress(Exception):  # a loader that breaks later says so when it gets there
        for batch in itertools.islice(task.batches(), 1, LOOKED_AT):
            other = task.sampled(batch)
            if any(_told_apart(other.units, pair) for pair in alike):
                return [first, other]
    return [first]


def _pairs(units: Units) -> list[tuple[str, str]]:
    """Units that a value might go by either of; fields that lie side by side, as ids and labels of packed texts, do."""
    counts = units.counts
    return [(a, b) for a, b in itertools.combinations(counts, 2) if SAMPLES in (a, b) or counts[a] != counts[b]]


def _told_apart(units: Units, pair: tuple[str, str]) -> bool:
    """Whether some part of a batch has another share of the rows of one unit than of the other, and not all of them."""
    size = units.num_samples
    return any(_tells(units, pair, size, cut) and _is_shared(units, size, cut) for cut in range(1, size))


def _is_shared(units: Units, count: int, cut: int) -> bool:
    """Whether samples before and after `cut` both have rows of each unit of which the batch has any."""
    return all(0 < offsets[cut] < offsets[count] for offsets in units.offsets.values() if offsets[-1])


def _tells(units: Units, pair: tuple[str, str], count: int, cut: int) -> bool:
    a, b = units.offsets[pair[0]], units.offsets[pair[1]]
    return a[cut] * b[count] != b[cut] * a[count]


def _keys(wired: Wired) -> set[Key]:
    return {wired.key(number) for number in wired.glue()}


def _twice(batch: SampledBatch, bounds: Bounds, seed: int = 0) -> SampledBatch:
    """Some samples, and the same again with noise on their numbers."""
    generator = torch.Generator().manual_seed(seed)
    fields = batch.part(*bounds)
    for name, (_, dim) in batch.places.items():
        value = fields[name]
        if isinstance(value, Tensor):
            fields[name] = torch.cat([value, _disturbed(value, generator, masks=False)], dim)
        else:
            fields[name] = value + value
    counts = {unit: rows[bounds[0] : bounds[1]] * 2 for unit, rows in batch.units.counts.items()}
    return SampledBatch(fields, Units(counts), batch.places)


def _singly(units: Units) -> tuple[Bounds, ...]:
    """As many parts of a batch as can be of which each has rows of every unit: chance may hide what passes from one
    sample to the next at some place, but hardly at all of them.
    """
    found: list[Bounds] = []
    low, size = 0, units.num_samples
    needed = [offsets for offsets in units.offsets.values() if offsets[-1]]
    for high in range(1, size + 1):
        if all(offsets[low] < offsets[high] < offsets[-1] or high == size for offsets in needed):
            found.append((low, high))
            low = high
    if len(found) > 1 and any(offsets[found[-1][0]] == offsets[size] for offsets in needed):
        found[-2:] = [(found[-2][0], size)]
    return tuple(found)


def _few(units: Units) -> tuple[Bounds, tuple[Bounds, ...]]:
    """A few samples of a batch, and uneven parts of them, so that a mean of means differs from the mean; each part has
    rows of every unit that the batch has, and other shares of them where units differ. One part where no two have.
    """
    size = units.num_samples
    pairs = [pair for pair in _pairs(units) if _told_apart(units, pair)]
    best = -1
    found: tuple[Bounds, tuple[Bounds, ...]] = ((0, size), ((0, size),))
    for count in range(min(PROBE_SAMPLES, size), size + 1):
        for cut in sorted(range(1, count), key=lambda end: abs(end - (count - 1) // 2)):
            told = sum(_tells(units, pair, count, cut) for pair in pairs)
            if told > best and _is_shared(units, count, cut):
                best, found = told, ((0, count), ((0, cut), (cut, count)))
        if best == len(pairs):
            break
    return found


def _disturbed(value: Any, generator: torch.Generator, *, masks: bool = True) -> Any:
    """A field with noise on its numbers; a mask of ones cut short. Whole numbers stay: a model may demand their
    order.
    """
    if not isinstance(value, Tensor) or not value.numel():
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)
        return value + noise * (float(value.double().std(correction=0)) or 1.0)
    if masks and value.ndim > 1 and bool((value == 1).all()):
        lengths = torch.randint(1, value.shape[-1] + 1, value.shape[:-1], generator=generator)
        return value * (torch.arange(value.shape[-1]) < lengths[..., None]).to(value.dtype)
    return value


# -- what goes wrong --------------------------------------------------------------------------------------------------


def _no_loss(task: Task, result: object) -> str:
    if isinstance(result, Tensor) and result.is_floating_point() and result.numel() == 1:
        return f"task {task.name!r}: its loss needs no gradient; let it depend on a trained parameter"
    return f"task {task.name!r} returned {_told(result)}; return the loss, one floating-point scalar"


def _check_loss(task: Task, found: Recorded) -> None:
    recording = found.recording
    shape, dtype = recording.shapes[recording.loss], recording.dtypes[recording.loss]
    made = torch.empty(shape, dtype=dtype, device="meta")
    if made.ndim > 1 or made.numel() != 1 or not made.is_floating_point():
        raise WorkloadError(f"task {task.name!r} returned {_told(made)}; return the loss, one floating-point scalar")
    if not recording.needs_grad[recording.loss]:
        raise WorkloadError(f"task {task.name!r}: its loss needs no gradient; let it depend on a trained parameter")


def _told(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return "None" if loss is None else f"a {type(loss).__name__}"
    dtype = str(loss.dtype).removeprefix("torch.")
    return f"a {dtype} tensor of {loss.ndim} dimensions" if loss.ndim else f"a scalar of {dtype}"


def _is_users(error: Exception) -> bool:
    """Whether an error would be raised in a plain run too: what a recording cannot do fails in other ways."""
    return not isinstance(error, LazyRead | Refused | NotImplementedError | RuntimeError)


def _whole_warning(task: Task, component: str, error: Exception) -> str:
    reason = "it branches on a value computed from parameters" if isinstance(error, LazyRead) else _reason(error)
    return (
        f"task {task.name!r}: component {component!r} cannot be recorded and runs as one operator: {reason}"
        f"{_innermost(error)}; take what depends on such values out of it, or name parts of it that stand alone, as in "
        "layers=['visual']"
    )


def _innermost(error: Exception) -> str:
    """The innermost line outside of torch and of us that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}torch{os.sep}" not in frame.filename and f"{os.sep}spindle{os.sep}" not in frame.filename
    ]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _place(error: BaseException, task: Task) -> str:
    """The last line of the task function's file that was running."""
    code = getattr(inspect.unwrap(task.function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if code is not None and f.filename == code.co_filename]
    return f", line {lines[-1]} of {os.path.basename(code.co_filename)}" if code is not None and lines else ""


class _Moved(WorkloadError):
    """A generator that is not ours has drawn."""


@contextmanager
def _no_other_generators(task: Task) -> Iterator[None]:
    """Numbers of Python's or numpy's generators would differ between ranks."""
    alone = GLOBAL_GENERATORS.acquire(timeout=5.0)  # a loader of another run moves them too; one that hangs we outwait
    try:
        before = random.getstate(), np.random.get_state()
        yield
        after = random.getstate(), np.random.get_state()
    finally:
        if alone:
            GLOBAL_GENERATORS.release()
    for name, old, new in zip(("random", "numpy.random"), map(repr, before), map(repr, after), strict=True):
        if old != new:
            raise _Moved(
                f"task {task.name!r} draws from {name} in its function or model, which would give every rank other "
                "numbers; draw with torch, or in the loader"
            )


def refuse_gradient_hooks(workload: Workload, inside: set[nn.Module]) -> None:
    """Recorded calls carry none, and parameters of a run are copies. Inside blocks modules keep theirs."""
    for name, parameter in workload.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"parameter {name!r} has a gradient hook, which would see the gradients of parts of the batch; "
                "remove it and change gradients in the optimizer"
            )
    for component in workload.components.values():
        for path, module in component.module.named_modules():
            if module not in inside and (module._backward_hooks or module._backward_pre_hooks):
                raise WorkloadError(
                    f"component {component.name!r}: module {path!r} has a backward hook outside of blocks, which a "
                    "recording does not carry; remove it, or let layers= name a list of blocks that holds the module"
                )
