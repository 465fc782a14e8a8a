"""Laws of lowered programs (design.md, section 7), for random task graphs and random valid plans."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spindle.errors import ProgramError
from spindle.runtime.laws import broken_laws, check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.messages import Layouts
from spindle.runtime.programs.parts import parts_of
from spindle.runtime.programs.passes import accumulating, restricted, run_passes
from spindle.runtime.programs.program import Instruction, Message, Op, Program, Transfer
from spindle.runtime.steps.tally import TallyOrder
from spindle.values.contract import contract
from spindle.values.graph import TaskGraph
from spindle.values.plan import make_waves
from spindle.values.units import SAMPLES, Units
from tests.laws.abstract import Abstract, random_program
from tests.random_plans import random_plan
from tests.task_graphs import random_task_graph

seeds = st.integers(0, 10**9)
MEETINGS = (Op.AGREE, Op.REDUCE, Op.CLIP, Op.GATHER, Op.TALLY, Op.HAND, Op.WRITE)

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
    adding = replace(program, instructions=tuple(accumulating(i) for i in program.instructions))
    Abstract(adding).run(random.Random(seed))
    assert not {i.op for rank in adding.instructions for i in rank} & {Op.REDUCE, Op.CLIP, Op.STEP, Op.GATHER, Op.TALLY}


@settings(max_examples=100)
@given(seeds, st.booleans())
def test_a_ranks_part_is_enough(seed: int, varying: bool) -> None:
    """From its part alone a rank gets the instructions that the whole program has for it, whatever tasks rest, and
    folds statistics in as the whole does.
    """
    _, program = random_program(seed, varying=varying)
    tasks = [task for task, _ in program.losses]
    momenta = {layer: 0.1 for tally in program.tallies for layer in tally.layers}
    subsets = [some for count in range(len(tasks) + 1) for some in combinations(tasks, count)]
    wholes = {some: restricted(program, some) for some in subsets}
    for rank, part in enumerate(parts_of(program)):
        assert part.instructions[rank] == program.instructions[rank]
        assert run_passes(part).instructions[rank] == program.instructions[rank]
        assert not any(own for other, own in enumerate(part.instructions) if other != rank)
        for some, whole in wholes.items():
            own = restricted(part, some)
            assert own.instructions[rank] == whole.instructions[rank]
            held = {name for bucket in own.buckets for name in bucket.parameters}
            trained = [held.intersection(name for run in p.slices for name in run.trained) for p in (own, whole)]
            assert trained[0] == trained[1]
            for tally in own.tallies:
                orders = [TallyOrder(p, tally, rank, 2, momenta).likes for p in (own, whole)]
                assert orders[0] == orders[1]
        for instruction in part.instructions[rank]:
            part.describe(rank, instruction)


@settings(max_examples=100)
@given(seed=seeds, data=st.data())
def test_a_ranks_part_shares_batches_as_the_whole_does(seed: int, data: st.DataObject) -> None:
    """Of batches of any size, whose shares vary or not, a rank finds its own bounds and messages in the same order."""
    _, program = random_program(seed, varying=True)
    task = data.draw(st.sampled_from([task for task, _ in program.losses]))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    units = Units({SAMPLES: (1,) * len(sizes), "patches": tuple(sizes)})
    whole = Layouts(program).of(task, units)
    for rank, part in enumerate(parts_of(program)):
        own = Layouts(part).of(task, units)
        assert own.bounds == {name: whole.bounds[name] for name in own.bounds}
        assert {run.name for run in program.runs_by_task[task] if rank in run.ranks} <= own.bounds.keys()
        for name in (i.target for i in part.instructions[rank] if i.op is Op.TRANSFER):
            if name in whole.messages:
                both = [[m for m in found.messages[name] if rank in (m.source, m.target)] for found in (own, whole)]
                assert both[0] == both[1]


def test_a_rank_knows_nothing_of_what_others_do_among_themselves() -> None:
    """Two tasks that share nothing, each on ranks of its own."""
    sample = random_task_graph(0, num_tasks=2)
    apart = [replace(op, parameters=tuple(replace(p, name=f"{op.task}/{p.name}") for p in op.parameters))
             for op in sample.graph]  # fmt: skip
    graph = TaskGraph(tuple(apart))
    metagraph = contract(graph)
    plan = random_plan(metagraph, 2, 1)
    moved = [
        replace(s, devices=tuple(d + 2 * (metagraph[s.metaop].operators[0].task == "t1") for d in s.devices))
        for s in plan
    ]
    plan = replace(plan, num_devices=4, devices_per_node=4, waves=make_waves(moved))
    program = lower(plan, metagraph, graph, losses=sample.losses, weights=sample.weights)
    check_program(program)
    for rank, part in enumerate(parts_of(program)):
        own = f"t{rank // 2}"
        assert {run.task for run in part.slices} == {own}
        assert all(name.startswith(own) for bucket in part.buckets for name in bucket.parameters)
        assert all(tensor.name.startswith(own) for tensor in part.tensors)


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
    shared = [bucket.ranks for bucket in program.buckets] + [tally.ranks for tally in program.tallies]
    assert set(program.groups) == {ranks for ranks in shared if len(ranks) > 1}
    met = [[(i.op, i.target) for i in instructions if i.op in MEETINGS] for instructions in program.instructions]
    everyone = {"": tuple(range(program.num_ranks))}
    ranks_of = everyone | {bucket.name: bucket.ranks for bucket in program.buckets}
    ranks_of |= {tally.name: tally.ranks for tally in program.tallies}
    ranks_of |= {hand.name: tuple(hand.members()) for hand in program.handovers}
    ranks_of |= {write.name: tuple(write.members()) for write in program.writes}
    for a in range(program.num_ranks):
        for b in range(a):
            of_a, of_b = ([(op, name) for op, name in met[rank] if {a, b} <= set(ranks_of[name])] for rank in (a, b))
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
    _, program = random_program(seed, varying=seed % 2 == 1)
    assume(program.transfers)
    gone = data.draw(st.sampled_from([t.name for t in program.transfers]))
    traces = (gone, f"arrivals:{gone}")
    faulty = replace(
        program,
        transfers=tuple(t for t in program.transfers if t.name != gone),
        instructions=tuple(tuple(i for i in rank if i.target not in traces) for rank in program.instructions),
    )
    with pytest.raises(ProgramError, match=r"never goes back|do not make up samples|copies arrive|bounds vary"):
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


def of_kinds(program: Program) -> Program:
    """Equal instruction lists as one value: they are looked at once."""
    known = {instructions: instructions for instructions in program.instructions}
    return replace(program, instructions=tuple(known[instructions] for instructions in program.instructions))


def one_by_one(program: Program) -> Program:
    """Each instruction list a value of its own: each rank is looked at by itself."""
    return replace(program, instructions=tuple((*own,) for own in program.instructions))


@settings(max_examples=200)
@given(seed=seeds, data=st.data())
def test_ranks_that_do_the_same_are_judged_as_if_looked_at_one_by_one(seed: int, data: st.DataObject) -> None:
    """Every finding, of instructions dropped or swapped on all ranks that have them and of tables that changed."""
    _, program = random_program(seed, varying=seed % 2 == 1)
    instruction = data.draw(st.sampled_from(sorted({i for own in program.instructions for i in own}, key=str)))
    kind, moves = data.draw(st.tuples(st.integers(0, 4), st.booleans()))
    if kind == 0:
        lists = tuple(tuple(i for i in own if i != instruction) for own in program.instructions)
    else:
        at = [own.index(instruction) if instruction in own else None for own in program.instructions]
        lists = tuple(
            own if place is None else (*own[place : place + 1 + kind], *own[:place], *own[place + 1 + kind :])
            for place, own in zip(at, program.instructions, strict=True)
        )
    faulty = replace(program, instructions=lists)
    if program.transfers and moves:
        transfer = data.draw(st.sampled_from(program.transfers))
        members = {m.source for m in transfer.messages} - {0}
        moved = tuple(replace(m, source=0) if m.source in members and m.target else m for m in transfer.messages)
        tables = (replace(transfer, messages=moved) if t is transfer else t for t in program.transfers)
        faulty = replace(faulty, transfers=tuple(tables))
    assert sorted(broken_laws(of_kinds(faulty))) == sorted(broken_laws(one_by_one(faulty)))


def shared(program: Program, a: str, b: str) -> bool:
    """Whether two buckets have two ranks in common."""
    return len(set(program.bucket_by_name[a].ranks) & set(program.bucket_by_name[b].ranks)) > 1
