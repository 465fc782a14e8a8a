"""Reductions: buckets start while the backward that completes them goes on, in one order, and never too early."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import spindle
from spindle.errors import RunError
from spindle.runtime.comms.transport import ThreadTransport
from spindle.runtime.controller import launched, prepare
from spindle.runtime.programs.program import Instruction, Op, Program
from spindle.runtime.steps.reductions import Reductions, completed_buckets
from spindle.runtime.steps.store import ParameterStore
from spindle.values.trace import Span
from tests.faults.breaking import Plain, marked, workload_of
from tests.random_plans import widest_plan
from tests.runtime.programs.hand_program import lowered
from tests.runtime.test_store import code, linear


def spans_of(bucket_bytes: int, *, accumulate: int = 1) -> list[Span]:
    """What rank 0 of two does in a step of six equal layers that both run, with a mean behind them."""
    workload = workload_of(marked, *(Plain() for _ in range(6)))
    workload.accumulate = accumulate
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    prepared = prepare(workload, replace(plan, bucket_bytes=bucket_bytes))
    with launched(prepared, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), launcher="threads") as run:
        return run.steps(1)[1][0].spans


def of_kind(spans: list[Span], op: str) -> list[Span]:
    return [span for span in spans if span.name.split()[0] == op]


def test_buckets_start_in_the_backward_that_completes_them() -> None:
    """A bucket a parameter: all start in the order of the instructions, each before the backward has ended."""
    spans = spans_of(1)
    reductions = of_kind(spans, "REDUCE")
    assert len(reductions) >= 6
    assert [span.start_s for span in reductions] == sorted(span.start_s for span in reductions)
    for index, span in enumerate(spans):
        if span in reductions:
            backward = next(before for before in reversed(spans[:index]) if before not in reductions)
            assert backward.name.startswith("BACKWARD")
            assert backward.start_s < span.start_s <= span.end_s < backward.end_s


def test_one_bucket_starts_once_its_last_gradient_is_there() -> None:
    (reduction,) = of_kind(spans_of(2**30), "REDUCE")
    assert reduction.end_s > reduction.start_s


def test_only_the_last_round_reduces() -> None:
    """Rounds that only add to the gradients start nothing, though their backward completes the same parameters."""
    spans = spans_of(1, accumulate=2)
    last = max(of_kind(spans, "LOAD"), key=lambda span: span.start_s)
    reductions = of_kind(spans, "REDUCE")
    assert len({span.name for span in reductions}) == len(reductions) >= 6
    assert all(span.start_s > last.end_s for span in reductions)


def test_what_stands_between_a_backward_and_a_reduction_keeps_its_place() -> None:
    """A reduction is moved into a backward only over what no other rank waits for."""
    words = "BACKWARD s2,REDUCE b0,FREE activations:s2,REDUCE b1,TRANSFER s1<s2,REDUCE b2,BACKWARD s1,REDUCE b3"
    instructions = [Instruction(Op(op), target) for op, target in (word.split() for word in words.split(","))]
    assert completed_buckets(instructions) == {"s2": ("b0", "b1"), "s1": ("b3",)}


def pair() -> tuple[Program, nn.Linear, Reductions]:
    """Two buckets that two ranks share, filled by run s0 on both; on rank 0."""
    program = lowered()
    first, *_ = program.buckets
    buckets = tuple(
        replace(first, name=f"b{i}", parameters=(f"a.{part}",)) for i, part in enumerate(("weight", "bias"))
    )
    run = replace(program.slice_by_name["s0"], trained=("a.weight", "a.bias"))
    back = [Instruction(Op.BACKWARD, "s0"), Instruction(Op.REDUCE, "b0"), Instruction(Op.REDUCE, "b1")]
    program = replace(program, buckets=buckets, slices=(run, *program.slices[1:]), instructions=(tuple(back), ()))
    layer, (transport, _) = linear(1.0), ThreadTransport.connect(2)
    reductions = Reductions(program, ParameterStore(program, 0, [code("t.a", layer, "a")]), transport)
    reductions.begin(early=True)
    return program, layer, reductions


def started(reductions: Reductions) -> Iterator[str]:
    yield from (name for name in ("b0", "b1") if name in reductions)


def test_a_bucket_waits_for_those_before_it() -> None:
    """The second is complete first, but starts behind the first. What no gradient reaches waits for its instruction."""
    program, layer, reductions = pair()
    with reductions.during(program.slices[0]):
        torch.autograd.backward(layer.bias.sum())
        assert list(started(reductions)) == []
        torch.autograd.backward(layer.weight.sum())
        assert list(started(reductions)) == ["b0", "b1"]
    program, layer, reductions = pair()
    with reductions.during(program.slices[0]):
        torch.autograd.backward(layer.bias.sum())
    assert list(started(reductions)) == []
    assert reductions.start("b0") < reductions.start("b1")


def test_a_gradient_that_comes_after_the_reduction_ends_the_run() -> None:
    """What the other ranks have summed by then would lack it."""
    program, layer, reductions = pair()
    with reductions.during(program.slices[0]):
        torch.autograd.backward(layer.weight.sum())
        with pytest.raises(RunError, match=r"a\.weight got a gradient again after the reduction of its bucket"):
            torch.autograd.backward(layer.weight.sum())
