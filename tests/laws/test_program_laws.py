"""Laws of lowered programs (design.md, section 7), for random task graphs and random valid plans.

`Abstract` runs all ranks together on sample numbers in place of tensors. It shares no code with `spindle.runtime.laws`.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spindle.contract import contract
from spindle.errors import ProgramError
from spindle.graph import TaskGraph
from spindle.runtime.laws import broken_laws, check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.passes import accumulating, restricted
from spindle.runtime.programs.program import Instruction, Message, Op, Program, SliceRun, Transfer
from tests.random_plans import random_plan
from tests.task_graphs import random_task_graph

seeds = st.integers(0, 10**9)


def random_program(seed: int) -> tuple[TaskGraph, Program]:
    """One to three tasks on one to five ranks, sometimes with clipping, recompute and sharded optimizer states."""
    rng = random.Random(seed)
    sample = random_task_graph(seed, num_tasks=rng.randint(1, 3), operators_per_task=rng.randint(1, 7))
    metagraph = contract(sample.graph)
    return sample.graph, lower(
        random_plan(metagraph, rng.randint(1, 5), seed),
        metagraph,
        sample.graph,
        losses=sample.losses,
        weights=sample.weights,
        max_grad_norm=rng.choice((None, 0.5)),
        recompute=rng.choice(((), ("a", "b"))),
        shard_optimizer=rng.random() < 0.3,
    )


# -- the laws ---------------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(seeds)
def test_every_law_holds_for_every_plan(seed: int) -> None:
    """500 random graphs and plans: lowered, checked, printed and read back, run to the end on sample numbers."""
    graph, program = random_program(seed)
    check_program(program)
    assert text.loads(text.dumps(program)) == program
    check_messages_pair_up(program)
    check_meetings_agree(program)
    check_parameters(program, graph)
    Abstract(program).run(random.Random(seed))


@settings(max_examples=60)
@given(seeds)
def test_the_laws_hold_when_some_tasks_rest(seed: int) -> None:
    """The program of any one task keeps the laws, and reduces the same buckets over the same ranks or not at all."""
    _, program = random_program(seed)
    for task, _ in program.losses:
        part = restricted(program, [task])
        check_program(part)
        check_messages_pair_up(part)
        Abstract(part).run(random.Random(seed))
        assert part.buckets == program.buckets
        assert part.groups == program.groups


@settings(max_examples=60)
@given(seeds)
def test_rounds_that_only_add_end_too(seed: int) -> None:
    """Without reductions, clipping and step a round still reaches its end and frees all that it made."""
    _, program = random_program(seed)
    adding = replace(program, instructions=tuple(accumulating(i, program.bucket_by_name) for i in program.instructions))
    Abstract(adding).run(random.Random(seed))
    assert not {i.op for rank in adding.instructions for i in rank} & {Op.REDUCE, Op.CLIP, Op.STEP, Op.GATHER}


def check_messages_pair_up(program: Program) -> None:
    """Law 1: every send has one receive of the same (flow, samples); each pair of ranks has both in one order."""
    sent: dict[tuple[int, int], list[tuple[str, Message]]] = {}
    received: dict[tuple[int, int], list[tuple[str, Message]]] = {}
    for rank, instructions in enumerate(program.instructions):
        for instruction in instructions:
            if instruction.op is Op.TRANSFER:
                for m in program.transfer_by_name[instruction.target].messages:
                    assert m.source != m.target
                    for end, found in ((m.source, sent), (m.target, received)):
                        if end == rank:
                            found.setdefault((m.source, m.target), []).append((instruction.target, m))
    assert sent == received


def check_meetings_agree(program: Program) -> None:
    """Laws 2 and 3: groups come in one order; two ranks meet the collectives that they share in the same order."""
    assert program.groups == tuple(sorted(program.groups))
    assert set(program.groups) == {bucket.ranks for bucket in program.buckets if len(bucket.ranks) > 1}
    met = [
        [i.target for i in instructions if i.op in (Op.REDUCE, Op.CLIP, Op.GATHER)]
        for instructions in program.instructions
    ]
    everyone = {"": tuple(range(program.num_ranks))}
    ranks_of = everyone | {bucket.name: bucket.ranks for bucket in program.buckets}
    for a in range(program.num_ranks):
        for b in range(a):
            of_a, of_b = ([name for name in met[rank] if {a, b} <= set(ranks_of[name])] for rank in (a, b))
            assert of_a == of_b


def check_parameters(program: Program, graph: TaskGraph) -> None:
    """Law 6: a parameter that is trained lives on exactly the ranks that use it; each bucket is reduced once there."""
    users: dict[str, set[int]] = {}
    trained: set[str] = set()
    for run in program.slices:
        for parameter in (p for name in run.operators for p in graph.by_name[name].parameters):
            users.setdefault(parameter.name, set()).update(run.ranks)
            trained |= {parameter.name} if parameter.trainable else set()
    held = {name: bucket.ranks for bucket in program.buckets for name in bucket.parameters}
    assert held == {name: tuple(sorted(users[name])) for name in trained}
    for rank, instructions in enumerate(program.instructions):
        wanted = [b for b in program.buckets if rank in b.ranks and len(b.ranks) > 1]
        assert sorted(i.target for i in instructions if i.op is Op.REDUCE) == sorted(b.name for b in wanted)
        owned = [b.name for b in wanted if b.owner is not None]
        assert sorted(i.target for i in instructions if i.op is Op.GATHER) == sorted(owned)
    for bucket in program.buckets:
        assert [rank for rank in bucket.ranks if bucket.updated_by(rank)] in (list(bucket.ranks), [bucket.owner])


class Abstract:
    """All ranks in one place: a tensor is the list of samples that a rank holds of it, a gradient a count by sample.

    A send never waits, a receive waits for its sender, a reduction for all its ranks: what a network does.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
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

    def next(self, rank: int) -> Instruction | None:
        instructions = self.program.instructions[rank]
        return instructions[self.at[rank]] if self.at[rank] < len(instructions) else None

    def can_go_on(self, rank: int) -> bool:
        instruction = self.next(rank)
        if instruction is None:
            return False
        if instruction.op is Op.AWAIT:
            bucket = self.program.bucket_by_name.get(instruction.target)
            if bucket is not None:
                return self.arrived.get(bucket.name, set()) == set(bucket.ranks)
            wanted = self.program.transfer_by_name[instruction.target].messages
            return all((instruction.target, m) in self.mail for m in wanted if m.target == rank)
        if instruction.op is Op.CLIP:
            self.arrived.setdefault("", set()).add(rank)
            return len(self.arrived[""]) == self.program.num_ranks
        return True

    def perform(self, rank: int, instruction: Instruction) -> None:
        name = instruction.target
        if instruction.op is Op.LOAD:
            assert name not in self.loaded[rank]
            self.loaded[rank].add(name)
        elif instruction.op is Op.FORWARD:
            self.forward(rank, self.program.slice_by_name[name])
        elif instruction.op is Op.BACKWARD:
            self.backward(rank, self.program.slice_by_name[name])
        elif instruction.op is Op.TRANSFER:
            self.send(rank, self.program.transfer_by_name[name])
        elif instruction.op is Op.AWAIT and name in self.program.transfer_by_name:
            messages = [m for m in self.program.transfer_by_name[name].messages if m.target == rank]
            self.make(rank, f"arrivals:{name}", {m: self.mail.pop((name, m)) for m in messages})
        elif instruction.op is Op.REDUCE:
            self.arrived.setdefault(name, set()).add(rank)
            self.reduced[rank].add(name)
        elif instruction.op is Op.AWAIT:
            self.awaited[rank].add(name)
        elif instruction.op is Op.STEP:
            waited = {name for name in self.reduced[rank] if len(self.program.bucket_by_name[name].ranks) > 1}
            assert waited == self.awaited[rank]
            self.stepped.add(rank)
        elif instruction.op is Op.GATHER:
            assert rank in self.stepped
        elif instruction.op is Op.FREE:
            del self.held[rank][name]
            assert name not in self.freed[rank]
            self.freed[rank].add(name)

    def make(self, rank: int, buffer: str, value: object) -> None:
        assert buffer not in self.held[rank]
        assert buffer not in self.freed[rank]
        self.held[rank][buffer] = value

    def forward(self, rank: int, run: SliceRun) -> None:
        assert not run.loads or run.task in self.loaded[rank]
        for tensor in run.inputs:
            pieces = list(self.pieces(rank, tensor, self.maker[tensor], run, backward=False))
            assert sorted(pieces) == self.samples(tensor, run, rank)
        self.make(rank, f"activations:{run.name}", None)

    def backward(self, rank: int, run: SliceRun) -> None:
        assert f"activations:{run.name}" in self.held[rank]
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
        """Samples of a tensor that a run holds on a rank; [0] for one that cannot be cut."""
        return list(range(*run.bounds_of(rank))) if self.program.tensor_by_name[tensor].rows else [0]

    def gradients_due(self, tensor: str, run: SliceRun, readers: list[SliceRun], rank: int) -> Counter[int]:
        """How often each sample's gradient must come: once from every reader of the sample on any rank."""
        if not self.program.tensor_by_name[tensor].rows:
            return Counter({0: sum(len(r.ranks) for r in readers)} if rank == run.ranks[0] and readers else {})
        return Counter(dict.fromkeys(self.samples(tensor, run, rank), len(readers)) if readers else {})

    def pieces(self, rank: int, tensor: str, source: SliceRun, target: SliceRun, *, backward: bool) -> Iterator[int]:
        """Samples of a tensor that this rank has from the other run: its own, then those that arrived."""
        if rank in source.ranks and rank in target.ranks:
            if self.program.tensor_by_name[tensor].rows:
                mine = [s for s in self.samples(tensor, source, rank) if s in self.samples(tensor, target, rank)]
            else:
                mine = [0] if rank == source.ranks[0] else []
            buffer = f"gradients:{target.name}" if backward else f"activations:{source.name}"
            assert not mine or buffer in self.held[rank]
            yield from mine
        for transfer in self.program.transfers:
            ends = (target.name, source.name) if backward else (source.name, target.name)
            messages = [m for m in transfer.messages if m.tensor == tensor and m.target == rank]
            if (transfer.source, transfer.target) == ends and transfer.backward is backward and messages:
                arrived = self.held[rank][f"arrivals:{transfer.name}"]
                assert isinstance(arrived, dict)
                for message in messages:
                    yield from arrived[message]

    def send(self, rank: int, transfer: Transfer) -> None:
        run = self.program.slice_by_name[transfer.source]
        for m in transfer.messages:
            if m.source == rank:
                assert f"{'gradients' if transfer.backward else 'activations'}:{run.name}" in self.held[rank]
                rows = self.program.tensor_by_name[m.tensor].rows
                samples = list(range(m.low, m.high)) if rows else [0]
                assert set(samples) <= set(self.samples(m.tensor, run, rank))
                self.mail[transfer.name, m] = samples


# -- planted faults ---------------------------------------------------------------------------------------------------


def with_rank(program: Program, rank: int, instructions: tuple[Instruction, ...]) -> Program:
    lists = program.instructions
    return replace(program, instructions=(*lists[:rank], instructions, *lists[rank + 1 :]))


@settings(max_examples=200)
@given(seeds, st.data())
def test_no_instruction_can_be_left_out_or_done_twice(seed: int, data: st.DataObject) -> None:
    """Whatever instruction of whatever rank is dropped or doubled, a law is broken and its rank named."""
    _, program = random_program(seed)
    rank = data.draw(st.integers(0, program.num_ranks - 1))
    instructions = program.instructions[rank]
    place = data.draw(st.integers(0, len(instructions) - 1))
    left_out = with_rank(program, rank, instructions[:place] + instructions[place + 1 :])
    twice = with_rank(program, rank, instructions[: place + 1] + instructions[place:])
    for faulty in (left_out, twice):
        findings = list(broken_laws(faulty))
        assert any(f"rank {rank}" in finding for finding in findings), (instructions[place], findings)


def without(transfer: Transfer, index: int) -> Transfer:
    return replace(transfer, messages=transfer.messages[:index] + transfer.messages[index + 1 :])


def other_samples(transfer: Transfer, index: int) -> Transfer:
    m = transfer.messages[index]
    return replace(without(transfer, index), messages=(*without(transfer, index).messages, replace(m, low=m.low + 1)))


def twice_over(transfer: Transfer, index: int) -> Transfer:
    return replace(transfer, messages=(*transfer.messages, transfer.messages[index]))


def turned_round(transfer: Transfer, index: int) -> Transfer:
    m = transfer.messages[index]
    turned = replace(m, source=m.target, target=m.source)
    return replace(transfer, messages=(*without(transfer, index).messages, turned))


@pytest.mark.parametrize("plant", [without, other_samples, twice_over, turned_round])
@settings(max_examples=50)
@given(seed=seeds, data=st.data())
def test_no_message_can_be_left_out_or_changed(
    plant: Callable[[Transfer, int], Transfer], seed: int, data: st.DataObject
) -> None:
    """Every sample of every tensor, and every gradient, goes where it must, once."""
    _, program = random_program(seed)
    assume(program.transfers)
    place = data.draw(st.integers(0, len(program.transfers) - 1))
    transfer = program.transfers[place]
    index = data.draw(st.integers(0, len(transfer.messages) - 1))
    assume(plant is not other_samples or program.tensor_by_name[transfer.messages[index].tensor].rows)
    tables = (*program.transfers[:place], plant(transfer, index), *program.transfers[place + 1 :])
    assert list(broken_laws(replace(program, transfers=tables)))


@settings(max_examples=60)
@given(seed=seeds, data=st.data())
def test_no_transfer_can_be_left_out(seed: int, data: st.DataObject) -> None:
    """A transfer that is gone without a trace, as if lowering had forgotten it, is missed: forward or backward."""
    _, program = random_program(seed)
    assume(program.transfers)
    gone = data.draw(st.sampled_from([t.name for t in program.transfers]))
    traces = (gone, f"arrivals:{gone}")
    faulty = replace(
        program,
        transfers=tuple(t for t in program.transfers if t.name != gone),
        instructions=tuple(tuple(i for i in rank if i.target not in traces) for rank in program.instructions),
    )
    with pytest.raises(ProgramError, match=r"never goes back|do not make up samples|copies arrive"):
        check_program(faulty)


@settings(max_examples=60)
@given(seed=seeds, data=st.data())
def test_no_parameter_can_be_forgotten(seed: int, data: st.DataObject) -> None:
    """A trained parameter that no bucket holds would never be updated."""
    _, program = random_program(seed)
    trained = sorted({name for run in program.slices for name in run.trained})
    name = data.draw(st.sampled_from(trained))
    buckets = tuple(replace(b, parameters=tuple(p for p in b.parameters if p != name)) for b in program.buckets)
    with pytest.raises(ProgramError, match=f"parameter '{name}', which s[0-9]+ trains, stands in no bucket"):
        check_program(replace(program, buckets=buckets))


@settings(max_examples=60)
@given(seed=seeds, data=st.data())
def test_a_rank_that_joins_late_is_found(seed: int, data: st.DataObject) -> None:
    """Two reductions in different order on one rank: the ranks that disagree and those that are stuck are told."""
    _, program = random_program(seed)
    reductions = [
        (rank, [n for n, i in enumerate(instructions) if i.op is Op.REDUCE])
        for rank, instructions in enumerate(program.instructions)
    ]
    pairs = [
        (rank, a, b)
        for rank, places in reductions
        for a in places
        for b in places
        if a < b and shared(program, program.instructions[rank][a].target, program.instructions[rank][b].target)
    ]
    assume(pairs)
    rank, a, b = data.draw(st.sampled_from(pairs))
    swapped = list(program.instructions[rank])
    swapped[a], swapped[b] = swapped[b], swapped[a]
    findings = "\n".join(broken_laws(with_rank(program, rank, tuple(swapped))))
    assert "meet in different orders" in findings
    assert f"stuck: rank {rank}" in findings


def shared(program: Program, a: str, b: str) -> bool:
    """Whether two buckets have two ranks in common."""
    return len(set(program.bucket_by_name[a].ranks) & set(program.bucket_by_name[b].ranks)) > 1
