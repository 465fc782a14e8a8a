"""Worker: one rank. Program, codes, loaders and optimizer in; losses, spans and trained tensors out.

It knows nothing of Ray: the same class runs in threads, in spawned processes, under torchrun and inside a Ray actor.
"""

import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import CheckpointError
from spindle.record.recording import LeafWrite
from spindle.record.writes import OwnWrite
from spindle.runtime.checkpoints.tensor_files import Entry, write_tensors
from spindle.runtime.checkpoints.weights import fill
from spindle.runtime.checkpoints.writing import Writing
from spindle.runtime.comms.flight import Flight, file_of
from spindle.runtime.comms.pulse import noted
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.runtime.devices import move_modules
from spindle.runtime.drift import Drift
from spindle.runtime.evaluation.evaluator import Evaluator, Scored, beside
from spindle.runtime.faults.replicas import Replicas
from spindle.runtime.loading.batches import Batches
from spindle.runtime.loading.counts import Counts
from spindle.runtime.loading.data import Feed, is_listed
from spindle.runtime.loading.recordings import Recordings
from spindle.runtime.loading.shared_batches import shared_reads
from spindle.runtime.parallel.layers import Switch, cut_codes
from spindle.runtime.programs.passes import restricted
from spindle.runtime.rank_spec import RankSpec
from spindle.runtime.startup import Phases
from spindle.runtime.steps.clock import Clock
from spindle.runtime.steps.compiled import compile_layers
from spindle.runtime.steps.executor import Executor, Fetch, Observe
from spindle.runtime.steps.flats import make_rows
from spindle.runtime.steps.record import Stepped
from spindle.runtime.steps.state import momenta
from spindle.runtime.steps.store import ParameterStore
from spindle.runtime.updates.averages import PREFIX as AVERAGE
from spindle.runtime.updates.averages import Averages, averaged, brought
from spindle.runtime.updates.made import (
    Made,
    changed_settings,
    check_schedule,
    made_optimizer,
    made_schedule,
    sentences_of,
)
from spindle.runtime.updates.masters import master_tensors, split_masters, states_for
from spindle.runtime.updates.optimizers import Optimization, rank_optimizer
from spindle.runtime.updates.progress import (
    PREFIX,
    Progress,
    load_optimizer,
    optimizer_progress,
    optimizer_tensors,
)
from spindle.runtime.updates.schedules import make_schedule, step_schedule
from spindle.runtime.watch import RankStep, rank_step
from spindle.values.graph import base_task, num_micro_batches, parse_piece
from spindle.values.trace import Span
from spindle.workload import Task


@dataclass(slots=True)
class Report:
    """What a rank has to tell after some steps: losses by step, spans, and gradients by step when asked for. `ended`
    names the task whose data ended, when there are fewer steps than asked for.
    """

    rank: int
    losses: list[dict[str, float]] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    ended: str | None = None
    steps: list[RankStep] = field(default_factory=list)  # of each step
    memory_bytes: int = 0  # the most that it has held
    on_gpu: bool = False  # whether memory_bytes are those of a GPU, not of a process
    drift: dict[str, str] = field(default_factory=dict)  # sentences on batches that the plan was not made for, by task
    learning_rates: dict[str, float] = field(default_factory=dict)  # after the last step, by parameter group
    stops: bool = False  # it was asked to end
    skipped: dict[int, str] = field(default_factory=dict)  # what was not finite here in steps in which nobody stepped
    full: str = ""  # which limit on samples or tokens is reached


@dataclass(frozen=True, slots=True)
class _Late:
    """A step, counted from 1, that was given to the device at a moment of this process, and tokens by task in it."""

    step: int
    began_s: float
    stepped: Stepped
    tokens: dict[str, int]


def _feeds(tasks: Mapping[str, Task], spec: RankSpec, transport: Transport) -> dict[str, Feed]:
    """Feeds of the tasks that a rank loads. All ranks come here together, since ranks of a machine share batches."""
    read = [name for name, task in tasks.items() if not is_listed(task)]
    in_flight = num_micro_batches(task for task, _ in spec.program.losses)
    if any(task.weigh != "micro-batches" for task in spec.tasks.values()):
        in_flight *= spec.rounds  # which are looked at before the first
    shared = shared_reads(transport, read, in_flight=in_flight, timeout_s=spec.timeout_s)
    return {
        name: Feed(task, spec.seed, timeout_s=spec.timeout_s, shared=shared.get(name), cores=transport.cores)
        for name, task in tasks.items()
    }


class Worker:
    """One rank, ready to run."""

    def __init__(self, spec: RankSpec, transport: Transport) -> None:
        """Takes over the codes of `spec`, moves them to the transport's device, and makes the program's groups; on a
        CPU also the rank's share of the cores.
        """
        self.phases = Phases()
        if spec.flight is not None:
            transport.pulse.flight = Flight(file_of(spec.flight, spec.rank), spec.rank, transport.num_ranks)
        with noted(transport.pulse):
            transport.pulse.at("start, model")
            with self.phases("model"):
                self._make(spec, transport)
            transport.pulse.at("start, groups")
            with self.phases("groups"):
                transport.make_groups(spec.groups, spec.links)

    def _make(self, spec: RankSpec, transport: Transport) -> None:
        if transport.device.type == "cpu":
            torch.set_num_threads(transport.num_threads)
        self.switch = Switch()
        self.codes = cut_codes(beside(spec.codes, spec.evaluation), spec.cuts, self.switch)
        rows = make_rows(spec.program, spec.rank, self.codes.values(), spec.weights, transport.device, spec.numbers)
        fill(self.codes.values(), spec.weights, transport.device)
        spec = replace(spec, weights={})  # which may hold numbers that are on the device now
        self.spec, self.transport, self.clock = spec, transport, Clock()
        move_modules([code.module for code in self.codes.values()], transport.device)
        for row in rows.values():
            row.check()
        compile_layers(self.codes)
        self.store = ParameterStore(spec.program, spec.rank, self.codes.values(), rows, spec.numbers)
        loads = {base_task(task) for task in spec.program.loaded_by(spec.rank)}
        self.feeds = _feeds({name: spec.tasks[name] for name in sorted(loads)}, spec, transport)
        self.optimization: Optimization | None = None
        if spec.optimizer is not None:
            own = self._stepped(self.store.updated).items()
            self.optimization = rank_optimizer(spec.optimizer, spec.parameters, own, spec.settings, transport.device)
        self.optimizer = self.optimization.optimizer if self.optimization else None
        self.made: Made | None = made_optimizer(self.optimizer) if self.optimizer else None
        self.scheduler = make_schedule(spec.scheduler, self.optimization, spec.metric) if self.optimization else None
        self.made_schedule = made_schedule(self.scheduler)
        self.recordings = Recordings(spec.recipe, transport.streams)
        self.batches = Batches(
            spec.program,
            spec.rank,
            self.feeds,
            self.recordings,
            seed=spec.seed,
            rounds=spec.rounds,
            takes_part=self._taking_part,
            ahead=transport.streams if transport.streams.ahead else None,
            drift=Drift(spec.sizes),
        )
        layers = [layer for tally in spec.program.tallies for layer in tally.layers]
        self.momenta = momenta(spec.recipe.skeleton.components, layers)
        self.clocks: dict[str, dict[str, Tensor]] = {}  # by parameter that is written by them
        self.writes = {
            (base_task(task), w.target): self._own_clocks(w)
            for task, code in spec.recipe.codes.items()
            for w in code.writes
        }
        trained = [name for name, task in spec.tasks.items() if task.weight]
        self.counts = Counts(trained, self.feeds, spec.limits, transport)
        self.executors: dict[frozenset[str], Executor] = {}
        self.evaluator = Evaluator(spec.evaluation, self, self._evaluated_feeds()) if spec.evaluation else None
        self.resting: dict[str, Tensor] = {}  # optimizer states of parameters that nobody steps in this run; on rank 0
        self.numbers: dict[str, str] = {}  # which optimizer states of the checkpoint are numbers
        self.steps_done, self.saving = 0, Writing()
        self.replicas = Replicas(spec.replicas, transport, self.store, self.optimizer, spec.check_replicas_every)
        self.averages = Averages(spec.ema) if spec.ema is not None else None

    def _evaluated_feeds(self) -> dict[str, Feed]:
        assert self.spec.evaluation is not None
        found = self.spec.evaluation
        loads = sorted(found.program.loaded_by(self.spec.rank))
        return _feeds({name: found.tasks[name] for name in loads}, self.spec, self.transport)

    def evaluate(self) -> Scored:
        """Evaluate; the scores of the tasks whose outputs come together on this rank. Training is as it was then."""
        assert self.evaluator is not None, "a run evaluates what it was prepared for"
        self.batches.settle()
        return self.evaluator.run()

    def _own_clocks(self, write: LeafWrite) -> OwnWrite:
        """A write with clocks of this rank, one for each parameter whatever task writes to it."""
        own = self.clocks.setdefault(write.target, {})
        for name in write.clocks:
            if name not in own:
                own[name] = self.spec.clocks[name].to(self.transport.device).clone()
        return OwnWrite(write, own)

    def started(self) -> dict[str, float]:
        """Seconds of this rank's start-up, by phase."""
        return dict(self.phases.seconds)

    def digests(self) -> dict[str, str]:
        """Fingerprint of the next batch of each task that this rank loads: equal on all ranks that load it."""
        feeds = {**self.feeds}
        if self.evaluator is not None:
            feeds |= {f"evaluation {name}": feed for name, feed in self.evaluator.feeds.items()}
        return {name: feed.digest() for name, feed in feeds.items()}

    def run(self, steps: int, *, keep_spans: bool = True, keep_gradients: bool = False) -> Report:
        """Run some steps; the report holds spans and gradients of every step if they are to be kept.

        Spans tell moments on the first rank's clock, which all agree on first. A GPU is given a step before the numbers
        of the one before are read, so that it never waits for the process.
        """
        report, streams = Report(self.spec.rank), self.transport.streams
        streams.enter_thread()
        if keep_spans and self.transport.num_ranks > 1:
            self.clock.agree(self.transport, tuple(range(self.transport.num_ranks)))
        streams.set_origin()
        observe = report.gradients.append if keep_gradients else None
        self._reported_s, late = 0.0, list[_Late]()
        self.recordings.checking = keep_gradients
        for _ in range(steps):
            report.ended, report.full = self._ended(), self.counts.reached()
            if report.ended is not None or report.full:
                break
            self.replicas.look(self.steps_done)
            self.batches.tokens.clear()
            self.batches.samples.clear()
            began = time.perf_counter()
            stepped = self._step(observe)
            self.counts.take(self._trained(self.batches.samples), self._trained(self.batches.tokens))
            late.append(_Late(self.steps_done, began, stepped, dict(self.batches.tokens)))
            while len(late) > streams.ahead:
                self._report(report, late.pop(0), keep_spans)
        for each in late:
            self._report(report, each, keep_spans)
        self.batches.settle()
        report.drift = dict(self.batches.drift.found)
        report.stops = self.transport.pulse.stops
        report.memory_bytes = streams.peak_bytes()
        report.on_gpu = self.transport.device.type == "cuda"
        report.learning_rates = self.optimization.learning_rates() if self.optimization else {}
        return report

    def _report(self, report: Report, late: "_Late", keep_spans: bool) -> None:
        """Wait for the numbers of a step, and report them. A device that does not come may wait for other ranks."""
        pulse = self.transport.pulse
        pulse.wait(True)
        record = late.stepped.record()
        pulse.wait(False)
        now_s = time.perf_counter()
        report.steps.append(rank_step(now_s - max(late.began_s, self._reported_s), record, late.tokens))
        self._reported_s = now_s
        report.losses.append(record.losses)
        report.grad_norms.append(record.grad_norm)
        if pulse.flight is not None:
            pulse.flight.done(late.step, record.losses, record.grad_norm, self.transport.streams)
        if record.skipped is not None:
            report.skipped[late.step] = record.skipped
        if keep_spans:
            report.spans += [span.later(self.clock.offset_s) for span in record.spans]

    def _ended(self) -> str | None:
        """A task that is to stop the training and lacks a batch for the next step. All ranks give the same answer."""
        stopping = [name for name in self._tasks() if self.spec.tasks[name].on_end == "stop"]
        if not stopping:
            return None
        self.batches.wait()
        count = self.spec.rounds * self.batches.in_flight
        lacking = [name in self.feeds and not self.feeds[name].holds(count) for name in stopping]
        flags = torch.tensor(lacking, dtype=torch.float32)
        sum_over_all(flags, self.transport)
        return next((name for name, flag in zip(stopping, flags.tolist(), strict=True) if flag), None)

    def _trained(self, counted: Mapping[str, int]) -> dict[str, int]:
        """What was counted of tasks that have a backward."""
        return {name: count for name, count in counted.items() if self.spec.tasks[name].weight}

    def _tasks(self) -> list[str]:
        """Tasks that take part in the next step."""
        return self._taking_part(self.steps_done)

    def _taking_part(self, step: int) -> list[str]:
        return [name for name, task in self.spec.tasks.items() if task.takes_part(step, self.spec.seed)]

    def _step(self, observe: Observe | None) -> Stepped:
        spec, tasks = self.spec, frozenset(self._tasks())
        executor = self._executor(tasks)
        stepped = executor.step(
            self._rounds(), observe=observe, step=self.steps_done, rounds=spec.rounds, seed=spec.seed
        )
        if self.optimizer is not None and (self.store.updated or self.scheduler) and not executor.updated:
            with self.store.without_gradients(self.store.updated):
                self.optimizer.step()  # what it counts by group goes on, where nothing is held that this step updates
        if self.scheduler is not None:
            step_schedule(self.scheduler, spec.metric, lambda: self._losses_of_all(stepped.record().losses))
        self.steps_done += 1
        if self.averages is not None and stepped.skipped is None:
            self.averages.update(self.steps_done, self._averaged)
        return stepped

    def _losses_of_all(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Losses of this step's tasks, of whichever ranks computed them; of micro-batches in flight their mean."""
        tasks = self._tasks()
        own = [[loss for name, loss in losses.items() if base_task(name) == task] for task in tasks]
        sums = [[sum(values) for values in own], [len(values) for values in own]]
        found = torch.tensor(sums, dtype=torch.float64)
        sum_over_all(found, self.transport)
        return dict(zip(tasks, (found[0] / found[1]).tolist(), strict=True))

    def _rounds(self) -> Callable[[], Fetch]:
        """What begins each round of a step."""
        count = itertools.count()
        return lambda: self.batches.round(self.steps_done, next(count))

    def _executor(self, tasks: frozenset[str]) -> Executor:
        """The program of the tasks that take part in a step; all ranks restrict it alike."""
        if tasks not in self.executors:
            spec = self.spec
            parts = [task for task, _ in spec.program.losses if base_task(task) in tasks]
            program = spec.program if len(parts) == len(spec.program.losses) else restricted(spec.program, parts)
            self.executors[tasks] = Executor(
                program,
                self.transport,
                self.codes,
                self.store,
                self.optimizer,
                spec.precision,
                self.switch,
                spec.partial,
                self.momenta,
                self.writes,
                spec.on_broken,
                spec.after_steps,
            )
        return self.executors[tasks]

    def sizes(self) -> dict[str, tuple[torch.Size, int]]:
        """Shape of each parameter and buffer that this rank answers for, and bytes of a number."""
        held = self.store.held(self.spec.owned)
        return {name: (tensor.shape, tensor.dtype.itemsize) for name, tensor in held.items()}

    def ranges(self, wanted: Iterable[tuple[str, int, int]]) -> list[tuple[str, Tensor]]:
        """Copies of some numbers of what this rank answers for, by name: from one place to another."""
        own = set(self.spec.owned)
        held = self.store.held(name for name, _, _ in wanted if name in own)
        return [(n, held[n].reshape(-1)[low:high].cpu().clone()) for n, low, high in wanted if n in held]

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters and buffers that this rank answers for."""
        return self.store.state(self.spec.owned)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Copies of the optimizer's states of what this rank answers for; only tensors and numbers."""
        if self.optimizer is None:
            return {}
        states = optimizer_tensors(self.optimizer, self._stepped(self.spec.owned), strict=False)
        return states | master_tensors(self.store.masters, self.spec.owned)

    def _averaged(self) -> dict[str, Tensor]:
        """What this rank averages: of what it answers for all that a step may change."""
        assert self.averages is not None
        own, changed = set(self.spec.owned), {*self.store.updated, *self.spec.program.written}
        names = [name for name in self.spec.owned if name in changed]
        buffers = {name: value for name, value in self.store.buffers.items() if name in own}
        return averaged(self.averages.ema, names, buffers, self.store.stepped)

    def averages_here(self) -> dict[str, Tensor]:
        """The averages of what this rank holds; none before the first step that counts. All ranks call together."""
        if self.averages is None or not self.averages.count:
            return {}
        held = self.store.held(row.name for row in self.spec.averages)
        return brought(self.averages, self.spec.averages, held, self.transport)

    def ema_state(self) -> dict[str, Tensor]:
        """Copies of the averages that this rank keeps, as `ema:NAME`."""
        held = {} if self.averages is None else self.averages.tensors()
        return {name: value.cpu().clone() for name, value in held.items()}

    def save(self, path: str, *, later: bool = False) -> Progress:
        """Write what this rank answers for into the checkpoint at `path`, or `later` copy it and write it in a thread;
        what is not a tensor comes back.
        """
        tensors = {**self.store.held(self.spec.owned), **self.spec.unused}
        if self.optimizer is not None:
            own = self._stepped(self.spec.owned)
            tensors |= self.resting | optimizer_tensors(self.optimizer, own, copies=False)
            tensors |= master_tensors(self.store.masters, own, copies=False)
        if self.averages is not None:
            tensors |= self.averages.tensors()
        if later:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
        entries |= {name: Entry.read_from(source, name) for name, source in self.spec.unread.items()}
        file = Path(path) / f"shard-{self.spec.rank + 1:05}.safetensors"
        write = functools.partial(_write, self.spec.rank, file, entries)
        if later:
            self.saving.start(write)
        else:
            write()
        stepped = {id(parameter): name for name, parameter in self._stepped(self.store.updated).items()}
        return {
            "feeds": {name: feed.state() for name, feed in self.feeds.items()},
            "counts": self.counts.state(),
            "optimizer": optimizer_progress(self.optimizer, stepped, self.numbers) if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "made": {"optimizer": self.made, "scheduler": self.made_schedule},
            "ema": None if self.averages is None else {"count": self.averages.count},
        }

    def writing(self, finished: bool) -> tuple[bool, bool]:
        """Whether this rank has written what it began to write later, and what its driver says of the whole. Raises
        what went wrong.
        """
        return self.saving.check(), finished

    def load(self, path: str, step: int, progress: Progress) -> list[str]:
        """Go on where the checkpoint at `path` ended, after `step` steps; weights are in place already. Tells what the
        user has changed of the optimizer since then.
        """
        self.steps_done = step
        self.replicas.forget()
        self.batches.forget()
        self.counts.load(progress.get("counts", {}))
        for name, feed in self.feeds.items():
            if name in progress["feeds"]:
                feed.resume(progress["feeds"][name])
        before, sentences = progress["made"], []
        if self.optimization is not None and self.made is not None and before["optimizer"] is not None:
            changed = changed_settings(before["optimizer"], self.made, scheduled=self.scheduler is not None)
            sentences = sentences_of(changed, self.optimization.labels)
            check_schedule(before["scheduler"], self.made_schedule)
            self._load_optimizer(Path(path), progress["optimizer"], {place: now for place, (_, now) in changed.items()})
        if self.scheduler is not None and progress["scheduler"] is not None:
            self.scheduler.load_state_dict(copy.deepcopy(progress["scheduler"]))  # of which some take keys out
        sentences += self._load_averages(Path(path), progress.get("ema"))
        return sentences

    def _load_averages(self, path: Path, saved: Mapping[str, int] | None) -> list[str]:
        """Go on with the averages of a checkpoint; a sentence where they are lost."""
        if self.averages is None:
            return [] if saved is None else ["the checkpoint holds an average of the weights, which this run (no ema=) "
                                             "does not go on with, and does not save"]  # fmt: skip
        from spindle.runtime.checkpoints.checkpoint import tensors

        now = self._averaged()
        wanted = {AVERAGE + parse_piece(name).whole for name in now}
        self.averages.load(saved["count"] if saved else 0, tensors(path, wanted.__contains__) if saved else {}, now)
        return []

    def _load_optimizer(self, path: Path, progress: Progress, changed: Mapping[tuple[int, str], Any]) -> None:
        """States and settings of a checkpoint. Those of parameters that are frozen now are kept for the next one."""
        assert self.optimizer is not None
        from spindle.runtime.checkpoints.checkpoint import tensors  # needs pydantic, which a worker else does without

        stepped = self._stepped(self.store.updated)
        own, self.numbers = {parse_piece(name).whole for name in stepped}, progress["numbers"]
        held, masters = split_masters(tensors(path, lambda name: _of_parameter(name) in own))
        types = {parse_piece(name).whole: parameter.dtype for name, parameter in stepped.items()}
        load_optimizer(self.optimizer, stepped, progress, states_for(held, masters, types), changed)
        self.store.load_masters(masters)
        if self.spec.rank == 0:
            everyones = {None, *self.spec.stepped}
            self.resting = tensors(path, lambda name: _of_parameter(name) not in everyones)

    def sees(self, file: str) -> bool:
        """Whether this rank could write beside a file of the driver's, which it has to see for that."""
        return os.path.exists(file) and os.access(os.path.dirname(file), os.W_OK)

    def sync(self) -> None:
        """Before a checkpoint: compare replicas; all ranks have come this far once it returns."""
        self.replicas.check(self.steps_done)

    def _stepped(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters among `names` that this rank's optimizer steps."""
        held = set(names)
        return {name: self.store.stepped(name) for name in self.store.updated if name in held}

    def close(self) -> None:
        """Stop reading, leave the transport, and end what is being written."""
        self.batches.close()
        for feed in self.evaluator.feeds.values() if self.evaluator else ():
            feed.close()
        self.transport.close()
        self.saving.wait()


def _write(rank: int, file: Path, entries: Mapping[str, Entry]) -> None:
    try:
        if entries:
            write_tensors(file, entries)
    except OSError as error:
        raise CheckpointError(
            f"rank {rank}: {file} cannot be written ({error.strerror}); make room there, or choose a directory that "
            "all machines can write to"
        ) from error


def _of_parameter(name: str) -> str | None:
    """The parameter whose optimizer state has this name in a checkpoint; None for what is no such state."""
    kind, _, rest = name.partition(":")
    return rest.partition(":")[0] if kind == PREFIX and rest else None


def merge_losses(reports: Sequence[Report], tasks: Sequence[str] = ()) -> list[dict[str, float]]:
    """Losses of all tasks by step, in the order of `tasks`, whichever rank has them; of a task with several
    micro-batches in flight, their mean.
    """
    steps = max((len(report.losses) for report in reports), default=0)
    merged = []
    for step in range(steps):
        parts: dict[str, list[float]] = {task: [] for task in tasks}
        for task, loss in ((t, x) for report in reports for t, x in report.losses[step].items()):
            parts.setdefault(base_task(task), []).append(loss)
        merged.append({task: sum(values) / len(values) for task, values in parts.items() if values})
    return merged
