"""Laws of layouts: how random batches are shared among the ranks of a program, and that its instructions suffice."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.errors import ProgramError
from spindle.runtime.laws import check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import split_samples
from spindle.runtime.programs.messages import (
    Layouts,
    StepLayout,
    bounds_of,
    forward_messages,
    gradient_messages,
    transfer_messages,
)
from spindle.runtime.programs.passes import run_passes
from spindle.runtime.programs.program import Message, Program, SliceRun
from spindle.values.graph import TensorSpec
from spindle.values.units import SAMPLES, Bounds, Units, shares
from tests.laws.abstract import Abstract, random_program
from tests.runtime.programs.hand_program import lowered

seeds = st.integers(0, 10**9)
PACKED = TensorSpec(name="t/x", shape=(12, 2), dtype="float32", unit="patches")
WHOLE = TensorSpec(name="t/x", shape=(3,), dtype="float32", rows=0, unit="")


def random_units(rng: random.Random, size: int) -> Units:
    """A batch whose samples have some patches, or none."""
    patches = tuple(rng.choice((0, 0, 1, 2, 5)) for _ in range(size))
    return Units({SAMPLES: (1,) * size, "patches": patches})


def random_costs(rng: random.Random, size: int) -> list[int] | None:
    """What each sample costs, samples without cost among them; or None: shared by number."""
    return [rng.choice((0, 1, 3, 20)) for _ in range(size)] if rng.random() < 0.5 else None


def random_layouts(rng: random.Random, program: Program) -> dict[str, StepLayout]:
    """How random batches of all tasks are shared, of more samples than planned, fewer, and as many."""
    layouts, found = Layouts(program), {}
    for task, _ in program.losses:
        planned = next(run.bounds[-1][1] for run in program.slices if run.task == task)
        size = rng.choice((planned, rng.randint(1, planned), rng.randint(1, 12)))
        found[task] = layouts.of(task, random_units(rng, size), random_costs(rng, size))
    return found


@st.composite
def runs(draw: st.DrawFn, name: str, planned: int) -> SliceRun:
    """A run on one to six of eight ranks, some of them tensor parallel, whose bounds vary or not."""
    parts = draw(st.sampled_from([1, 1, 2, 3]))
    copies = draw(st.integers(1, min(planned, 6 // parts)))
    ranks = tuple(draw(st.permutations(range(8))))[: copies * parts]
    return SliceRun(
        name=name,
        metaop=name,
        task="t",
        component="c",
        wave=0,
        operators=(name,),
        ranks=ranks,
        bounds=tuple(bounds for bounds in split_samples(planned, copies) for _ in range(parts)),
        inputs=(),
        outputs=(),
        trained=(),
        loads=True,
        backward=True,
        tensor_parallel=parts,
        varies=copies > 1 and draw(st.booleans()),
        weigh_by=draw(st.sampled_from([SAMPLES, "patches"])),
    )


@st.composite
def shared(draw: st.DrawFn) -> tuple[SliceRun, SliceRun, tuple[Bounds, ...], tuple[Bounds, ...]]:
    """Two runs, and what their ranks hold of one random batch."""
    planned = draw(st.integers(1, 9))
    source, target = draw(runs("s0", planned)), draw(runs("s1", planned))
    rng = random.Random(draw(seeds))
    size = draw(st.just(planned) | st.integers(1, 12))
    units, costs = random_units(rng, size), random_costs(rng, size)
    return source, target, bounds_of(source, units, costs), bounds_of(target, units, costs)


def covered(messages: Iterable[Message]) -> list[int]:
    """Samples that messages carry."""
    return sorted(sample for m in messages for sample in range(m.low, m.high))


# -- whole programs ---------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(seeds)
def test_the_instructions_of_a_program_suffice_for_any_batch(seed: int) -> None:
    """Each rank is given all samples that it needs, each once, and its gradients come back; nobody waits for ever."""
    _, program = random_program(seed, varying=True)
    check_program(program)
    assert text.loads(text.dumps(program)) == program
    rng = random.Random(seed)
    for _ in range(3):
        Abstract(program, random_layouts(rng, program)).run(rng)


@settings(max_examples=100)
@given(seeds)
def test_whoever_sends_and_receives_stands_in_the_program(seed: int) -> None:
    """Of a transfer in any step; where bounds do not vary, each pair of ranks is one of the plan's."""
    _, program = random_program(seed, varying=True)
    rng = random.Random(seed)
    for _ in range(3):
        for layout in random_layouts(rng, program).values():
            for name, messages in layout.messages.items():
                transfer = program.transfer_by_name[name]
                assert {m.source for m in messages} <= transfer.sending()
                assert {m.target for m in messages} <= transfer.receiving()
                if not any(program.slice_by_name[run].varies for run in (transfer.source, transfer.target)):
                    planned = {(m.tensor, m.source, m.target) for m in transfer.messages}
                    assert {(m.tensor, m.source, m.target) for m in messages} <= planned


@settings(max_examples=100)
@given(seed=seeds, data=st.data())
def test_no_end_of_a_transfer_can_be_forgotten(seed: int, data: st.DataObject) -> None:
    """A rank that may have to send or receive, and is not counted on, is found before a batch needs it."""
    _, program = random_program(seed, varying=True)
    ends = [
        (place, end, rank)
        for place, transfer in enumerate(program.transfers)
        for end, others, nominal in (
            ("senders", transfer.receiving(), {m.source for m in transfer.messages}),
            ("receivers", transfer.sending(), {m.target for m in transfer.messages}),
        )
        for rank in getattr(transfer, end)
        if rank not in nominal and others != {rank}
    ]
    if not ends:
        return
    place, end, rank = data.draw(st.sampled_from(ends))
    transfer = program.transfers[place]
    kept = replace(transfer, **{end: tuple(r for r in getattr(transfer, end) if r != rank)})
    tables = (*program.transfers[:place], kept, *program.transfers[place + 1 :])
    faulty = run_passes(replace(program, transfers=tables, instructions=((),) * program.num_ranks))
    verb = "send" if end == "senders" else "receive"
    with pytest.raises(ProgramError, match=rf"bounds vary, so ranks \[{rank}\] may have to {verb} it"):
        check_program(faulty)


# -- bounds -----------------------------------------------------------------------------------------------------------


@given(given=shared())
def test_bounds_divide_any_batch(given: tuple[SliceRun, SliceRun, tuple[Bounds, ...], tuple[Bounds, ...]]) -> None:
    """Copies hold consecutive samples, from the first to the last; the ranks of one copy hold the same."""
    for run, bounds in ((given[0], given[2]), (given[1], given[3])):
        parts = run.tensor_parallel
        held = bounds[::parts]
        assert list(bounds) == [own for own in held for _ in range(parts)]
        assert held[0][0] == 0
        assert all(low <= high for low, high in held)
        assert all(one[1] == other[0] for one, other in pairwise(held))
        assert held[-1][1] == given[2][-1][1] == given[3][-1][1] > 0


@given(run=st.integers(1, 9).flatmap(lambda planned: runs("s0", planned)), size=st.integers(1, 12), seed=seeds)
def test_bounds_follow_what_samples_hold_only_where_they_vary(run: SliceRun, size: int, seed: int) -> None:
    """By costs, or rows of the run's unit; else they are the plan's, of which fewer samples fill the first, and more go
    to the last.
    """
    rng = random.Random(seed)
    units, costs = random_units(rng, size), random_costs(rng, size)
    found = bounds_of(run, units, costs)
    if run.varies:
        if costs is None and run.weigh_by == "patches":
            costs = list(units.counts["patches"])
        assert found[:: run.tensor_parallel] == shares(units, len(run.ranks) // run.tensor_parallel, costs)
        return
    planned = run.bounds[-1][1]
    for (low, high), (first, last) in zip(found, run.bounds, strict=True):
        within = [sample for sample in range(first, last) if sample < size]
        more = range(planned, size) if last == planned else ()
        assert list(range(low, high)) == [*within, *more]


def test_bounds_of_batches_that_are_not_the_plan_s() -> None:
    """Five samples were planned for two ranks: 0..3 and 3..5."""
    fixed = fixed_run((0, 1), ((0, 3), (3, 5)))
    sizes = {size: bounds_of(fixed, Units({SAMPLES: (1,) * size})) for size in (1, 3, 4, 5, 8)}
    assert sizes == {
        1: ((0, 1), (1, 1)),
        3: ((0, 3), (3, 3)),
        4: ((0, 3), (3, 4)),
        5: ((0, 3), (3, 5)),
        8: ((0, 3), (3, 8)),
    }
    varying = replace(fixed, varies=True)
    patches = Units({SAMPLES: (1,) * 5, "patches": (0, 0, 0, 2, 1)})
    assert bounds_of(varying, patches) == ((0, 4), (4, 5))  # neither without a patch
    assert bounds_of(varying, Units({SAMPLES: (1,) * 5}), [9, 1, 1, 1, 1]) == ((0, 1), (1, 5))
    assert bounds_of(fixed, patches, [9, 1, 1, 1, 1]) == ((0, 3), (3, 5))
    packed = replace(varying, weigh_by="patches")
    assert bounds_of(packed, Units({SAMPLES: (1,) * 5, "patches": (9, 1, 1, 1, 1)})) == ((0, 1), (1, 5))
    assert bounds_of(packed, Units({SAMPLES: (1,) * 5})) == ((0, 3), (3, 5))  # a batch without that unit


def fixed_run(ranks: tuple[int, ...], bounds: tuple[Bounds, ...]) -> SliceRun:
    """A run whose bounds do not vary."""
    return SliceRun(
        name="s0",
        metaop="m",
        task="t",
        component="c",
        wave=0,
        operators=("o",),
        ranks=ranks,
        bounds=bounds,
        inputs=(),
        outputs=(),
        trained=(),
        loads=True,
        backward=True,
    )


# -- messages ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(given=shared())
def test_each_rank_is_given_the_samples_that_it_needs_once(
    given: tuple[SliceRun, SliceRun, tuple[Bounds, ...], tuple[Bounds, ...]],
) -> None:
    """From ranks that hold them, itself before others; a tensor that cannot be cut from the first rank of its maker."""
    source, target, held, wanted = given
    holds = dict(zip(source.ranks, held, strict=True))
    messages = list(forward_messages(PACKED, source, target, held, wanted))
    whole = list(forward_messages(WHOLE, source, target, held, wanted))
    for rank, (low, high) in zip(target.ranks, wanted, strict=True):
        own = [m for m in messages if m.target == rank]
        assert covered(own) == list(range(low, high))
        for m in own:
            first, last = holds[m.source]
            assert first <= m.low < m.high <= last
            first, last = holds.get(rank, (0, 0))
            assert m.source == rank or not (first <= m.low < last)
        assert [m.source for m in whole if m.target == rank] == ([source.ranks[0]] if low < high else [])


@settings(max_examples=300)
@given(given=shared())
def test_each_rank_gets_the_gradients_of_its_samples_once(
    given: tuple[SliceRun, SliceRun, tuple[Bounds, ...], tuple[Bounds, ...]],
) -> None:
    """From one rank of each copy that read them; of a tensor that cannot be cut from each copy with samples."""
    source, target, held, wanted = given
    reads = dict(zip(target.ranks, wanted, strict=True))
    messages = list(gradient_messages(PACKED, source, target, held, wanted))
    for rank, (low, high) in zip(source.ranks, held, strict=True):
        own = [m for m in messages if m.target == rank]
        assert covered(own) == list(range(low, high))
        for m in own:
            first, last = reads[m.source]
            assert first <= m.low < m.high <= last
            first, last = reads.get(rank, (0, 0))
            assert m.source == rank or not (first <= m.low < last)
    step = target.tensor_parallel
    leaders = [rank for rank, (low, high) in zip(target.ranks[::step], wanted[::step], strict=True) if low < high]
    found = list(gradient_messages(WHOLE, source, target, held, wanted))
    assert [m.source for m in found] == leaders
    assert {m.target for m in found} == {source.ranks[0]}


@given(given=shared())
def test_what_stays_on_a_rank_is_no_message_of_a_transfer(
    given: tuple[SliceRun, SliceRun, tuple[Bounds, ...], tuple[Bounds, ...]],
) -> None:
    """All that goes between ranks does; gradients only of tensors that have them."""
    source, target, held, wanted = given
    specs = [PACKED, replace(WHOLE, name="t/y", needs_grad=False)]
    forth = transfer_messages(specs, source, target, held, wanted, backward=False)
    back = transfer_messages(specs, source, target, held, wanted, backward=True)
    all_forth = [m for spec in specs for m in forward_messages(spec, source, target, held, wanted)]
    all_back = gradient_messages(PACKED, source, target, held, wanted)
    assert Counter(forth) == Counter(m for m in all_forth if m.source != m.target)
    assert Counter(back) == Counter(m for m in all_back if m.source != m.target)


@settings(max_examples=300)
@given(
    pair=st.integers(1, 9).flatmap(lambda planned: st.tuples(runs("s0", planned), runs("s1", planned))),
    size=st.integers(1, 12),
    backward=st.booleans(),
)
def test_batches_of_other_sizes_use_only_pairs_of_the_plan(
    pair: tuple[SliceRun, SliceRun], size: int, backward: bool
) -> None:
    """Where bounds do not vary no rank meets another that it never met in the plan's own batches."""
    source, target = (replace(run, varies=False) for run in pair)
    units = Units({SAMPLES: (1,) * size})
    specs = [PACKED, replace(WHOLE, name="t/y")]
    planned = transfer_messages(specs, source, target, source.bounds, target.bounds, backward=backward)
    bounds = bounds_of(source, units), bounds_of(target, units)
    found = transfer_messages(specs, source, target, *bounds, backward=backward)
    assert {(m.tensor, m.source, m.target) for m in found} <= {(m.tensor, m.source, m.target) for m in planned}


# -- layouts ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seeds)
def test_all_ranks_find_the_same_layout_of_a_batch(seed: int) -> None:
    """Each has the program and the batch's units of its own; what it saw before makes no difference."""
    _, program = random_program(seed, varying=True)
    received = text.loads(text.dumps(program))
    rng = random.Random(seed)
    used, size = Layouts(program), rng.randint(1, 9)
    for _ in range(4):
        units = random_units(rng, size)
        costs = random_costs(rng, size)
        again = Units(dict(units.counts))
        for task, _ in program.losses:
            here, there = used.of(task, units, costs), Layouts(received).of(task, again, costs)
            assert (here.bounds, here.messages) == (there.bounds, there.messages)
            assert here.units is units


@settings(max_examples=60)
@given(seeds)
def test_the_plan_s_own_batch_has_the_program_s_messages(seed: int) -> None:
    """As many samples as planned, each alike."""
    _, program = random_program(seed, varying=True)
    for task, _ in program.losses:
        planned = next(run.bounds[-1][1] for run in program.slices if run.task == task)
        layout = Layouts(program).of(task, Units({SAMPLES: (1,) * planned}))
        assert layout.bounds == {run.name: run.bounds for run in program.slices if run.task == task}
        assert layout.messages == {name: program.transfer_by_name[name].messages for name in layout.messages}
        names = {t.name for t in program.transfers if program.slice_by_name[t.source].task == task}
        assert layout.messages.keys() == names


def test_layouts_of_equal_batches_are_worked_out_once() -> None:
    """Bounds that vary go by rows and costs of all samples, others by their number alone; few are remembered."""
    layouts, rng = Layouts(lowered(varying={"t"})), random.Random(0)
    one, costs = Units({SAMPLES: (1,) * 4, "patches": (1, 0, 2, 1)}), [1, 2, 3, 4]
    first = layouts.of("t", one, costs)
    again = layouts.of("t", Units(dict(one.counts)), list(costs))
    assert again.messages is first.messages
    other = layouts.of("t", one, [4, 3, 2, 1])
    assert (first.bounds["s0"], other.bounds["s0"]) == (((0, 3), (3, 4)), ((0, 1), (1, 4)))
    assert (covered(first.messages["s0>s1"]), covered(other.messages["s0>s1"])) == ([0, 1, 2], [0])
    for _ in range(200):
        layouts.of("t", random_units(rng, rng.randint(1, 9)), None)
    assert len(layouts._known) <= 65
    later = layouts.of("t", one, costs)
    assert (later.bounds, later.messages) == (first.bounds, first.messages)
