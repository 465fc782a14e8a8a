"""Program text: whole programs as literal text, both ways, and everything that cannot be read."""

from dataclasses import replace

import pytest

from spindle.errors import FormatError, ProgramError
from spindle.runtime.laws import check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.program import Instruction, Op
from tests.runtime.programs.hand_program import TEXT, lowered


def test_the_program_in_the_head_as_text() -> None:
    """What lowering makes of two layers and a loss prints as the text that was written by hand."""
    assert text.dumps(lowered()) == TEXT
    assert text.loads(TEXT) == lowered()


def test_clipping_and_recompute_are_written() -> None:
    """Settings of a step survive; weights keep every digit."""
    program = lowered(max_grad_norm=0.1, recompute=("a",), weights={"t": 1 / 3})
    written = text.dumps(program)
    assert "\nclip 0.1\n" in written
    assert "wave 0 loads backward recompute\n" in written
    assert text.loads(written) == program


def test_owners_of_sharded_states_are_written() -> None:
    program = lowered(shard_optimizer=True)
    assert "bucket b0 float32 ranks 0 1 owner 0\n" in text.dumps(program)
    assert text.loads(text.dumps(program)) == program


def test_bounds_that_vary_and_their_ends_are_written() -> None:
    """A run whose samples are shared anew in each step, and the ranks that may then send and receive."""
    program = lowered(varying={"t"})
    written = text.dumps(program)
    assert "wave 0 loads backward varies\n" in written
    assert "wave 1 loads backward\n" in written
    assert "transfer s0>s1 from s0 to s1 forward senders 0,1 receivers 1\n" in written
    assert "transfer s0<s1 from s1 to s0 backward senders 1 receivers 0,1\n" in written
    assert text.loads(written) == program
    packed = replace(program, slices=(replace(program.slices[0], weigh_by="my patches"), program.slices[1]))
    assert "wave 0 loads backward varies by:my%20patches\n" in text.dumps(packed)
    assert text.loads(text.dumps(packed)) == packed


def test_units_of_tensors_are_written() -> None:
    """Packed tensors say whose rows they go by, by names that may hold spaces; whole ones have none."""
    program = lowered()
    packed = replace(program.tensors[1], shape=(15, 2), rows=3, unit="my patches")
    odd = replace(program, tensors=(program.tensors[0], packed))
    assert "tensor t/loss float32 scalar rows 0 dim 0 of - grad\n" in text.dumps(odd)
    assert "tensor t/y float32 15,2 rows 3 dim 0 of my%20patches grad\n" in text.dumps(odd)
    assert text.loads(text.dumps(odd)) == odd


def test_names_with_spaces_survive_regression() -> None:
    """torch allows any key in a ModuleDict; a space or a percent sign in a name must not become two words."""
    program = lowered()
    name = "a.my key%20.w"
    bucket = replace(program.buckets[1], parameters=(name,))
    run = replace(program.slices[1], trained=(name,))
    odd = replace(program, buckets=(program.buckets[0], bucket), slices=(program.slices[0], run))
    assert text.loads(text.dumps(odd)) == odd


def test_empty_lines_are_nothing() -> None:
    """A person may leave lines between the parts."""
    assert text.loads(TEXT.replace("\nrank", "\n\nrank")) == lowered()


HEAD = "spindle.program 2\nranks 1\n"

UNREADABLE = {
    "nothing": ("", "does not begin with 'spindle.program 2'"),
    "another version": (TEXT.replace("program 2", "program 1", 1), "it is not a program of this version"),
    "another format": ("{}", "it is not a program of this version"),
    "an unknown word": (HEAD + "wave 3\n", "line 3: 'wave 3' cannot be read (unknown word 'wave')"),
    "ranks without a number": ("spindle.program 2\nranks\n", "line 2: 'ranks' cannot be read"),
    "an unknown instruction": (HEAD + "rank 0\n  JUMP s0\n", "line 3: 'rank 0' cannot be read ('JUMP' is not"),
    "a rank out of order": (HEAD + "rank 1\n  STEP\n", "ranks stand in order; here comes rank 0"),
    "an unknown flag": (TEXT.replace("loads backward", "loads upward"), "flags are loads, backward, recompute, varies"),
    "a tensor without a unit": (TEXT.replace("dim 0 of samples grad", "dim 0"), "line 5: 'tensor t/y"),
    "ends that are none": (TEXT.replace("s1 forward", "s1 forward readers 1"), "ends are senders and receivers"),
    "an end without ranks": (TEXT.replace("s1 forward", "s1 forward senders"), "line 20: 'transfer s0>s1"),
    "ends that are no ranks": (TEXT.replace("s1 forward", "s1 forward senders all"), "line 20: 'transfer s0>s1"),
    "a slice without ranks": (TEXT.replace("  ranks 0 1\n", ""), "line 6: 'slice s0 t.a"),
    "bounds without an end": (TEXT.replace("0:3 3:5", "0 3"), "line 6: 'slice s0 t.a"),
    "a tensor of an unknown type": (TEXT.replace("t/y float32", "t/y float33"), "dtype 'float33' is not known"),
    "a direction that is none": (TEXT.replace("s1 forward", "s1 sideward"), "line 20: 'transfer s0>s1"),
    "a message with half its words": (TEXT.replace("0 -> 1 samples 0:3", "0 -> 1"), "line 20: 'transfer s0>s1"),
    "a weight that is no number": (TEXT.replace("weight 0.5", "weight much"), "line 3: 'loss t t/loss weight much'"),
}


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_text_that_cannot_be_read(case: tuple[str, str]) -> None:
    """The line is named, and the file."""
    given, message = case
    with pytest.raises(FormatError) as caught:
        text.loads(given, source="step.program")
    assert message in str(caught.value)
    assert str(caught.value).startswith("step.program")


def test_a_text_that_is_cut_off_is_never_taken_for_whole() -> None:
    """Wherever it ends, it cannot be read, or the laws miss what is gone."""
    for end in range(len(TEXT) - 1):
        with pytest.raises((FormatError, ProgramError)):
            check_program(text.loads(TEXT[:end]))


def test_an_instruction_without_target_reads_back() -> None:
    assert str(Instruction(Op.STEP)) == "STEP"
    assert text.loads(HEAD + "rank 0\n  STEP\n").instructions == ((Instruction(Op.STEP),),)
