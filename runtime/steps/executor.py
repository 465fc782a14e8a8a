"""Executor: interprets one rank's program. It does nothing that is not an instruction, and times each one.

Every promise of the program is checked while it is kept: what an instruction reads is there, what it makes was not.
"""

import functools
import time
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spindle.capture.codes import OperatorCode, OperatorPart, computing_in
from spindle.errors import NotFiniteError, RunError, SpindleError
from spindle.record.substitutes.draws import Stream, drawing_from
from spindle.record.writes import OwnWrite, perform
from spindle.runtime.comms.transport import Post, Transport, Wait, sum_over_all
from spindle.runtime.loading.batches import check_alike
from spindle.runtime.loading.recordings import LoadedBatch
from spindle.runtime.parallel.layers import Layout, Switch, compute_part
from spindle.runtime.programs.passes import accumulating
from spindle.runtime.programs.program import (
    Instruction,
    Message,
    Op,
    Program,
    SliceRun,
    activations,
    arrivals,
    gradients,
)
from spindle.runtime.steps.batch_shards import BatchShard, cut, joined, shard_shape, summed
from spindle.runtime.steps.busy import Busy, Together
from spindle.runtime.steps.finite import NotFinite, agreed, not_finite, stopped
from spindle.runtime.steps.flats import Flats
from spindle.runtime.steps.gradient_flags import flags_from, flags_to, with_gradients
from spindle.runtime.steps.ready import Ready, ready_runs
from spindle.runtime.steps.record import HOST_OPS, Stepped, Timed, record_of, span_of
from spindle.runtime.steps.reductions import Reductions
from spindle.runtime.steps.state import StepState, received
from spindle.runtime.steps.store import ParameterStore, trained_as
from spindle.runtime.updates.after_steps import AfterSteps, run_after_step
from spindle.values.graph import TensorSpec, base_task, num_micro_batches
from spindle.values.units import Bounds
from spindle.workload import Precision

Fetch = Callable[[str], LoadedBatch]
Observe = Callable[[dict[str, Tensor]], None]


@dataclass(slots=True)
class Activations:
    """A slice run's inputs as leaves of an autograd graph of its own, and its outputs."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Executor:
    """One rank's program, ready to run steps."""

    def __init__(
        self,
        program: Program,
        transport: Transport,
        codes: Mapping[str, OperatorCode],
        store: ParameterStore,
        optimizer: torch.optim.Optimizer | None,
        precision: Precision = "fp32",
        switch: Switch | None = None,
        partial: frozenset[str] = frozenset(),
        momenta: Mapping[str, float | None] | None = None,
        writes: Mapping[tuple[str, str], OwnWrite] | None = None,
        on_broken: NotFinite = "ignore",
        after_steps: AfterSteps = (),
    ) -> None:
        """`codes` hold what the rank runs; `optimizer` is over the parameters that the rank updates. `switch` is that
        of its cut layers; `partial` names parameters whose gradients in a part are shares. `momenta`: of norm layers
        in tallies; `writes` to parameters, by task and parameter; `on_broken`: what to do with numbers that are none;
        `after_steps`: the user's functions of parameters that were stepped.
        """
        self.after_steps = after_steps
        self.on_broken: NotFinite = on_broken
        self.switch, self.partial = switch or Switch(), partial
        self.program, self.transport, self.codes = program, transport, codes
        self.store, self.optimizer, self.precision = store, optimizer, precision
        self.dtypes: dict[str, torch.dtype] = {tensor.name: getattr(torch, tensor.dtype) for tensor in program.tensors}
        self.rank, self.pulse, self.streams = transport.rank, transport.pulse, transport.streams
        self.busy, self.together = Busy(self.streams), Together(self.streams)
        self.places: dict[Instruction, bytes] = {}
        self.state = StepState(program, self.rank, codes, momenta or {})
        self.writes = writes or {}
        self.instructions = program.instructions[self.rank]
        sizes = {name: flat.nbytes for name, flat in (*store.reduced.items(), *store.bucket.items())}
        sizes |= {name: row.own.nbytes * len(row.flat.ranks) for name, row in store.rows.items()}
        self.sizes, self.timed = sizes, functools.partial(span_of, program, self.rank, sizes)
        self.in_flight = num_micro_batches(task for task, _ in program.losses)
        self.adding = accumulating(self.instructions)
        self.weight_by_loss = {tensor: dict(program.weights)[task] for task, tensor in program.losses}
        self.task_by_loss = {tensor: task for task, tensor in program.losses}
        self.ready = ready_runs(program, self.rank, codes)
        self.reductions = Reductions(program, store, transport, self.together)
        self.flats = Flats(store.rows, transport, self.together)
        self.maker = {name: run for run in program.slices for name in run.outputs}
        self.readers: dict[str, list[SliceRun]] = {name: [] for name in self.maker}
        for run in program.slices:
            for name in run.inputs:
                self.readers.setdefault(name, []).append(run)
        active = {name for run in program.slices for name in run.trained}
        self.updated = [name for name in store.updated if trained_as(name) in active]
        self.idle = [name for name in store.updated if trained_as(name) not in active]
        self.perform = {
            Op.LOAD: self._load,
            Op.AGREE: self._agree,
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.TRANSFER: self._transfer,
            Op.AWAIT: self._await,
            Op.FREE: self._free,
            Op.REDUCE: self._reduce,
            Op.CLIP: self._clip,
            Op.STEP: self._step,
            Op.GATHER: self._gather,
            Op.UNSHARD: self.flats.unshard,
            Op.RESHARD: self.flats.reshard,
            Op.SCATTER: self.flats.scatter,
            Op.ADD: self.flats.add,
            Op.TALLY: self._tally,
            Op.HAND: self._hand,
            Op.WRITE: self._write,
        }

    def step(
        self,
        new_round: Callable[[], Fetch],
        *,
        observe: Observe | None = None,
        step: int = 0,
        rounds: int = 1,
        seed: int = 0,
    ) -> Stepped:
        """Run the program once, after `rounds - 1` rounds that only add to the gradients. A GPU was given all of it
        then, and need not have done it.

        `new_round` gives what fetches a task's batch, recorded, in the next round; `observe` sees the gradients that
        the update uses, and then every device draws the random numbers of a CPU, so that runs compare. They depend
        on `seed` and `step`, never on the plan. Losses are means over the rounds. Raises RunError naming rank, wave and
        instruction, with the user's own line that went wrong.
        """
        self.observe = observe
        self.grad_norm: Tensor | None = None
        self.skipped: str | None = None
        spans: list[Timed] = []
        losses = self.earlier = list[dict[str, Tensor]]()  # of the rounds so far
        self.stream = Stream(seed=seed, step=step, device=self.transport.device, portable=observe is not None)
        self.state.begin(rounds)
        self.together.begin(step + 1)
        for left in reversed(range(rounds)):
            self.state.round = rounds - 1 - left
            self.first_batch = (rounds - 1 - left) * self.in_flight
            self.fetch = new_round()
            self.begin()
            self.reductions.begin(early=not left)
            for instruction in self.adding if left else self.instructions:
                self.carry_out(instruction, spans, step + 1)
            self._end()
            losses.append(self.losses)
        rows = [found[task] for task in self.losses for found in losses]
        numbers = self.streams.numbers(rows if self.grad_norm is None else [*rows, self.grad_norm])
        clocks = self.streams, self.busy, self.together
        make = functools.partial(record_of, [*self.losses], rounds, numbers, spans, self.timed, step + 1, clocks)
        return Stepped(make, self.skipped)

    def begin(self) -> None:
        """Forget what an earlier round has left."""
        self.buffers: dict[str, object] = {}
        self.pending: dict[str, tuple[list[tuple[Message, Tensor]], list[Post], Wait]] = {}
        self.departures: dict[str, tuple[list[Tensor], Wait]] = {}  # by transfer or handover; what is sent stays alive
        self.loaded: dict[str, LoadedBatch] = {}
        self.traffic: dict[str, int] = {}  # bytes that each transfer moved here
        self.losses: dict[str, Tensor] = {}

    def carry_out(self, instruction: Instruction, spans: list[Timed], step: int) -> None:
        """Perform one instruction, and add when it was. `step`: counted from 1, as users read it."""
        now = time.perf_counter if instruction.op in HOST_OPS else self.streams.mark
        start = now()
        target = instruction.target
        self.pulse.at(self._place(instruction), step, self.traffic.get(target, 0) or self.sizes.get(target, 0))
        begun = self.busy.begin() if instruction.op in (Op.FORWARD, Op.BACKWARD) else None
        try:
            self.perform[instruction.op](target)
        except Exception as error:
            raise self._explained(instruction, error) from error
        if begun is not None:
            self.busy.end(target, begun)
        if instruction.op not in (Op.FREE, Op.RESHARD):
            end = now()
            if instruction.op is Op.REDUCE:  # may have started in the backward before
                start, end = self.reductions.start(instruction.target)
            spans.append(Timed(instruction, start, end, self.traffic.get(instruction.target, 0)))

    def _place(self, instruction: Instruction) -> bytes:
        if instruction not in self.places:
            where = self.program.describe(self.rank, instruction).removeprefix(f"rank {self.rank}, ")
            self.places[instruction] = where.encode()
        return self.places[instruction]

    def _end(self) -> None:
        for name in list(self.departures):
            self._departed(name)
        if self.buffers:
            raise AssertionError(f"rank {self.rank} ends a round with buffers {sorted(self.buffers)}")

    def _explained(self, instruction: Instruction, error: Exception) -> Exception:
        where = self.program.describe(self.rank, instruction)
        if isinstance(error, SpindleError):
            explained = type(error)(f"{where}: {error}")
            for note in getattr(error, "__notes__", ()):
                explained.add_note(note)
            return explained
        return RunError.of(error, where)

    # -- compute --------------------------------------------------------------------------------------------------

    def _load(self, task: str) -> None:
        self.loaded[task] = self.fetch(task)
        self.loaded[task].prepare(self.program, self.rank)

    def _agree(self, target: str) -> None:
        del target
        check_alike([task for task, _ in self.program.losses], self.loaded, self.transport, self.stream.step + 1)

    def _bounds(self, run: SliceRun, rank: int) -> Bounds:
        """Samples that a rank holds in a run, in this step."""
        return self.loaded[run.task].layout.bounds[run.name][run.ranks.index(rank)]

    def _forward(self, name: str) -> None:
        ready = self.ready[name]
        run, inputs = ready.run, {}
        bounds = self._bounds(run, self.rank)
        if bounds[0] == bounds[1]:
            self._put(activations(name), Activations({}, {}))
            return
        loaded = self.loaded[run.task]
        part = loaded.part(bounds)
        for spec, needs_grad in ready.inputs:
            if spec.name in loaded.absent:
                continue
            value = joined(self._input_shards(run, bounds, spec.name), spec)
            self._check(spec.name, "received", value, part.shapes[spec.name])
            inputs[spec.name] = value.detach().requires_grad_(needs_grad)
        with torch.set_grad_enabled(run.backward and not run.recompute), self.state.forward(run):
            outputs = self._compute(ready, bounds, inputs)
        for tensor, value in outputs.items():
            self._check(tensor, "computed", value, part.shapes[tensor])
        self._put(activations(name), Activations(inputs, outputs))
        for tensor in outputs.keys() & self.task_by_loss.keys():
            loss = outputs[tensor].detach()
            self.losses[self.task_by_loss[tensor]] = loss * loaded.share if loaded.share else torch.zeros_like(loss)

    def _check(self, tensor: str, verb: str, value: Tensor, recorded: tuple[int, ...]) -> None:
        if tuple(value.shape) != recorded:
            raise RunError(
                f"{tensor} was {verb} with shape {tuple(value.shape)}, but recorded with {recorded}; the code that "
                "makes it must give shapes that follow from those of its arguments, and the first batches must show "
                "how many rows samples have (begin with one like most, or give a list of batches)"
            )

    def _compute(self, ready: Ready, bounds: Bounds, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the operators of a slice on this rank's samples; its outputs."""
        values = dict(inputs)
        loaded = self.loaded[ready.run.task]
        part, absent = loaded.part(bounds), loaded.absent
        stream = ready.stream(self.stream, self.first_batch, loaded.batch.units, bounds)
        with computing_in(self.precision, self.transport.device), drawing_from(stream):
            for code in ready.codes:
                own = part.operators.get(code.name)
                if own is None:  # of a modality that this batch lacks
                    continue
                given = [values[name] for name in code.inputs if name not in absent]
                sent = [name for name in code.outputs if name not in absent]
                values.update(zip(sent, self._run_code(ready, code, own, given), strict=True))
        # autocast differs between kinds of device; what leaves a slice has the type that the program says
        outputs = ((spec.name, dtype) for spec, dtype in ready.outputs if spec.name not in absent)
        return {name: values[name].to(dtype) for name, dtype in outputs}

    def _run_code(
        self, ready: Ready, code: OperatorCode, part: OperatorPart, given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if len(ready.copy) == 1:
            return code.module.forward(part, *given)  # which nobody hangs hooks on
        group = ready.copy
        layout = Layout(ready.part, len(group), lambda value: self.transport.all_reduce(value, group)())
        found: Sequence[Tensor] = compute_part(code, (part, *given), layout, self.switch, self.partial)
        return found

    def _live_outputs(self, run: SliceRun, held: Activations) -> dict[str, Tensor]:
        """Outputs of a run with their graph. With `recompute` they are computed again from the kept inputs: random
        numbers are a function of their place, so come out again; buffers are as they were the first time, and
        afterwards as all runs since have left them.
        """
        if not (run.recompute and held.outputs):
            return held.outputs
        with self.state.again(run):
            return self._compute(self.ready[run.name], self._bounds(run, self.rank), held.inputs)

    def _backward(self, name: str) -> None:
        run = self.program.slice_by_name[name]
        held, loaded = self._activations(name), self.loaded[run.task]
        units, bounds = loaded.batch.units, self._bounds(run, self.rank)
        self.flats.expect(run)
        ends, weights = [], []
        for tensor, output in self._live_outputs(run, held).items() if loaded.share else ():
            spec = self.program.tensor_by_name[tensor]
            if not output.requires_grad and (loaded.absent or tensor not in self.weight_by_loss):
                continue
            if tensor in self.weight_by_loss:
                ends.append(output)
                weights.append(torch.full_like(output, self.weight_by_loss[tensor] * loaded.share))
            elif spec.needs_grad:
                gradient = summed(self._gradient_shards(run, bounds, tensor), spec, units, bounds, output)
                if gradient is None and run.tensor_parallel > 1:
                    gradient = self._zeros(run, spec, output)
                if gradient is not None:
                    ends.append(output)
                    weights.append(gradient)
        if ends:
            with self.state.backward(run), self.reductions.during(run):
                torch.autograd.backward(ends, weights)
        del ends, weights  # and with them what autograd has kept
        if any(needs_grad for _, needs_grad in self.ready[name].inputs):
            self._put(gradients(name), {t: leaf.grad for t, leaf in held.inputs.items() if leaf.requires_grad})

    def _input_shards(self, run: SliceRun, bounds: Bounds, tensor: str) -> Iterator[BatchShard]:
        """Parts of an input that lie on this rank, then parts that arrived."""
        spec, source = self.program.tensor_by_name[tensor], self.maker[tensor]
        stays = self._staying(spec.rows > 0, source, run)
        if stays is not None:
            value = self._activations(source.name).outputs[tensor].detach()
            units = self.loaded[run.task].batch.units
            yield (*stays, cut(value, spec, units, self._bounds(source, self.rank), *stays))
        yield from self._arrived(f"{source.name}>{run.name}", tensor)

    def _zeros(self, run: SliceRun, spec: TensorSpec, output: Tensor) -> Tensor | None:
        """The gradient of an output to which nothing leads back, on a rank that holds a part of its layers: all ranks
        of a copy go backward together. Of a tensor that only exists whole the first of them alone knows.
        """
        if spec.rows:
            return None
        if self.rank == run.ranks[0]:
            raise RunError(
                f"nothing leads back to {spec.name}, of which a later layer has made no use in this step, and "
                f"{run.component!r} has tensor_parallel={run.tensor_parallel}: its parameters would have no gradients "
                "on this rank alone; choose between values by torch.where instead of a branch"
            )
        return torch.zeros_like(output)

    def _gradient_shards(self, run: SliceRun, bounds: Bounds, tensor: str) -> Iterator[BatchShard]:
        """Parts of an output's gradient from its readers on this rank, then parts that arrived."""
        spec = self.program.tensor_by_name[tensor]
        for reader in self.readers[tensor]:
            if not reader.backward:
                continue
            stays = self._staying(spec.rows > 0, run, reader)
            if stays is not None and (spec.rows or reader.copy_of(self.rank)[0] == self.rank):
                value = self._gradients(reader.name)[tensor]
                if value is not None:
                    units = self.loaded[run.task].batch.units
                    yield (*stays, cut(value, spec, units, self._bounds(reader, self.rank), *stays))
            yield from self._arrived(f"{run.name}<{reader.name}", tensor)

    def _staying(self, is_cut: bool, source: SliceRun, target: SliceRun) -> Bounds | None:
        """Samples that pass between two runs without leaving this rank; (0, 0) for a tensor that cannot be cut."""
        if self.rank not in source.ranks or self.rank not in target.ranks:
            return None
        (first, last), (low, high) = self._bounds(source, self.rank), self._bounds(target, self.rank)
        if not is_cut:
            return (0, 0) if source.ranks[0] == self.rank and low < high else None
        low, high = max(low, first), min(high, last)
        return (low, high) if low < high else None

    # -- messages -------------------------------------------------------------------------------------------------

    def _transfer(self, name: str) -> None:
        transfer = self.program.transfer_by_name[name]
        source, target = self.program.slice_by_name[transfer.source], self.program.slice_by_name[transfer.target]
        loaded = self.loaded[source.task]
        units = loaded.batch.units
        sends: list[Post] = []
        led: list[tuple[int, bool]] = []
        shards: list[tuple[Message, Tensor]] = []
        for message in loaded.layout.messages[name]:
            if message.tensor in loaded.absent:
                continue
            spec = self.program.tensor_by_name[message.tensor]
            if message.source == self.rank:
                run, held = source, self._bounds(source, self.rank)
                made = self._gradients(run.name) if transfer.backward else self._activations(run.name).outputs
                value = made[message.tensor]
                led.append((message.target, value is not None))
                if value is None:
                    value = self._room(message, held, torch.zeros)
                else:
                    value = cut(value, spec, units, held, message.low, message.high).detach().contiguous()
                sends.append((message.target, value))
            if message.target == self.rank:
                shards.append((message, self._room(message, self._bounds(target, self.rank), torch.empty)))
        self.traffic[name] = sum(v.nbytes for _, v in sends) + sum(v.nbytes for _, v in shards)
        flags = flags_from([message for message, _ in shards]) if transfer.backward else []
        sends += flags_to(led) if transfer.backward else []
        departed, arrived = self.transport.start(sends, [*((m.source, value) for m, value in shards), *flags])
        if sends:
            self.departures[name] = [value for _, value in sends], departed
        if self.rank in transfer.receiving():
            self.pending[name] = (shards, flags, arrived)

    def _room(self, message: Message, held: Bounds, make: Callable[..., Tensor]) -> Tensor:
        """A tensor for what a message carries, to or from a rank that holds these samples."""
        loaded = self.loaded[self.maker[message.tensor].task]
        spec, whole = self.program.tensor_by_name[message.tensor], loaded.part(held).shapes[message.tensor]
        shape = shard_shape(whole, spec, loaded.batch.units, held, message.low, message.high)
        return make(shape, dtype=self.dtypes[message.tensor], device=self.transport.device)

    def _await(self, name: str) -> None:
        waiting = next((held for held in (self.reductions, self.flats) if name in held), None)
        if waiting is not None:
            waiting.wait(name)
            return
        shards, flags, arrived = self.pending.pop(name)
        if shards:
            arrived()
        transfer = self.program.transfer_by_name[name]
        self._put(arrivals(name), with_gradients(shards, flags) if transfer.backward else shards)
        if transfer.backward:  # these gradients are made of what was sent forward, so that has left
            self._departed(f"{transfer.target}>{transfer.source}")

    def _departed(self, name: str) -> None:
        """Let go of what was sent; waits until it has left."""
        _, departed = self.departures.pop(name, ([], _nothing))
        departed()

    def _reduce(self, name: str) -> None:
        self.reductions.start(name)

    def _clip(self, target: str) -> None:
        """Scale all gradients so that their norm over all parameters, each counted once, is at most the limit."""
        del target
        limit = self.program.max_grad_norm
        assert limit is not None
        owned = [self.store.bucket[b.name] for b in self.program.buckets if b.answering == self.rank]
        square = torch.zeros((), dtype=torch.float64, device=self.transport.device)
        for flat in (*owned, *self.store.flat_gradients):
            square += torch.linalg.vector_norm(flat, dtype=torch.float64).square()
        sum_over_all(square, self.transport)
        self.grad_norm = square.sqrt()
        factor = torch.clamp(limit / (self.grad_norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        if self.on_broken != "ignore":  # numbers that are none stay where they came up, and are named there
            factor = torch.where(self.grad_norm.isfinite(), factor, 1.0)
        for flat in (*self.store.bucket.values(), *self.store.flat_gradients):
            flat.mul_(factor.to(flat.dtype))

    def _step(self, target: str) -> None:
        del target
        resting = self.store.unreached(self.updated)
        if self._breaks(resting):
            self.store.zero_gradients()
            return
        if self.observe is not None:
            self.observe(self.store.gradients(name for name in self.updated if name not in resting))
        if self.optimizer is not None and self.updated:
            self.store.follow(self.program.written)
            with self.store.without_gradients([*self.idle, *resting]):
                self.optimizer.step()
            stepped = (name for name in self.updated if name not in resting)
            run_after_step(self.after_steps, ((name, self.store.stepped(name)) for name in stepped))
            self.store.round_masters(self.updated)
        self.store.zero_gradients()

    def _breaks(self, resting: Collection[str]) -> bool:
        """Whether the step is skipped. Raises NotFiniteError where it ends the run."""
        if self.on_broken == "ignore":
            return False
        held = {name: self.store.stepped(name).grad for name in self.updated if name not in resting}
        gradients = {name: gradient for name, gradient in held.items() if gradient is not None}
        reason, broken = not_finite([*self.earlier, self.losses], gradients, self.grad_norm, self.streams)
        tasks = list(dict.fromkeys(base_task(task) for task, _ in self.program.losses))
        elsewhere = agreed(reason, broken, tasks, self.transport)
        if elsewhere is None:
            return False
        if self.on_broken == "stop":
            raise NotFiniteError(stopped(self.stream.step + 1, reason, elsewhere))
        self.skipped = reason
        return True

    def _gather(self, name: str) -> None:
        """The bucket's gradients are done with, so their buffer carries the parameters."""
        bucket, flat = self.program.bucket_by_name[name], self.store.carrier(name)
        if bucket.owner == self.rank:
            self.store.pack(bucket.parameters, flat)
        assert bucket.owner is not None
        self.transport.broadcast(flat, bucket.ranks, bucket.owner)()
        if bucket.owner != self.rank:
            self.store.unpack(bucket.parameters, flat)
        self.store.bucket[name].zero_()

    def _tally(self, name: str) -> None:
        ranks, added = self.program.tally_by_name[name].ranks, self.state.contribution(name)
        if len(ranks) > 1:
            self.transport.all_reduce(added, ranks)()
        self.state.fold(name, added)

    def _hand(self, name: str) -> None:
        hand = self.program.handover_by_name[name]
        names, buffers = self.program.state_by_name[hand.state].buffers, self.state.buffers
        if hand.source == self.rank:
            values = [buffers[buffer].detach().clone().contiguous() for buffer in names]
            sends = [(target, value) for target in hand.targets for value in values]
            self.departures[name] = values, self.transport.start(sends, [])[0]
            return
        values = received(names, buffers)
        self.transport.start([], [(hand.source, value) for value in values])[1]()
        for buffer, value in zip(names, values, strict=True):
            buffers.put(buffer, value)

    def _write(self, name: str) -> None:
        """Change parameters outside of the optimizer, one after the other, so that little is fetched at a time."""
        write = self.program.write_by_name[name]
        fetches = {fetch.parameter: fetch for fetch in write.fetches}
        departures: list[tuple[Tensor, Wait]] = []  # what is sent stays alive
        held: dict[str, Tensor] = dict(self.store.parameters)
        for target in write.parameters:
            own = self.writes[base_task(write.task), target]
            found = own.write
            values: dict[str, Tensor] = {}
            for fetch in (fetches[source] for source in found.sources if source in fetches):
                if fetch.source == self.rank:
                    value = self.store.parameters[fetch.parameter].detach().contiguous()
                    departures.append((value, self.transport.start([(peer, value) for peer in fetch.targets], [])[0]))
                elif self.rank in fetch.targets:
                    shape, dtype = found.shapes[fetch.parameter]
                    value = values[fetch.parameter] = torch.empty(shape, dtype=dtype, device=self.transport.device)
                    self.transport.start([], [(fetch.source, value)])[1]()
            if self.rank in write.ranks:
                perform(found, ChainMap(values, own.clocks, held).__getitem__, self.transport.device, write.within)
        for _, departed in departures:
            departed()

    # -- buffers --------------------------------------------------------------------------------------------------

    def _put(self, name: str, value: object) -> None:
        if name in self.buffers:
            raise AssertionError(f"buffer {name!r} is made twice")
        self.buffers[name] = value

    def _free(self, name: str) -> None:
        if name not in self.buffers:
            raise AssertionError(f"buffer {name!r} is freed but not there")
        del self.buffers[name]

    def _activations(self, run: str) -> Activations:
        held = self.buffers.get(activations(run))
        assert isinstance(held, Activations), f"activations of {run} are read but not there"
        return held

    def _gradients(self, run: str) -> dict[str, Tensor | None]:
        held = self.buffers.get(gradients(run))
        assert isinstance(held, dict), f"gradients of {run} are read but not there"
        return held

    def _arrived(self, transfer: str, tensor: str) -> Iterator[BatchShard]:
        held = self.buffers.get(arrivals(transfer), [])
        assert isinstance(held, list)
        yield from ((message.low, message.high, value) for message, value in held if message.tensor == tensor)


def _nothing() -> None:
    """Waits for nothing."""
