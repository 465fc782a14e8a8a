"""Training features: each gives what plain training of the same workload gives, on random plans of 1 to 4 ranks."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spindle
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport, Tolerance
from tests.drawn import SEEDS, drawn
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import HandWritten, contrastive, encoder_decoder, floats


def towers(**options: object) -> spindle.Workload:
    """Two towers on two tasks; `options` go to the workload, to "fit" and to component "left" by their names."""
    torch.manual_seed(0)
    task_options = {name: options.pop(name) for name in ("every", "probability") if name in options}
    left_options = {"optimizer": options.pop("left")} if "left" in options else {}
    workload = spindle.Workload("towers", **options)  # type: ignore[arg-type]
    left = workload.component("left", HandWritten(5).double(), **left_options)  # type: ignore[arg-type]
    right = workload.component("right", HandWritten(4, depth=2).double())
    pairs = [
        {"a": floats(6, 5, seed=s, dtype=torch.float64), "b": floats(6, 4, seed=s + 10, dtype=torch.float64)}
        for s in (1, 2, 3)
    ]

    @workload.task("match", batch_size=6, data=pairs)
    def match(batch: dict[str, Tensor]) -> Tensor:
        return contrastive(left(batch["a"]), right(batch["b"]))

    rows = [
        {"b": floats(5, 4, seed=s, dtype=torch.float64), "y": floats(5, 8, seed=s + 30, dtype=torch.float64)}
        for s in (4, 5, 6)
    ]

    @workload.task("fit", batch_size=5, data=rows, **task_options)  # type: ignore[arg-type]
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(right(batch["b"]), batch["y"])

    return workload


def momentum(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)  # type: ignore[arg-type]


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def compared(
    workload: spindle.Workload,
    num_ranks: int,
    seed: int,
    *,
    steps: int = 3,
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> ParityReport:
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    reference = parity.run_reference(workload, steps, optimizer=momentum, scheduler=scheduler)
    prepared = prepare(workload, plan)
    with launched(prepared, optimizer=momentum, scheduler=scheduler, launcher="threads", timeout_s=30.0) as run:
        planned = parity.observed(run, steps)
    return parity.compare(reference, planned, tolerance=Tolerance(1e-10, 1e-10))


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_sharded_optimizer_states(num_ranks: int, seed: int) -> None:
    """One rank of each group keeps the states and updates; tasks that rest, clipping and settings go along."""
    report = compared(
        towers(shard_optimizer=True, max_grad_norm=0.5, every=2, left={"lr": 0.03}),
        num_ranks,
        seed,
        scheduler=halving,
    )
    assert report.ok, str(report)


def test_sharded_states_are_held_once() -> None:
    """On four ranks that all hold everything, each parameter's states are on one, and memory is balanced."""
    workload = towers(shard_optimizer=True)
    prepared = prepare(workload, widest_plan(spindle.make_metagraph(workload), 4))
    owners = {name: bucket.owner for bucket in prepared.program.buckets for name in bucket.parameters}
    assert owners.keys() == dict(workload.named_parameters()).keys()
    size = Counter[int | None]()
    for name, parameter in workload.named_parameters():
        size[owners[name]] += parameter.numel()
    assert set(size) == {0, 1, 2, 3}
    assert max(size.values()) < 2 * size.total() / 4


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_clipping_by_the_global_norm(num_ranks: int, seed: int) -> None:
    """Gradients are scaled by their norm over all parameters, each counted once."""
    report = compared(towers(max_grad_norm=0.05), num_ranks, seed)
    assert report.ok, str(report)


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_recompute(num_ranks: int, seed: int) -> None:
    """Components that are computed again in backward give the same gradients."""
    report = compared(towers(recompute=("left", "right")), num_ranks, seed)
    assert report.ok, str(report)


def test_recompute_counts_running_statistics_once() -> None:
    """Batch-norm statistics are those of one forward pass, though it ran twice."""
    workload = encoder_decoder(torch.float64)
    workload.recompute = frozenset(("stem", "encoder", "decoder"))
    once = encoder_decoder(torch.float64)
    plan = random_plan(spindle.make_metagraph(workload), 2, 3)
    for trained, its_plan in ((workload, plan), (once, random_plan(spindle.make_metagraph(once), 1, 0))):
        spindle.train(trained, its_plan, optimizer=momentum, steps=3, launcher="threads")
    ours, theirs = dict(workload.named_buffers()), dict(once.named_buffers())
    assert int(ours["stem.1.num_batches_tracked"]) == 3
    torch.testing.assert_close(ours, theirs)


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_a_task_in_every_second_step(num_ranks: int, seed: int) -> None:
    """A task that rests leaves its own parameters, and their momentum, alone."""
    workload = towers(every=2)
    assert [workload.tasks_of(step, 0) for step in range(3)] == [("match", "fit"), ("match",), ("match", "fit")]
    report = compared(workload, num_ranks, seed, steps=4)
    assert report.ok, str(report)
    assert [set(losses) for losses in report.losses] == [{"match", "fit"}, {"match"}] * 2


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_a_task_with_a_probability(num_ranks: int, seed: int) -> None:
    """All ranks draw the same steps."""
    workload = towers(probability=0.5)
    report = compared(workload, num_ranks, seed, steps=6)
    assert report.ok, str(report)
    assert {frozenset(losses) for losses in report.losses} == {frozenset({"match", "fit"}), frozenset({"match"})}


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_component_settings_and_a_schedule(num_ranks: int, seed: int) -> None:
    """A component's own learning rate and decay hold, and a schedule goes on from them."""
    workload = towers(left={"lr": 0.01, "weight_decay": 0.5})
    report = compared(workload, num_ranks, seed, scheduler=halving)
    assert report.ok, str(report)


@drawn(2, num_ranks=range(1, 5), seed=SEEDS, in_flight=[1, 2, 4])
def test_accumulation_over_micro_batches(num_ranks: int, seed: int, in_flight: int) -> None:
    """Four batches a step give the mean of their gradients, whether in rounds or side by side."""
    workload = towers(accumulate=4, in_flight=in_flight, max_grad_norm=0.5)
    report = compared(workload, num_ranks, seed, steps=2)
    assert report.ok, str(report)
    assert {op.task for op in spindle.make_metagraph(workload)} == (
        {"match", "fit"} if in_flight == 1 else {f"{t}#{n}" for t in ("match", "fit") for n in range(in_flight)}
    )


def test_settings_change_the_result() -> None:
    """Negative control: the same run without the component's settings ends elsewhere."""
    with_settings, without = towers(left={"lr": 0.01}), towers()
    for workload in (with_settings, without):
        plan = random_plan(spindle.make_metagraph(workload), 1, 0)
        spindle.train(workload, plan, optimizer=momentum, steps=1, launcher="threads")
    ours, theirs = dict(with_settings.named_parameters()), dict(without.named_parameters())
    assert not torch.allclose(ours["left.stem.weight"], theirs["left.stem.weight"])
    assert torch.equal(ours["right.stem.weight"], theirs["right.stem.weight"])


@pytest.mark.parametrize(("every", "probability"), [(0, 1.0), (2, 0.5), (1, 0.0), (1, 1.5)])
def test_impossible_schedules_are_refused(every: int, probability: float) -> None:
    """A step count below one, a probability outside 0..1, or both at once."""
    with pytest.raises(spindle.SpindleError, match="every is"):
        towers(every=every, probability=probability)


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_bf16_autocast(num_ranks: int, seed: int) -> None:
    """Under autocast a run agrees with one process under autocast to the precision of bfloat16."""
    torch.manual_seed(0)
    workload = spindle.Workload("bf16", precision="bf16")
    left, right = workload.component("left", HandWritten(5)), workload.component("right", HandWritten(4))
    data = [
        {"a": floats(6, 5, seed=s, dtype=torch.float32), "b": floats(6, 4, seed=s, dtype=torch.float32)} for s in (1, 2)
    ]

    @workload.task("match", batch_size=6, data=data)
    def match(batch: dict[str, Tensor]) -> Tensor:
        return contrastive(left(batch["a"]), right(batch["b"]))

    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    report = spindle.verify(workload, plan, launcher="threads")
    assert report.ok, str(report)
    workload.precision = "fp32"
    exact = parity.run_reference(workload, 1, optimizer=momentum)
    assert abs(exact.losses[0]["match"] - report.losses[0]["match"]) > 1e-5, "the computation was not in bfloat16"
    workload.precision = "bf16"
    assert {t.dtype for t in prepare(workload, plan).program.tensors} == {"bfloat16", "float32"}
