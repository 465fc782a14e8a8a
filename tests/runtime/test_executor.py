"""Executor: what a program promises is checked while it is kept, whatever the laws said before."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import spindle
from spindle.errors import RunError
from spindle.runtime.controller import Prepared, launched, prepare
from spindle.runtime.programs.program import Instruction, Op
from spindle.values.trace import Span
from tests.faults.breaking import marked, workload_of
from tests.random_plans import widest_plan

Edit = Callable[[list[Instruction]], list[Instruction]]


@functools.cache
def prepared(num_ranks: int = 1) -> Prepared:
    workload = workload_of(marked)
    return prepare(workload, widest_plan(spindle.make_metagraph(workload), num_ranks))


def run(edit: Edit, *, num_ranks: int = 1) -> tuple[list[Span], dict[str, Tensor]]:
    """One step of the program with rank 0's instructions edited: the spans of rank 0, and the weights afterwards."""
    found = prepared(num_ranks)
    first, *rest = found.program.instructions
    program = replace(found.program, instructions=(tuple(edit(list(first))), *rest))
    with launched(
        replace(found, program=program),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        launcher="threads",
        timeout_s=5.0,
    ) as started:
        _, reports = started.steps(1)
        return reports[0].spans, started.state()


def without(text: str) -> Edit:
    return lambda instructions: [i for i in instructions if str(i) != text]


def twice(text: str) -> Edit:
    return lambda instructions: [i for one in instructions for i in ([one, one] if str(one) == text else [one])]


def first_after(text: str, place: str) -> Edit:
    """The instruction moved right behind another."""

    def edit(instructions: list[Instruction]) -> list[Instruction]:
        (moved,) = [i for i in instructions if str(i) == text]
        rest = [i for i in instructions if str(i) != text]
        at = [str(i) for i in rest].index(place) + 1
        return [*rest[:at], moved, *rest[at:]]

    return edit


BROKEN_PROMISES: dict[str, tuple[Edit, str]] = {
    "a run done twice": (
        twice("FORWARD s0"),
        "rank 0, wave 0, FORWARD s0 (t.net.0) raised AssertionError: buffer 'activations:s0' is made twice",
    ),
    "a buffer freed twice": (
        twice("FREE activations:s0"),
        "rank 0, FREE activations:s0 raised AssertionError: buffer 'activations:s0' is freed but not there",
    ),
    "a buffer freed before its reader": (
        first_after("FREE activations:s0", "FORWARD s0"),
        "AssertionError: activations of s0 are read but not there",
    ),
    "a buffer left over": (without("FREE activations:s0"), "rank 0 ends a round with buffers ['activations:s0']"),
    "a gradient that was never made": (without("BACKWARD s1"), "BACKWARD s0"),
    "a batch that is not loaded": (without("LOAD t"), "FORWARD s0"),
}


@pytest.mark.parametrize("case", BROKEN_PROMISES.values(), ids=BROKEN_PROMISES)
def test_a_promise_that_is_not_kept(case: tuple[Edit, str]) -> None:
    """The instruction is named, and what is wrong; nothing is computed with what is not there."""
    edit, words = case
    with pytest.raises(RunError) as caught:
        run(edit)
    assert words in str(caught.value)


def test_every_instruction_is_timed_but_frees() -> None:
    """In order, one after another, none of negative length; kinds follow the instruction."""
    spans, _ = run(list)
    assert [s.name for s in spans] == [str(i) for i in prepared().program.instructions[0] if i.op is not Op.FREE]
    assert all(a.end_s <= b.start_s for a, b in pairwise(spans))
    assert {s.name.split()[0]: str(s.kind) for s in spans} == {
        "LOAD": "load",
        "FORWARD": "forward",
        "BACKWARD": "backward",
        "STEP": "step",
    }


def test_spans_say_how_much_was_moved() -> None:
    """A reduction moves its bucket, a transfer this rank's messages; waiting for a reduction is part of it."""
    spans = {s.name: s for s in run(list, num_ranks=2)[0]}
    program = prepared(2).program
    bucket = next(b for b in program.buckets if b.ranks == (0, 1))
    parameters = prepared(2).captured.parameters
    held = sum(parameters[name].numel() * 4 for name in bucket.parameters)
    assert spans[f"REDUCE {bucket.name}"].num_bytes == held
    assert str(spans[f"AWAIT {bucket.name}"].kind) == "reduce"
    (transfer,) = [t for t in program.transfers if not t.backward]
    assert spans[f"TRANSFER {transfer.name}"].num_bytes == 2 * 4  # a float32 for each of two samples


def test_nothing_is_done_that_is_no_instruction() -> None:
    """Without STEP the weights stay as they were; with it they move."""
    before = {name: p.detach().clone() for name, p in prepared().workload.named_parameters()}
    _, stayed = run(without("STEP"))
    _, moved = run(list)
    assert all(torch.equal(before[name], stayed[name]) for name in before)
    assert not any(torch.equal(before[name], moved[name]) for name in before)
