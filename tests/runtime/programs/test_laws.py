"""Laws: every fault that can be planted in a program is found, and explained with its rank, instruction and reason."""

from dataclasses import replace

import pytest

from spindle.errors import ProgramError
from spindle.runtime.laws import broken_laws, check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.passes import run_passes
from spindle.runtime.programs.program import Program
from tests.runtime.programs.hand_program import TEXT, hand_plan, hand_slice, lowered

RANK_0 = TEXT.index("rank 0\n")
RANK_1 = TEXT.index("rank 1\n")


def edited(old: str, new: str, *, rank: int | None = None) -> Program:
    """The program in the head with one edit, in one rank's instructions or in the tables."""
    begin, end = ((0, RANK_0), (RANK_0, RANK_1), (RANK_1, len(TEXT)))[0 if rank is None else rank + 1]
    part = TEXT[begin:end]
    assert part.count(old) == 1, f"{old!r} stands {part.count(old)} times"
    return text.loads(TEXT[:begin] + part.replace(old, new) + TEXT[end:])


def test_the_program_in_the_head_is_sound() -> None:
    assert list(broken_laws(text.loads(TEXT))) == []


INSTRUCTION_FAULTS = {
    "a missing send": (0, "  TRANSFER s0>s1\n", "", "rank 0 does TRANSFER s0>s1 0 times, not 1"),
    "a missing receive": (0, "  AWAIT s0<s1\n", "", "rank 0 does AWAIT s0<s1 0 times, not 1"),
    "a read of what is still on its way": (
        0,
        "  AWAIT s0<s1\n  BACKWARD s0\n",
        "  BACKWARD s0\n  AWAIT s0<s1\n",
        "rank 0, BACKWARD s0: reads arrivals:s0<s1, which is not there",
    ),
    "a wait before the start": (
        0,
        "  TRANSFER s0<s1\n  AWAIT s0<s1\n",
        "  AWAIT s0<s1\n  TRANSFER s0<s1\n",
        "rank 0 waits for transfer s0<s1 before it starts it",
    ),
    "swapped sends": (
        0,
        "  TRANSFER s0>s1\n  TRANSFER s0<s1\n",
        "  TRANSFER s0<s1\n  TRANSFER s0>s1\n",
        "ranks 0 and 1 meet in different orders: 0 is at 's0<s1' when 1 is at 's0>s1'",
    ),
    "a buffer freed twice": (
        1,
        "  FREE activations:s1\n",
        "  FREE activations:s1\n  FREE activations:s1\n",
        "rank 1, FREE activations:s1: it was freed before",
    ),
    "a buffer freed that was never made": (
        0,
        "  FREE arrivals:s0<s1\n",
        "  FREE arrivals:s0<s1\n  FREE gradients:s0\n",
        "rank 0, FREE gradients:s0: it was never made",
    ),
    "a buffer freed before its last reader": (
        1,
        "  BACKWARD s1\n  FREE activations:s1\n",
        "  FREE activations:s1\n  BACKWARD s1\n",
        "rank 1, BACKWARD s1: reads activations:s1, which is not there",
    ),
    "a buffer never freed": (1, "  FREE gradients:s1\n", "", "rank 1 never frees gradients:s1"),
    "a reduction left out": (0, "  REDUCE b0\n", "", "rank 0 does REDUCE b0 0 times, not 1"),
    "a reduction done twice": (
        1,
        "  REDUCE b0\n",
        "  REDUCE b0\n  REDUCE b0\n",
        "rank 1 does REDUCE b0 2 times, not 1",
    ),
    "a reduction of what is alone": (
        1,
        "  REDUCE b0\n",
        "  REDUCE b0\n  REDUCE b1\n",
        "rank 1 does REDUCE b1 1 times, not 0",
    ),
    "a reduction too early": (
        1,
        "  BACKWARD s0\n  FREE activations:s0\n  FREE gradients:s1\n  REDUCE b0\n",
        "  REDUCE b0\n  BACKWARD s0\n  FREE activations:s0\n  FREE gradients:s1\n",
        "rank 1 reduces bucket b0 before BACKWARD s0, which adds to it",
    ),
    "a reduction that nobody waits for": (0, "  AWAIT b0\n", "", "rank 0 does AWAIT b0 0 times, not 1"),
    "a step before its reduction": (
        0,
        "  REDUCE b0\n  AWAIT b0\n  STEP\n",
        "  STEP\n  REDUCE b0\n  AWAIT b0\n",
        "rank 0 does not end with STEP",
    ),
    "a step left out": (1, "  STEP\n", "", "rank 1 does STEP 0 times, not 1"),
    "a clip that nobody asked for": (0, "  STEP\n", "  CLIP\n  STEP\n", "rank 0 does CLIP 1 times, not 0"),
    "a run on the wrong rank": (
        0,
        "  TRANSFER s0>s1\n",
        "  TRANSFER s0>s1\n  FORWARD s1\n",
        "rank 0 does FORWARD s1 1 times, not 0",
    ),
    "a backward left out": (1, "  BACKWARD s1\n", "", "rank 1 does BACKWARD s1 0 times, not 1"),
    "a batch that is not loaded": (1, "  LOAD t\n", "", "rank 1 does LOAD t 0 times, not 1"),
    "a batch loaded too late": (
        1,
        "  LOAD t\n  AGREE\n  FORWARD s0\n",
        "  AGREE\n  FORWARD s0\n  LOAD t\n",
        "rank 1 reads the batch of task 't' before LOAD t",
    ),
    "a batch loaded after the ranks agreed": (
        0,
        "  LOAD t\n  AGREE\n",
        "  AGREE\n  LOAD t\n",
        "rank 0 loads a batch after the ranks have agreed on theirs",
    ),
    "work before the ranks agreed": (
        1,
        "  AGREE\n  FORWARD s0\n",
        "  FORWARD s0\n  AGREE\n",
        "rank 1 begins before the ranks have agreed on their batches",
    ),
    "a rank that does not agree": (0, "  AGREE\n", "", "rank 0 does AGREE 0 times, not 1"),
    "ranks that agree twice": (1, "  AGREE\n", "  AGREE\n  AGREE\n", "rank 1 does AGREE 2 times, not 1"),
    "a batch of no task": (0, "  LOAD t\n", "  LOAD t\n  LOAD u\n", "rank 0 does LOAD u 1 times, not 0"),
    "an unknown target": (0, "  FORWARD s0\n", "  FORWARD s7\n", "rank 0, FORWARD s7: the program has no 's7'"),
}


@pytest.mark.parametrize("fault", INSTRUCTION_FAULTS.values(), ids=INSTRUCTION_FAULTS)
def test_a_fault_in_the_instructions(fault: tuple[int, str, str, str]) -> None:
    rank, old, new, message = fault
    assert message in list(broken_laws(edited(old, new, rank=rank)))


TABLE_FAULTS = {
    "too few samples": (
        "t/y 0 -> 1 samples 0:3",
        "t/y 0 -> 1 samples 0:2",
        "'t/y' for s1 on rank 1: pieces [(0, 2), (3, 5)] do not make up samples 0..5",
    ),
    "samples of another rank": (
        "t/y 0 -> 1 samples 0:3",
        "t/y 0 -> 1 samples 0:4",
        "'t/y' for s1 on rank 1: rank 0 sends samples 0..4 but holds (0, 3)",
    ),
    "a message to oneself": (
        "t/y 0 -> 1 samples 0:3",
        "t/y 1 -> 1 samples 0:3",
        "transfer s0>s1: rank 1 sends 't/y' to itself",
    ),
    "a gradient that never goes back": (
        "transfer s0<s1 from s1 to s0 backward\n  t/y 1 -> 0 samples 0:3\n",
        "transfer s0<s1 from s1 to s0 backward\n",
        "gradient of 't/y', samples 0..3, from s1 on rank 1 to s0 on rank 0: never goes back",
    ),
    "a gradient of other samples": (
        "t/y 1 -> 0 samples 0:3",
        "t/y 1 -> 0 samples 1:3",
        "gradient of 't/y', samples 1..3, from s1 on rank 1 to s0 on rank 0: goes back where it never came from",
    ),
    "a message from a rank that has nothing": (
        "transfer s0<s1 from s1 to s0 backward\n  t/y 1 -> 0",
        "transfer s0<s1 from s1 to s0 backward\n  t/y 0 -> 1",
        "transfer s0<s1: 't/y' goes from rank 0 to rank 1, but s1 is on ranks (1,), s0 on (0, 1)",
    ),
    "a tensor that does not pass": (
        "t/y 1 -> 0 samples 0:3",
        "t/loss 1 -> 0 samples 0:3",
        "transfer s0<s1: 't/loss' goes from rank 1 to rank 0, but it does not pass from s1 to s0",
    ),
    "a wrong group": (
        "bucket b0 float32 ranks 0 1",
        "bucket b0 float32 ranks 0",
        "s0 on rank 1 trains parameters of bucket b0, which rank 1 does not hold",
    ),
    "another wrong group": (
        "bucket b1 float32 ranks 1",
        "bucket b1 float32 ranks 0 1",
        "rank 0 does REDUCE b1 0 times, not 1",
    ),
    "a parameter in two buckets": (
        "  a.0.w\nbucket b1",
        "  a.0.w\n  scale\nbucket b1",
        "parameter 'scale' stands in 2 buckets",
    ),
    "a parameter in no bucket": (
        "  a.0.w\nbucket",
        "bucket",
        "parameter 'a.0.w', which s0 trains, stands in no bucket and in no flat of the run: it would be neither "
        "reduced nor updated",
    ),
    "a gap in the batch": (
        "bounds 0:3 3:5",
        "bounds 0:3 4:5",
        "slice run s0: bounds ((0, 3), (4, 5)) do not divide the batch",
    ),
    "bounds of another rank": ("bounds 0:3 3:5", "bounds 0:5", "slice run 's0' has 1 bounds for 2 ranks"),
    "a rank that is not there": (
        "ranks 0 1\n  bounds",
        "ranks 0 2\n  bounds",
        "slice run 's0' names ranks [0, 2]; name at least one of 0 .. 1, each once",
    ),
    "an input that nobody makes": ("outputs t/y", "outputs", "slice run s1 reads 't/y', which no run gives out"),
    "a tensor without a row": (
        "tensor t/y float32 5,2 rows 1 dim 0 of samples grad\n",
        "",
        "slice run 's1' names tensor 't/y', which the program does not have",
    ),
    "a task without a loss": ("loss t t/loss weight 0.5\n", "", "task 't' has no loss"),
    "a loss that nobody makes": (
        "loss t t/loss weight",
        "loss t t/y2 weight",
        "the loss of task 't' is 't/y2', which no slice run of that task gives out",
    ),
    "one name for two": ("slice s1 t.loss", "slice s0 t.loss", "slice run 's0' stands in the program more than once"),
    "a transfer of unknown runs": (
        "transfer s0>s1 from s0 to s1",
        "transfer s0>s1 from s0 to s9",
        "transfer 's0>s1' names slice run 's9', which the program does not have",
    ),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS.values(), ids=TABLE_FAULTS)
def test_a_fault_in_the_tables(fault: tuple[str, str, str]) -> None:
    old, new, message = fault
    assert message in list(broken_laws(edited(old, new)))


def test_a_tensor_that_cannot_be_cut_comes_once() -> None:
    """It comes whole from the first rank of its maker, or was made on the rank itself; never both, never neither."""
    whole = TEXT.replace("rows 1 dim 0 of samples", "rows 0 dim 0 of -").replace("0:3\n", "0:0\n")
    assert list(broken_laws(text.loads(whole))) == []
    message = "  t/y 0 -> 1 samples 0:0\n"
    for copies in (0, 2):
        faulty = text.loads(whole.replace(message, message * copies))
        assert f"'t/y' for s1 on rank 1: {copies} copies arrive, not 1" in list(broken_laws(faulty))


def test_collectives_in_different_order_are_explained() -> None:
    """Two buckets of the same ranks, reduced in another order on rank 1: pair, both places, and who is stuck."""
    both = TEXT.replace("bucket b1 float32 ranks 1\n", "bucket b1 float32 ranks 0 1\n").replace(
        "REDUCE b0", "REDUCE b0\n  REDUCE b1"
    )
    both = both.replace("AWAIT b0", "AWAIT b0\n  AWAIT b1")
    assert list(broken_laws(text.loads(both))) == []
    at = both.rindex("REDUCE b0\n  REDUCE b1")
    swapped = both[:at] + "REDUCE b1\n  REDUCE b0" + both[at + len("REDUCE b0\n  REDUCE b1") :]
    assert list(broken_laws(text.loads(swapped))) == [
        "ranks 0 and 1 meet in different orders: 0 is at 'b0' when 1 is at 'b1'",
        "stuck: rank 0, REDUCE b0 (with ranks 0, 1)",
        "stuck: rank 1, REDUCE b1 (with ranks 0, 1)",
    ]


def test_every_stuck_rank_is_named() -> None:
    """A transfer that one side never starts leaves the other side where it stands, with wave and peer."""
    findings = list(broken_laws(edited("  TRANSFER s0>s1\n", "", rank=0)))
    assert "stuck: rank 1, wave 1, TRANSFER s0>s1 (with rank 0)" in findings
    assert "stuck: rank 0, wave 0, TRANSFER s0<s1 (with rank 1)" in findings


def test_clipping_comes_when_all_is_reduced() -> None:
    """A clip in front of a reduction's end would scale half of a gradient."""
    clipped = text.dumps(lowered(max_grad_norm=1.0))
    assert list(broken_laws(text.loads(clipped))) == []
    early = clipped.replace("  AWAIT b0\n  CLIP\n", "  CLIP\n  AWAIT b0\n")
    assert "rank 0 clips gradients before the last of them is reduced" in list(broken_laws(text.loads(early)))


SHARDED = text.dumps(lowered(shard_optimizer=True))


def test_ends_where_bounds_vary_must_suffice() -> None:
    """Five samples go from two ranks to three; one that needs none of evenly shared ones may need some of others."""
    slices = (hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (0, 1, 2), 1.0))
    program = lowered(hand_plan(*slices, hand_slice("t.loss", 0, 1, (0,), 2.0), num_devices=3), varying={"t"})
    assert list(broken_laws(program)) == []
    transfers = [t.name for t in program.transfers]
    forth, back = program.transfer_by_name["s0>s1"], program.transfer_by_name["s0<s1"]
    assert (forth.senders, forth.receivers) == (back.receivers, back.senders) == ((0, 1), (0, 1, 2))
    assert [(m.source, m.target, m.low, m.high) for m in forth.messages] == [(0, 1, 2, 3), (1, 2, 4, 5)]
    for faulty, finding in (
        (replace(forth, receivers=()), "'t/x' from s0 to s1: bounds vary, so ranks [0] may have to receive it"),
        (
            replace(back, senders=(1, 2)),
            "gradient of 't/x' from s1 to s0: bounds vary, so ranks [0] may have to send it",
        ),
    ):
        tables = [program.transfer_by_name[name] for name in transfers]
        tables[transfers.index(faulty.name)] = faulty
        found = run_passes(replace(program, transfers=tuple(tables), instructions=((),) * 3))
        assert list(broken_laws(found)) == [f"{finding}, but no transfer says so"]


def test_runs_that_go_by_other_units_hold_other_samples() -> None:
    """On the same ranks nothing moves where samples are alike; where they are not, one has what the other needs."""
    slices = (hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (0, 1), 1.0))
    program = lowered(hand_plan(*slices, hand_slice("t.loss", 0, 1, (0,), 2.0)), varying={"t"})
    assert "s0>s1" not in program.transfer_by_name
    assert list(broken_laws(program)) == []
    packed = replace(program, slices=(replace(program.slices[0], weigh_by="patches"), *program.slices[1:]))
    assert list(broken_laws(packed)) == [
        f"{what}'t/x' from {ends}: bounds vary, so ranks [0, 1] may have to {verb} it, but no transfer says so"
        for what, ends in (("", "s0 to s1"), ("gradient of ", "s1 to s0"))
        for verb in ("send", "receive")
    ]


SHARED_UPDATES = {
    "parameters that are not taken": (
        "  GATHER b0\n",
        "",
        "rank 0 does GATHER b0 0 times, not 1",
    ),
    "parameters taken before they are updated": (
        "  STEP\n  GATHER b0\n",
        "  GATHER b0\n  STEP\n",
        "rank 0 takes the parameters of bucket b0 before they are updated",
    ),
    "parameters of a stranger": (
        "ranks 0 1 owner 0",
        "ranks 0 1 owner 7",
        "bucket b0 is owned by rank 7, which does not hold it",
    ),
    "an owner of what all update": ("ranks 0 1 owner 0", "ranks 0 1", "rank 1 does GATHER b0 1 times, not 0"),
}


@pytest.mark.parametrize("fault", SHARED_UPDATES.values(), ids=SHARED_UPDATES)
def test_a_fault_in_shared_updates(fault: tuple[str, str, str]) -> None:
    """With sharded optimizer states one rank updates a bucket, and the others take it once, after the step."""
    old, new, message = fault
    assert list(broken_laws(text.loads(SHARDED))) == []
    assert old in SHARDED
    assert message in list(broken_laws(text.loads(SHARDED.replace(old, new, 1))))


def test_at_most_five_findings_are_told() -> None:
    """The error says what was not done, names the first findings and counts the others."""
    program = lowered()
    empty = run_passes(program)
    check_program(empty)
    broken = text.loads(TEXT.replace("  TRANSFER s0>s1\n", "").replace("  FREE", "  LOAD"))
    count = len(list(broken_laws(broken)))
    with pytest.raises(ProgramError) as caught:
        check_program(broken)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "the program breaks the runtime's laws, so it was not started; this is a bug of Spindle unless the program was "
        "edited:"
    )
    assert len(lines) == 7
    assert lines[-1] == f"(and {count - 5} more)"
