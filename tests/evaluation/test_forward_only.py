"""Tasks that run forward only: of weight 0, with a frozen reference, or as a teacher; as one process gives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from spindle.runtime.controller import prepare
from tests.drawn import SEEDS, drawn
from tests.plain_loops import WIDTH, Block, rows, tower
from tests.random_plans import random_plan

Loss = Callable[[dict[str, Tensor]], Tensor]


class Counting(Block):
    """A layer whose norm keeps running statistics, and that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(super().forward(self.statistics(x)))
        return y


def taught(kind: type[nn.Module] = Block, weight: float = 0.0, **options: object) -> spindle.Workload:
    """Two towers, of which one task trains the first; the other reads both, and so does a frozen reference."""
    torch.manual_seed(0)
    made = spindle.Workload("taught", **options)  # type: ignore[arg-type]
    trunk = made.component("trunk", tower(kind).double())
    other = made.component("other", tower(kind).double())
    frozen = made.component("frozen", tower().double().requires_grad_(requires_grad=False))
    head = made.component("head", nn.Linear(WIDTH, 3).double())

    @made.task("student", batch_size=4, data=rows(1))
    def student(b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(head(trunk(b["x"])), b["y"]) + F.mse_loss(trunk(b["x"]), frozen(b["x"]))

    @made.task("watched", batch_size=4, data=rows(5), weight=weight)
    def watched(b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(head(other(trunk(b["x"]))), b["y"])

    @made.task("reference", batch_size=4, data=rows(9), weight=0.0)
    def reference(b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(frozen(b["x"]), b["x"])

    return made


@pytest.mark.parametrize("kind", [Block, Counting])
@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_a_task_of_weight_0_gives_nothing_a_gradient(kind: type[nn.Module], num_ranks: int, seed: int) -> None:
    """All else that a step changes, running statistics too, is as in one process, and its loss is told."""
    made = taught(kind)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    report = spindle.verify(
        made, plan, steps=3, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1), launcher="threads", timeout_s=30.0
    )
    assert report.ok, str(report)
    assert {"student", "watched", "reference"} == set(report.losses[0])


def test_a_parameter_that_only_such_tasks_use_rests() -> None:
    """Weight decay and momentum leave it alone, as where no backward leads to it."""
    made = taught()
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    spindle.train(
        made,
        random_plan(spindle.make_metagraph(made), 2, 3),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        steps=3,
        launcher="threads",
        timeout_s=30.0,
    )
    same = {name for name, value in made.named_parameters() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("other.", "frozen."))}


def test_no_backward_is_planned_or_costed() -> None:
    """Its slices have no backward, cost none, keep nothing for one, and no rank reduces a gradient for it."""
    made = taught()
    graph = capture(made).graph
    own = [operator for operator in graph if operator.task in ("watched", "reference")]
    assert own
    assert not any(op.backward_flops or op.activation_bytes for op in own)
    assert not any(parameter.trainable for op in own for parameter in op.parameters)
    prepared = prepare(made, spindle.make_plan(made, "1x2:cpu"))
    assert not any(run.backward for run in prepared.program.slices if run.task != "student")
    reduced = {name for bucket in prepared.program.buckets for name in bucket.parameters}
    assert not any(name.startswith("other.") for name in reduced)
    trained = spindle.make_plan(taught(weight=1.0), "1x2:cpu")
    assert prepared.plan.makespan_s < trained.makespan_s


def test_a_workload_of_such_tasks_alone_runs() -> None:
    """Nothing is trained; the losses are those of the modules as they are."""
    made = taught().only(["reference"])
    result = spindle.train(
        made,
        random_plan(spindle.make_metagraph(made), 2, 1),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        steps=2,
        launcher="threads",
        timeout_s=30.0,
    )
    with torch.no_grad():
        expected = [float(made.tasks["reference"].function(dict(b))) for b in rows(9)[:2]]
    assert [losses["reference"] for losses in result.losses] == pytest.approx(expected, abs=1e-12)


def test_a_loss_without_a_gradient_needs_weight_0() -> None:
    """Else it is an oversight: one process would end there too."""
    made = spindle.Workload("oversight")
    frozen = made.component("frozen", tower().double().requires_grad_(requires_grad=False))

    @made.task("t", batch_size=4, data=rows())
    def task(b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(frozen(b["x"]), b["x"])

    with pytest.raises(WorkloadError, match=r"needs no gradient; .* weight=0"):
        capture(made)
    with pytest.raises(WorkloadError, match="zero or a positive number"):
        made.task("u", batch_size=4, data=rows(), weight=-1.0)
