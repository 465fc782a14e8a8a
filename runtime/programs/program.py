"""Program: what every rank does in one step, as data; it prints and parses back.

- A slice run is one slice of the plan: operators, ranks, and the samples that each rank holds.
- A transfer moves the tensors that one slice run made for another, between ranks, all its messages at once; forward
  ones carry activations, backward ones their gradients. What stays on a rank is no message.
- A bucket holds the parameters that live on one set of ranks; their gradients are summed over it together.
- A flat holds parameters that are sharded: side by side in one row, of which each rank keeps an equal range. It is
  gathered before a run that uses it and released after it; gradients are scattered after each backward.
- Flags say which parameters of the flats of one set of ranks a step has reached; they are summed once a step.
- A tally holds norm layers of which several runs change the running statistics; what each adds is folded in at the end.
- A state is some buffers that runs change one after another, in the order of one process; a handover brings them from
  the rank that changed them last to the ranks whose runs touch them next.
- A write changes parameters outside of the optimizer, before or after all runs of a round or of a turn, on every rank
  that holds them; it reads other parameters, which are fetched where a rank lacks them.
- `instructions[rank]` is the rank's program. It is all that the rank does. A rank is sent its part of the tables only.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property

from spindle.errors import ProgramError
from spindle.values.graph import TensorSpec, base_task, micro_batch, parse_piece
from spindle.values.units import SAMPLES


class Op(StrEnum):
    """What an instruction does with its target."""

    LOAD = "LOAD"  # a task: fetch its next batch
    AGREE = "AGREE"  # all ranks together: check that their batches have the same shapes, before a message depends on it
    FORWARD = "FORWARD"  # a slice run: compute, keeping what backward needs
    TRANSFER = "TRANSFER"  # a transfer: start its sends and receives; does not wait
    AWAIT = "AWAIT"  # a transfer, bucket, flat or flags: wait until what it brings has arrived
    BACKWARD = "BACKWARD"  # a slice run: gradients of its parameters and inputs
    FREE = "FREE"  # a buffer: drop it
    REDUCE = "REDUCE"  # a bucket or flags: start summing its gradients, or them, over its ranks; does not wait
    CLIP = "CLIP"  # all ranks together: scale all gradients down when their norm is too large
    STEP = "STEP"  # apply the optimizer to the parameters that the rank updates
    GATHER = "GATHER"  # a bucket: take its updated parameters from the rank that owns it
    UNSHARD = "UNSHARD"  # a flat: start gathering it; does not wait
    RESHARD = "RESHARD"  # a flat: release what was gathered
    SCATTER = "SCATTER"  # a flat: start summing a backward's gradients, each rank's range to it; does not wait
    ADD = "ADD"  # a flat: wait for that sum, and add it to those of earlier backwards
    TALLY = "TALLY"  # a tally: take together what all runs of a step add to running statistics
    HAND = "HAND"  # a handover: send a state, or take it
    WRITE = "WRITE"  # a write: send or take what it reads, and change parameters outside of the optimizer


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `target` names a task, slice run, transfer, bucket, flat, flags, tally, handover, write or
    buffer.
    """

    op: Op
    target: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.target}".rstrip()


class _Sent:
    """A frozen value whose looked-up tables stay behind when it is sent."""

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SliceRun(_Sent):
    """A slice of the plan. Rank ranks[i] holds samples bounds[i][0] .. bounds[i][1]-1 of the task's batch.

    Each `tensor_parallel` ranks that follow each other hold the same samples, and a part each of the layers that can be
    cut. `inputs` come from other slice runs, `outputs` go to other slice runs (or are the loss). `trained` are the
    parameters to whose gradients it adds. `loads`: its ranks fetch the batch. `backward`: a gradient comes back for an
    output, so the run keeps what its backward needs, or, with `recompute`, its inputs, and then runs forward again.
    `varies`: its bounds follow what each batch holds, so that each rank has as many rows of the unit `weigh_by`;
    `bounds` are then for samples that are evenly shared. `statistics` are norm layers whose running statistics it
    changes, `states` buffers that it touches and some run changes. `turn`: its part of the step; all runs of a turn go
    forward and then backward before those of the next one begin. `flats`: sharded parameters that it uses.
    """

    name: str
    metaop: str
    task: str
    component: str
    wave: int
    operators: tuple[str, ...]
    ranks: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trained: tuple[str, ...]
    loads: bool
    backward: bool
    recompute: bool = False
    tensor_parallel: int = 1
    varies: bool = False
    weigh_by: str = SAMPLES
    statistics: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    turn: int = 0
    flats: tuple[str, ...] = ()

    @cached_property
    def place(self) -> dict[int, int]:
        """Where each rank stands among `ranks`."""
        return {rank: index for index, rank in enumerate(self.ranks)}

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold one copy of the layers together, `rank` among them, in order of their parts."""
        first = self.place[rank] // self.tensor_parallel * self.tensor_parallel
        return self.ranks[first : first + self.tensor_parallel]

    def copies(self) -> tuple[tuple[tuple[int, ...], tuple[int, int]], ...]:
        """The ranks of each copy of the layers, and the samples that it holds."""
        step = self.tensor_parallel
        return tuple((self.ranks[i : i + step], self.bounds[i]) for i in range(0, len(self.ranks), step))

    def trained_on(self, rank: int) -> tuple[str, ...]:
        """Trained parameters, or pieces of them, that `rank` holds."""
        copy = self.copy_of(rank)
        part, parts = copy.index(rank), len(copy)
        return tuple(name for name in self.trained if _holds(name, part, parts))

    def bounds_of(self, rank: int) -> tuple[int, int]:
        """Samples that `rank` holds."""
        return self.bounds[self.place[rank]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Samples low..high-1 of a tensor (all of it when it cannot be cut) from one rank to another."""

    tensor: str
    source: int
    target: int
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Transfer(_Sent):
    """All messages from slice run `source` to slice run `target`; `backward` ones carry gradients.

    Where the bounds of a run vary, `senders` and `receivers` are the ranks that may send and receive in some step.
    """

    name: str
    source: str
    target: str
    backward: bool
    messages: tuple[Message, ...]
    senders: tuple[int, ...] = ()
    receivers: tuple[int, ...] = ()

    @cached_property
    def _ends(self) -> tuple[frozenset[int], frozenset[int]]:
        """Ranks that may send, and that may receive: gone through once, since every rank asks."""
        sending = frozenset(self.senders).union(m.source for m in self.messages)
        return sending, frozenset(self.receivers).union(m.target for m in self.messages)

    def sending(self) -> frozenset[int]:
        """Ranks that may send."""
        return self._ends[0]

    def receiving(self) -> frozenset[int]:
        """Ranks that may receive."""
        return self._ends[1]

    def members(self) -> frozenset[int]:
        """Ranks that may send or receive."""
        return self._ends[0] | self._ends[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Parameters of one dtype whose gradients are summed over exactly `ranks`. With an `owner` only that rank gets the
    sum, holds the optimizer's states and updates them; the others take them from it.
    """

    name: str
    dtype: str
    ranks: tuple[int, ...]
    parameters: tuple[str, ...]
    owner: int | None = None

    def updated_by(self, rank: int) -> bool:
        """Whether `rank` updates these parameters."""
        return rank in self.ranks and self.owner in (None, rank)

    @property
    def answering(self) -> int:
        """The one rank that speaks for the bucket."""
        return self.ranks[0] if self.owner is None else self.owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """Parameters of one dtype, side by side in a row, of which each of `ranks` keeps an equal range, in their order.
    `trained`: they get gradients, which are summed over `ranks`; each rank updates its range alone.
    """

    name: str
    dtype: str
    ranks: tuple[int, ...]
    parameters: tuple[str, ...]
    trained: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """A flag for each trained parameter of the flats of `ranks`: whether a backward of the step has added to it on any
    of them. The flats say all of it, so no table holds flags.
    """

    name: str
    ranks: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Norm layers that `ranks` hold. What runs add to their running statistics is kept apart by run, and after backward
    all ranks fold it in, in the order of one process.
    """

    name: str
    ranks: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Buffers that `ranks` hold and runs change one after another."""

    name: str
    ranks: tuple[int, ...]
    buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A state goes from the rank that has it as it stands to ranks that touch it next, in run `before`; "": after
    backward, to all that hold it.
    """

    name: str
    state: str
    source: int
    targets: tuple[int, ...]
    before: str = ""

    def members(self) -> frozenset[int]:
        """Ranks that send or receive."""
        return frozenset((self.source, *self.targets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """A parameter goes from a rank that holds it to ranks that need it for a write."""

    parameter: str
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A task changes `parameters` outside of the optimizer on `ranks`, which hold them; `after` all runs or before.

    With a `turn` it is of one batch of the task, and after or before the runs of that turn; `within` it: after all have
    gone forward, and before they go backward.
    """

    name: str
    task: str
    after: bool
    ranks: tuple[int, ...]
    parameters: tuple[str, ...]
    fetches: tuple[Fetch, ...] = ()
    turn: int | None = None
    within: bool = False

    def members(self) -> frozenset[int]:
        """Ranks that write, or send what others need."""
        return frozenset((*self.ranks, *(fetch.source for fetch in self.fetches)))


@dataclass(frozen=True, kw_only=True)
class Program(_Sent):
    """One step of a whole workload on `num_ranks` ranks.

    `losses` pairs each task with the tensor that holds its loss, `weights` with its weight in the sum. Gradients whose
    norm over all parameters exceeds `max_grad_norm` are scaled down to it; None leaves them. `part_of`: the one rank
    whose part this is (see `parts`); the others' instructions are not there, nor what only they touch.
    """

    num_ranks: int
    tensors: tuple[TensorSpec, ...]
    slices: tuple[SliceRun, ...]
    transfers: tuple[Transfer, ...]
    buckets: tuple[Bucket, ...]
    losses: tuple[tuple[str, str], ...]
    weights: tuple[tuple[str, float], ...]
    instructions: tuple[tuple[Instruction, ...], ...]
    max_grad_norm: float | None = None
    tallies: tuple[Tally, ...] = ()
    states: tuple[State, ...] = ()
    handovers: tuple[Handover, ...] = ()
    writes: tuple[Write, ...] = ()
    flats: tuple[Flat, ...] = ()
    part_of: int | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ProgramError(f"the program is for {self.num_ranks} ranks; it needs at least one")
        if len(self.instructions) != self.num_ranks:
            raise ProgramError(f"the program has {len(self.instructions)} instruction lists for {self.num_ranks} ranks")

    @cached_property
    def tensor_by_name(self) -> dict[str, TensorSpec]:
        """Tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def slice_by_name(self) -> dict[str, SliceRun]:
        """Slice runs by name."""
        return {run.name: run for run in self.slices}

    @cached_property
    def transfer_by_name(self) -> dict[str, Transfer]:
        """Transfers by name."""
        return {transfer.name: transfer for transfer in self.transfers}

    @cached_property
    def bucket_by_name(self) -> dict[str, Bucket]:
        """Buckets by name."""
        return {bucket.name: bucket for bucket in self.buckets}

    @cached_property
    def flat_by_name(self) -> dict[str, Flat]:
        """Flats by name."""
        return {flat.name: flat for flat in self.flats}

    @cached_property
    def flags_by_name(self) -> dict[str, Flags]:
        """The flags of each set of ranks that keep trained flats, by name: that of the first of these flats."""
        found: dict[tuple[int, ...], list[Flat]] = {}
        for flat in self.flats:
            if flat.trained:
                found.setdefault(flat.ranks, []).append(flat)
        flags = (
            Flags(
                name=f"flags:{flats[0].name}",
                ranks=ranks,
                parameters=tuple(name for flat in flats for name in flat.parameters),
            )
            for ranks, flats in found.items()
        )
        return {each.name: each for each in flags}

    @cached_property
    def tally_by_name(self) -> dict[str, Tally]:
        """Tallies by name."""
        return {tally.name: tally for tally in self.tallies}

    @cached_property
    def state_by_name(self) -> dict[str, State]:
        """States by name."""
        return {state.name: state for state in self.states}

    @cached_property
    def handover_by_name(self) -> dict[str, Handover]:
        """Handovers by name."""
        return {handover.name: handover for handover in self.handovers}

    @cached_property
    def write_by_name(self) -> dict[str, Write]:
        """Writes by name."""
        return {write.name: write for write in self.writes}

    @cached_property
    def one_process(self) -> tuple[SliceRun, ...]:
        """Slice runs in the order in which one process runs them: task after task, batch after batch."""
        tasks = list(dict.fromkeys(base_task(task) for task, _ in self.losses))
        return tuple(sorted(self.slices, key=lambda run: (tasks.index(base_task(run.task)), micro_batch(run.task))))

    def here(self, ranks: Collection[int]) -> Collection[int]:
        """Those of some ranks whose instructions stand in this program."""
        if self.part_of is None:
            return ranks
        return (self.part_of,) if self.part_of in ranks else ()

    @cached_property
    def runs_by_bucket(self) -> dict[str, tuple[str, ...]]:
        """For each bucket the slice runs that add to its gradients, in forward order."""
        home = {name: bucket.name for bucket in self.buckets for name in bucket.parameters}
        found: dict[str, list[str]] = {bucket.name: [] for bucket in self.buckets}
        for run in self.slices:
            for bucket in dict.fromkeys(home[name] for name in run.trained if name in home):
                found[bucket].append(run.name)
        return {name: tuple(runs) for name, runs in found.items()}

    @cached_property
    def runs_by_turn(self) -> tuple[tuple[SliceRun, ...], ...]:
        """The slice runs of each turn that has any, in forward order."""
        found: dict[int, list[SliceRun]] = {}
        for run in self.slices:
            found.setdefault(run.turn, []).append(run)
        return tuple(tuple(runs) for _, runs in sorted(found.items()))

    @cached_property
    def runs_by_task(self) -> dict[str, tuple[SliceRun, ...]]:
        """The slice runs of each task, in forward order."""
        found: dict[str, list[SliceRun]] = {}
        for run in self.slices:
            found.setdefault(run.task, []).append(run)
        return {task: tuple(runs) for task, runs in found.items()}

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Sets of ranks that need a process group of their own, in the order in which all ranks make them."""
        buckets = {bucket.ranks for bucket in self.buckets if len(bucket.ranks) > 1}
        copies = {tuple(sorted(ranks)) for run in self.slices if run.tensor_parallel > 1 for ranks, _ in run.copies()}
        tallies = {tally.ranks for tally in self.tallies if len(tally.ranks) > 1}
        return tuple(sorted(buckets | copies | tallies | {flat.ranks for flat in self.flats}))

    @property
    def links(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a rank that sends something in a step and one that receives it, in one order for all."""
        pairs = {(m.source, m.target) for each in self.transfers for m in each.messages}
        pairs.update((a, b) for each in self.transfers for a in each.senders for b in each.receivers)
        pairs.update((hand.source, target) for hand in self.handovers for target in hand.targets)
        fetches = (fetch for write in self.writes for fetch in write.fetches)
        pairs.update((fetch.source, target) for fetch in fetches for target in fetch.targets)
        return tuple(sorted((a, b) for a, b in pairs if a != b))

    def loaded_by(self, rank: int) -> set[str]:
        """Tasks whose batches `rank` reads."""
        return {i.target for i in self.instructions[rank] if i.op is Op.LOAD}

    @property
    def written(self) -> list[str]:
        """Parameters that tasks write to outside of the optimizer."""
        return [name for write in self.writes for name in write.parameters]

    def operators_of(self, rank: int) -> tuple[str, ...]:
        """Operators that `rank` runs."""
        return self.operators_by_rank[rank]

    @cached_property
    def operators_by_rank(self) -> tuple[tuple[str, ...], ...]:
        """Operators that each rank runs, in the order of its first slices with them."""
        found: list[dict[str, None]] = [{} for _ in range(self.num_ranks)]
        for run in self.slices:
            for rank in run.ranks:
                found[rank].update(dict.fromkeys(run.operators))
        return tuple(map(tuple, found))

    def describe(self, rank: int, instruction: Instruction) -> str:
        """An instruction in full, for messages: rank, wave, what it works on and with whom."""
        run = self.slice_by_name.get(instruction.target)
        if run is not None:
            return f"rank {rank}, wave {run.wave}, {instruction} ({_layers(run)})"
        transfer = self.transfer_by_name.get(instruction.target)
        if transfer is not None:
            wave = self.slice_by_name[transfer.target].wave
            peers = sorted(transfer.members() - {rank})
            return f"rank {rank}, wave {wave}, {instruction} (with rank {', '.join(map(str, peers))})"
        tables = (self.bucket_by_name, self.flat_by_name, self.flags_by_name)
        bucket = next((table[instruction.target] for table in tables if instruction.target in table), None)
        if bucket is not None:
            what = "" if isinstance(bucket, Bucket) else f"parameter {bucket.parameters[0]}, "
            return f"rank {rank}, {instruction} ({what}with ranks {_listed(bucket.ranks)})"
        tally, handover = self.tally_by_name.get(instruction.target), self.handover_by_name.get(instruction.target)
        if tally is not None:
            return f"rank {rank}, {instruction} (statistics of {tally.layers[0]}, with ranks {_listed(tally.ranks)})"
        if handover is not None:
            buffer, peers = self.state_by_name[handover.state].buffers[0], sorted(handover.members() - {rank})
            return f"rank {rank}, {instruction} (buffer {buffer}, with ranks {_listed(peers)})"
        write = self.write_by_name.get(instruction.target)
        if write is not None:
            peers = sorted(write.members() - {rank})
            others = f", with ranks {_listed(peers)}" if peers else ""
            return f"rank {rank}, {instruction} (parameter {write.parameters[0]}{others})"
        if instruction.op in (Op.AGREE, Op.CLIP) and self.num_ranks > 1:
            return f"rank {rank}, {instruction} (with all ranks)"
        return f"rank {rank}, {instruction}"


def _holds(name: str, part: int, parts: int) -> bool:
    piece = parse_piece(name)
    return piece.count == 1 or piece.index * parts // piece.count == part


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def activations(run: str) -> str:
    """Buffer of a slice run's inputs, outputs and what backward needs."""
    return f"activations:{run}"


def gradients(run: str) -> str:
    """Buffer of the gradients of a slice run's inputs."""
    return f"gradients:{run}"


def arrivals(transfer: str) -> str:
    """Buffer of what a transfer brought to a rank."""
    return f"arrivals:{transfer}"


def _layers(run: SliceRun) -> str:
    return run.operators[0] if len(run.operators) == 1 else f"{run.operators[0]} .. {run.operators[-1]}"
