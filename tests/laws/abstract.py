"""All ranks of a random program run together, on sample numbers in place of tensors.

It shares no code with `spindle.runtime.laws`, and none with the executor.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.messages import StepLayout
from spindle.runtime.programs.program import Bucket, Flags, Instruction, Message, Op, Program, SliceRun, Transfer
from spindle.values.contract import contract
from spindle.values.graph import ParameterWrite, TaskGraph, TensorSpec
from tests.random_plans import random_plan
from tests.task_graphs import random_task_graph


def random_program(seed: int, *, varying: bool = False) -> tuple[TaskGraph, Program]:
    """One to three tasks on one to five ranks, sometimes with clipping, recompute, sharded optimizer states, running
    statistics and buffers that operators change. With `varying` the batches of some tasks, the first among them, are
    shared anew in each step, and some tensors go by patches.
    """
    rng = random.Random(seed)
    sample = random_task_graph(seed, num_tasks=rng.randint(1, 3), operators_per_task=rng.randint(1, 7))
    graph = _with_patches(sample.graph, random.Random(seed)) if varying else sample.graph
    graph = _with_states(graph, random.Random(seed))
    metagraph = contract(graph)
    return graph, lower(
        random_plan(metagraph, rng.randint(1, 5), seed),
        metagraph,
        graph,
        losses=sample.losses,
        weights=sample.weights,
        max_grad_norm=rng.choice((None, 0.5)),
        recompute=rng.choice(((), ("a", "b"))),
        shard_optimizer=rng.random() < 0.3,
        varying={task for task in sample.losses if task == "t0" or rng.random() < 0.5} if varying else (),
    )


def random_sharded_program(seed: int, *, shards: int | None = None) -> tuple[TaskGraph, Program]:
    """As `random_program`, with the parameters of some components sharded: those of which no operator mixes samples and
    nothing is written to, on all ranks or fewer. `shards` is their number; None: any.
    """
    rng = random.Random(seed)
    sample = random_task_graph(seed, num_tasks=rng.randint(1, 3), operators_per_task=rng.randint(2, 7))
    graph = _with_states(sample.graph, random.Random(seed))
    barred = {operator.component for operator in graph if not operator.splittable}
    barred |= {name.partition(".")[0] for write in graph.writes for name in (write.target, *write.sources)}
    able = sorted({operator.component for operator in graph if operator.parameters} - barred)
    chosen = rng.sample(able, min(len(able), rng.randint(1, 4) if shards is None else shards))
    num_ranks = rng.randint(2, 5)
    batches = [operator.batch_size for operator in graph if operator.component in chosen]
    metagraph = contract(graph)
    return graph, lower(
        random_plan(metagraph, num_ranks, seed, on_all=chosen, keeps=min([num_ranks, *batches])),
        metagraph,
        graph,
        losses=sample.losses,
        weights=sample.weights,
        max_grad_norm=rng.choice((None, 0.5)),
        recompute=rng.choice(((), ("a", "b"))),
        shard_optimizer=rng.random() < 0.3,
        shard_parameters=chosen,
    )


def _with_patches(graph: TaskGraph, rng: random.Random) -> TaskGraph:
    """Some tensors that can be cut go by rows of another unit than samples."""

    def packed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, unit="patches") if spec.rows and rng.random() < 0.4 else spec

    return TaskGraph(tuple(replace(op, outputs=tuple(map(packed, op.outputs))) for op in graph))


def _with_states(graph: TaskGraph, rng: random.Random) -> TaskGraph:
    """Up to two norm layers, and up to two buffers, that an operator of each of some tasks changes."""
    tasks = list(dict.fromkeys(operator.task for operator in graph))
    touched: dict[str, tuple[list[str], list[str]]] = {operator.name: ([], []) for operator in graph}
    for kind, names in enumerate((("n.0", "n.1"), ("queue", "center"))):
        for name in rng.sample(names, rng.randint(0, 2)):
            for task in rng.sample(tasks, rng.randint(1, len(tasks))):
                own = [operator.name for operator in graph if operator.task == task]
                touched[rng.choice(own)][kind].append(name)
    operators = tuple(
        replace(op, statistics=tuple(touched[op.name][0]), states=tuple(touched[op.name][1])) for op in graph
    )
    return TaskGraph(operators, tuple(_writes(graph, tasks, rng)))


def _writes(graph: TaskGraph, tasks: list[str], rng: random.Random) -> Iterator[ParameterWrite]:
    """Up to two writes to parameters, of tasks of any kind, each from up to two others."""
    names = sorted({parameter.name for operator in graph for parameter in operator.parameters})
    rng.shuffle(names)
    for target, sources in ((names[:1], names[1:3]), (names[3:4], names[4:5])):
        if target and rng.random() < 0.5:
            yield ParameterWrite(
                task=rng.choice(tasks), target=target[0], sources=tuple(sources), after=rng.random() < 0.5
            )


class Abstract:
    """All ranks in one place: a tensor is the list of samples that a rank holds of it, a gradient a count by sample.

    A send never waits, a receive waits for its sender, a reduction for all its ranks: what a network does. `layouts`:
    how the batch of each task is shared; without them, as planned.
    """

    def __init__(self, program: Program, layouts: Mapping[str, StepLayout] | None = None) -> None:
        self.program = program
        self.bounds = {run.name: run.bounds for run in program.slices}
        self.messages = {transfer.name: transfer.messages for transfer in program.transfers}
        for layout in (layouts or {}).values():
            self.bounds |= layout.bounds
            self.messages |= layout.messages
        self.agreed: set[int] = set()
        self.maker = {tensor: run for run in program.slices for tensor in run.outputs}
        self.held: list[dict[str, object]] = [{} for _ in program.instructions]
        self.freed: list[set[str]] = [set() for _ in program.instructions]
        self.loaded: list[set[str]] = [set() for _ in program.instructions]
        self.mail: dict[tuple[str, Message], list[int]] = {}
        self.at = [0] * program.num_ranks
        self.arrived: dict[str, set[int]] = {}
        self.reduced: list[set[str]] = [set() for _ in program.instructions]
        self.awaited: list[set[str]] = [set() for _ in program.instructions]
        self.stepped: set[int] = set()
        self.done: list[set[str]] = [set() for _ in program.instructions]  # runs that went forward or backward
        self.turns: list[dict[str, int]] = [{} for _ in program.instructions]  # runs that changed what a rank has
        self.ran = [0] * program.num_ranks
        self.wrote: list[set[str]] = [set() for _ in program.instructions]
        self.sent: set[tuple[str, str, int]] = set()
        self.given: dict[tuple[str, int], dict[str, int]] = {}
        self.there: list[set[str]] = [set() for _ in program.instructions]  # flats
        self.posted = Counter[tuple[Op, str, int]]()  # gathers and scatters of flats
        self.most_there = 0

    def run(self, rng: random.Random) -> None:
        """Any rank that can go on does, in random order, until all are done."""
        total = sum(map(len, self.program.instructions))
        while sum(self.at) < total:
            able = [rank for rank in range(self.program.num_ranks) if self.can_go_on(rank)]
            assert able, f"all ranks wait: {[self.next(rank) for rank in range(self.program.num_ranks)]}"
            rank = rng.choice(able)
            self.perform(rank, self.program.instructions[rank][self.at[rank]])
            self.at[rank] += 1
        assert not any(self.held), self.held
        assert not self.mail, self.mail
        assert not self.given, self.given
        assert not any(self.there), self.there
        for write in self.program.writes:
            assert all(write.name in self.wrote[rank] for rank in write.ranks)
        for state in self.program.states:
            for buffer in state.buffers:
                users = sum(buffer in run.states for run in self.program.slices)
                assert {self.turns[rank].get(buffer, 0) for rank in state.ranks} == {users}

    def next(self, rank: int) -> Instruction | None:
        instructions = self.program.instructions[rank]
        return instructions[self.at[rank]] if self.at[rank] < len(instructions) else None

    def can_go_on(self, rank: int) -> bool:
        instruction = self.next(rank)
        if instruction is None:
            return False
        if instruction.op is Op.AWAIT:
            if instruction.target in {**self.program.bucket_by_name, **self.program.flags_by_name}:
                summed = self.summed(instruction.target)
                return self.arrived.get(summed.name, set()) == set(summed.ranks)
            if instruction.target in self.program.flat_by_name:
                return self.all_posted(rank, Op.UNSHARD, instruction.target)
            wanted = self.messages[instruction.target]
            return all((instruction.target, m) in self.mail for m in wanted if m.target == rank)
        if instruction.op is Op.TALLY:
            self.arrived.setdefault(instruction.target, set()).add(rank)
            return self.arrived[instruction.target] == set(self.program.tally_by_name[instruction.target].ranks)
        if instruction.op is Op.ADD:
            return self.all_posted(rank, Op.SCATTER, instruction.target)
        if instruction.op is Op.WRITE:
            return self.can_write(rank, instruction.target)
        if instruction.op is Op.HAND:
            hand = self.program.handover_by_name[instruction.target]
            return rank == hand.source or (hand.name, rank) in self.given
        if instruction.op in (Op.AGREE, Op.CLIP):
            self.arrived.setdefault(instruction.op, set()).add(rank)
            return len(self.arrived[instruction.op]) == self.program.num_ranks
        return True

    def summed(self, name: str) -> Bucket | Flags:
        """The bucket or flags of a name."""
        return self.program.bucket_by_name.get(name) or self.program.flags_by_name[name]

    def perform(self, rank: int, instruction: Instruction) -> None:
        name = instruction.target
        if instruction.op is Op.LOAD:
            assert name not in self.loaded[rank]
            assert rank not in self.agreed
            self.loaded[rank].add(name)
        elif instruction.op is Op.AGREE:
            self.agreed.add(rank)
        elif instruction.op is Op.FORWARD:
            self.forward(rank, self.program.slice_by_name[name])
        elif instruction.op is Op.BACKWARD:
            self.backward(rank, self.program.slice_by_name[name])
        elif instruction.op is Op.TRANSFER:
            self.send(rank, self.program.transfer_by_name[name])
        elif instruction.op is Op.AWAIT and name in self.program.transfer_by_name:
            messages = [m for m in self.messages[name] if m.target == rank]
            self.make(rank, f"arrivals:{name}", {m: self.mail.pop((name, m)) for m in messages})
        elif instruction.op is Op.REDUCE:
            self.arrived.setdefault(name, set()).add(rank)
            self.reduced[rank].add(name)
        elif name in self.program.flat_by_name:
            self.move(rank, instruction)
        elif instruction.op is Op.AWAIT:
            self.awaited[rank].add(name)
        elif instruction.op is Op.STEP:
            waited = {name for name in self.reduced[rank] if len(self.summed(name).ranks) > 1}
            assert waited == self.awaited[rank]
            for flat in self.program.flats:
                users = [r for r in self.program.slices if flat.name in r.flats and r.backward]
                given = sum(not set(flat.parameters).isdisjoint(r.trained) for r in users)
                assert self.posted[Op.ADD, flat.name, rank] == (given if rank in flat.ranks else 0)
            for flags in self.program.flags_by_name.values():
                trained = [r for r in self.program.slices if not set(flags.parameters).isdisjoint(r.trained)]
                assert (flags.name in self.awaited[rank]) is (rank in flags.ranks and bool(trained))
            self.stepped.add(rank)
        elif instruction.op is Op.GATHER:
            assert rank in self.stepped
        elif instruction.op is Op.HAND:
            self.hand(rank, name)
        elif instruction.op is Op.WRITE:
            write = self.program.write_by_name[name]
            assert self.ran[rank] == (self.runs(rank) if write.after else 0)
            self.wrote[rank].add(name)
        elif instruction.op is Op.TALLY:
            layers = set(self.program.tally_by_name[name].layers)
            counting = [run for run in self.program.slices if layers & set(run.statistics) and rank in run.ranks]
            due = {f"{op} {run.name}" for run in counting for op in ("F", "B")[: 1 + run.backward]}
            assert due <= self.done[rank]
        elif instruction.op is Op.FREE:
            del self.held[rank][name]
            assert name not in self.freed[rank]
            self.freed[rank].add(name)

    def all_posted(self, rank: int, op: Op, name: str) -> bool:
        """Whether all ranks of a flat have come as far with it as this one."""
        own = self.posted[op, name, rank]
        return all(self.posted[op, name, other] >= own for other in self.program.flat_by_name[name].ranks)

    def move(self, rank: int, instruction: Instruction) -> None:
        """Gather, release or scatter a flat."""
        name = instruction.target
        self.posted[instruction.op, name, rank] += 1
        if instruction.op is Op.UNSHARD:
            assert name not in self.there[rank]
        elif instruction.op is Op.AWAIT:
            assert self.posted[Op.AWAIT, name, rank] == self.posted[Op.UNSHARD, name, rank]
            self.there[rank].add(name)
        elif instruction.op is Op.RESHARD:
            self.there[rank].remove(name)
        elif instruction.op is Op.ADD:
            assert self.posted[Op.ADD, name, rank] == self.posted[Op.SCATTER, name, rank]
        gathering = sum(
            self.posted[Op.UNSHARD, flat.name, rank] - self.posted[Op.AWAIT, flat.name, rank]
            for flat in self.program.flats
        )
        self.most_there = max(self.most_there, len(self.there[rank]) + gathering)

    def make(self, rank: int, buffer: str, value: object) -> None:
        assert buffer not in self.held[rank]
        assert buffer not in self.freed[rank]
        self.held[rank][buffer] = value

    def runs(self, rank: int) -> int:
        """Times that a rank goes forward or backward."""
        return sum(i.op in (Op.FORWARD, Op.BACKWARD) for i in self.program.instructions[rank])

    def can_write(self, rank: int, name: str) -> bool:
        """Sends leave at once; who lacks a parameter waits for it."""
        fetches = self.program.write_by_name[name].fetches
        self.sent |= {(name, f.parameter, target) for f in fetches if f.source == rank for target in f.targets}
        return all((name, f.parameter, rank) in self.sent for f in fetches if rank in f.targets)

    def hand(self, rank: int, name: str) -> None:
        hand = self.program.handover_by_name[name]
        if rank != hand.source:
            self.turns[rank] |= self.given.pop((name, rank))
            return
        buffers = self.program.state_by_name[hand.state].buffers
        for target in hand.targets:
            self.given[name, target] = {buffer: self.turns[rank].get(buffer, 0) for buffer in buffers}

    def touch(self, rank: int, run: SliceRun) -> None:
        """A run finds each state as the one before it in one process left it. Of its ranks the first answers for it."""
        tasks = list(dict.fromkeys(task.partition("#")[0] for task, _ in self.program.losses))
        order = sorted(self.program.slices, key=lambda r: tasks.index(r.task))
        for buffer in run.states:
            users = [other.name for other in order if buffer in other.states]
            assert self.turns[rank].get(buffer, 0) == users.index(run.name)
            self.turns[rank][buffer] = users.index(run.name) + (rank == run.ranks[0])

    def forward(self, rank: int, run: SliceRun) -> None:
        self.done[rank].add(f"F {run.name}")
        assert set(run.flats) <= self.there[rank]
        self.ran[rank] += 1
        self.touch(rank, run)
        assert run.task in self.loaded[rank]
        assert rank in self.agreed or self.program.num_ranks == 1
        for tensor in run.inputs:
            pieces = list(self.pieces(rank, tensor, self.maker[tensor], run, backward=False))
            assert sorted(pieces) == self.samples(tensor, run, rank)
        self.make(rank, f"activations:{run.name}", None)

    def backward(self, rank: int, run: SliceRun) -> None:
        assert f"activations:{run.name}" in self.held[rank]
        self.done[rank].add(f"B {run.name}")
        assert set(run.flats) <= self.there[rank]
        self.ran[rank] += 1
        for tensor in run.outputs:
            readers = [r for r in self.program.slices if tensor in r.inputs and r.backward]
            if not self.program.tensor_by_name[tensor].needs_grad or tensor in dict(self.program.losses).values():
                continue
            given = Counter[int]()
            for reader in readers:
                given.update(self.pieces(rank, tensor, run, reader, backward=True))
            assert given == self.gradients_due(tensor, run, readers, rank)
        if any(self.program.tensor_by_name[tensor].needs_grad for tensor in run.inputs):
            self.make(rank, f"gradients:{run.name}", None)

    def samples(self, tensor: str, run: SliceRun, rank: int) -> list[int]:
        """Samples of a tensor that a run holds on a rank; [0] for one that cannot be cut, if it has samples at all."""
        held = list(range(*self.bounds[run.name][run.ranks.index(rank)]))
        return held if self.program.tensor_by_name[tensor].rows else [0][: len(held)]

    def gradients_due(self, tensor: str, run: SliceRun, readers: list[SliceRun], rank: int) -> Counter[int]:
        """How often each sample's gradient must come: once from every reader of the sample on any rank."""
        if not self.program.tensor_by_name[tensor].rows:
            ranks = sum(bool(self.samples(tensor, r, reader)) for r in readers for reader in r.ranks)
            return Counter({0: ranks} if rank == run.ranks[0] and ranks else {})
        return Counter(dict.fromkeys(self.samples(tensor, run, rank), len(readers)) if readers else {})

    def pieces(self, rank: int, tensor: str, source: SliceRun, target: SliceRun, *, backward: bool) -> Iterator[int]:
        """Samples of a tensor that this rank has from the other run: its own, then those that arrived."""
        if rank in source.ranks and rank in target.ranks:
            if self.program.tensor_by_name[tensor].rows:
                mine = [s for s in self.samples(tensor, source, rank) if s in self.samples(tensor, target, rank)]
            else:
                mine = self.samples(tensor, target, rank) if rank == source.ranks[0] else []
            buffer = f"gradients:{target.name}" if backward else f"activations:{source.name}"
            assert not mine or buffer in self.held[rank]
            yield from mine
        for transfer in self.program.transfers:
            ends = (target.name, source.name) if backward else (source.name, target.name)
            messages = [m for m in self.messages[transfer.name] if m.tensor == tensor and m.target == rank]
            if (transfer.source, transfer.target) == ends and transfer.backward is backward and messages:
                arrived = self.held[rank][f"arrivals:{transfer.name}"]
                assert isinstance(arrived, dict)
                for message in messages:
                    yield from arrived[message]

    def send(self, rank: int, transfer: Transfer) -> None:
        run = self.program.slice_by_name[transfer.source]
        for m in self.messages[transfer.name]:
            if m.source == rank:
                assert f"{'gradients' if transfer.backward else 'activations'}:{run.name}" in self.held[rank]
                rows = self.program.tensor_by_name[m.tensor].rows
                samples = list(range(m.low, m.high)) if rows else [0]
                assert set(samples) <= set(self.samples(m.tensor, run, rank))
                self.mail[transfer.name, m] = samples
