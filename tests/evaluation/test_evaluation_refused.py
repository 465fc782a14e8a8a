"""Evaluations that cannot be right are refused in a sentence; what tasks return passes without rounding."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import spindle
from spindle.errors import RunError, WorkloadError
from spindle.evaluation import packed, unpacked
from spindle.runtime.controller import launched, prepare
from spindle.runtime.evaluation.prepare import prepare_beside
from tests.evaluation.test_evaluation import Batch, Stateful, batches, evaluation_of, mean, sgd, towers, trained
from tests.random_plans import widest_plan


def wrong(metric: Callable[[Batch], Any]) -> Callable[[spindle.Workload], spindle.Evaluation]:
    def found(made: spindle.Workload) -> spindle.Evaluation:
        own = spindle.Evaluation(made)
        one = made.components["one"].module
        own.task("t", batch_size=4, data=batches(4), metrics={"m": metric})(lambda b: {"y": one(b["x"])})
        return own

    return found


def returning(value: Callable[[Tensor], Any]) -> Callable[[spindle.Workload], spindle.Evaluation]:
    def found(made: spindle.Workload) -> spindle.Evaluation:
        own = spindle.Evaluation(made)
        one = made.components["one"].module
        own.task("t", batch_size=4, data=batches(4))(lambda b: value(one(b["x"])))
        return own

    return found


def uneven(make: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[spindle.Workload], spindle.Evaluation]:
    """Outputs that differ by more than their number of samples."""

    def found(made: spindle.Workload) -> spindle.Evaluation:
        own = spindle.Evaluation(made)
        one = made.components["one"].module
        data = [{**b, "z": torch.zeros(4, n)} for b, n in zip(batches(4, 4), (2, 3), strict=True)]
        over_all = {"all": lambda outputs: outputs["y"].sum()}
        own.task("t", batch_size=4, data=data, over_all=over_all)(lambda b: make(one(b["x"])[:, : b["z"].shape[1]]))
        return own

    return found


def large(made: spindle.Workload) -> spindle.Evaluation:
    return evaluation_of(made, gathered_bytes=100)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (wrong(lambda o: "high"), WorkloadError, "metric 'm' gave a str; give a number, or a pair"),
        (wrong(lambda o: (1.0, 0)), WorkloadError, "metric 'm' counts nothing in the whole pass"),
        (wrong(lambda o: o["z"]), RunError, "metric 'm' raised KeyError"),
        (returning(lambda y: y), WorkloadError, r"a loss of shape \(4, 8\); return one number"),
        (returning(lambda y: {"y": y, "n": 3}), WorkloadError, "returned a int as 'n'"),
        (
            returning(lambda y: torch.tensor(3.0)),
            WorkloadError,
            "'t' returned nothing that a component of",
        ),
        (returning(lambda y: {}), WorkloadError, "'t' returned nothing that a component of"),
        (
            uneven(lambda y: {"y": y}),
            WorkloadError,
            r"'y' is of shape \(N, 2\) for the first .* shape \(N, 3\)",
        ),
        (large, WorkloadError, "its outputs take more than 0 MiB, which 'largest' would see all at once"),
        (lambda made: made, WorkloadError, "evaluation is a Workload; make one with"),
        (spindle.Evaluation, WorkloadError, "has no tasks; add one with @evaluation.task"),
        (lambda made: evaluation_of(towers()), WorkloadError, "whose components are not those of the trained workload"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    make: Callable[[spindle.Workload], spindle.Evaluation], error: type[Exception], words: str
) -> None:
    made = towers()
    with pytest.raises(error, match=words):
        trained(made, widest_plan(spindle.make_metagraph(made), 2), evaluation=make(made), evaluate_every=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluate_every": 2}, "evaluation= is missing"),
        ({"evaluation": True}, "evaluate_every= is missing"),
        ({"evaluation": True, "evaluate_every": 0}, "evaluate_every is 0; give"),
        ({"keep_best": "plain:loss"}, "nothing is evaluated"),
        ({"evaluation": True, "evaluate_every": 1, "early_stop": "plain:loss"}, r"give spindle\.EarlyStop\(metric="),
        ({"evaluation": True, "evaluate_every": 1, "keep_best": "plain:loss"}, "no checkpoints are written"),
        (
            {"evaluation": True, "evaluate_every": 1, "keep_best": "plain:los"},
            "choose one of plain:loss, measured:loss",
        ),
        (
            {"evaluation": True, "evaluate_every": 1, "keep_best": "measured:accuracy"},
            "measured:accuracy:min or measured:accuracy:max",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    made = towers()
    if options.get("evaluation"):
        options = options | {"evaluation": evaluation_of(made)}
    with pytest.raises(WorkloadError, match=words):
        trained(made, widest_plan(spindle.make_metagraph(made), 1), **options)


def test_a_buffer_that_two_tasks_change_is_refused() -> None:
    """One process would run them one after the other, and the count of the first would be in the second's scores."""
    made = towers(Stateful)
    with pytest.raises(WorkloadError, match=r"'plain' and 'measured' both change or read buffer .*calls.* two evalu"):
        trained(made, widest_plan(spindle.make_metagraph(made), 1), evaluation=evaluation_of(made), evaluate_every=1)


def test_writes_to_parameters_are_refused() -> None:
    made = towers()
    found = spindle.Evaluation(made)
    head = made.components["head"].module

    @found.task("t", batch_size=4, data=batches(4))
    def task(b: Batch) -> Tensor:
        with torch.no_grad():
            next(head.parameters()).clamp_(-1, 1)
        return mean(head(b["x"]))

    with pytest.raises(WorkloadError, match=r"writes to parameter 'head\.weight'; an evaluation leaves"):
        trained(made, widest_plan(spindle.make_metagraph(made), 1), evaluation=found, evaluate_every=1)


def test_loaders_that_disagree_are_refused() -> None:
    """Ranks that see another number of batches say so, rather than average over what all have."""
    made = towers()
    found = spindle.Evaluation(made)
    one = made.components["one"].module
    passes = iter(range(1000))

    def data() -> Iterator[Batch]:
        return iter(batches(*[4] * (2 + next(passes) % 2)))

    found.task("t", batch_size=4, data=data)(lambda b: one(b["x"]).square().mean())
    prepared = prepare(made, widest_plan(spindle.make_metagraph(made), 2))
    evaluated = prepare_beside(found, prepared)
    made_of = launched(prepared, optimizer=sgd, launcher="threads", timeout_s=30.0, evaluated=evaluated)
    with made_of as run, pytest.raises(WorkloadError, match="its data ended on 1 of 2 devices that read it"):
        run.evaluate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_outputs_pass_without_rounding(dtype: torch.dtype) -> None:
    """Of all types and shapes, an empty one too."""
    bits = torch.randint(-(2**62), 2**62, (3, 5), generator=torch.Generator().manual_seed(1))
    outputs = {"é": bits.to(dtype), "none": bits[:0].to(dtype), "one": bits[0, 0].to(dtype)}
    found = unpacked(packed("t", outputs))
    assert found.keys() == outputs.keys()
    for name, value in outputs.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name


def test_data_that_cannot_be_sent_are_named() -> None:
    """As those of training tasks are."""
    made = towers()
    found = spindle.Evaluation(made)
    one = made.components["one"].module

    class Locked:
        """Holds what no process can be sent."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __iter__(self) -> Iterator[Batch]:
            return iter(batches(4))

    found.task("t", batch_size=4, data=Locked())(lambda b: mean(one(b["x"])))
    with pytest.raises(WorkloadError, match=r"task 't': its data \(Locked\) cannot be sent"):
        trained(
            made,
            widest_plan(spindle.make_metagraph(made), 2),
            launcher="processes",
            evaluation=found,
            evaluate_every=1,
        )
