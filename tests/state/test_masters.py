"""Float32 masters of bfloat16 parameters: a planned run steps what a plain loop steps that keeps them by hand."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import CheckpointError, WorkloadError
from spindle.runtime.checkpoints.checkpoint import path_of, tensors
from spindle.runtime.comms.host import threads_of_rank
from spindle.runtime.comms.transport import ThreadTransport
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport
from spindle.values.plan import Plan
from tests.parity.test_tensor_parallel import OWN_PLAN, Encoder, laid_out
from tests.parity.test_tensor_parallel import workload as spread
from tests.random_plans import random_plan, widest_plan
from tests.threads import computing_with
from tests.tiny_workloads import HandWritten, floats

BF16 = torch.bfloat16
Batch = dict[str, Tensor]
adamw = functools.partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1)


class Shift(nn.Module):
    """A layer whose gradient does not depend on any weight, and is exact in bfloat16 in whatever order it is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8, dtype=BF16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def shifts(**options: Any) -> spindle.Workload:
    """Three layers that two tasks share, and one that only the second task has, in every other step."""
    made = spindle.Workload("shifts", **options)
    trunk = made.component("trunk", nn.Sequential(*(Shift() for _ in range(3))))
    head = made.component("head", Shift())

    def rows(seed: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(seed)
        return [{name: torch.randint(-4, 5, (12, 8), generator=draw).to(BF16) for name in ("x", "y")} for _ in range(3)]

    @made.task("near", batch_size=12, data=rows(1))
    def near(batch: Batch) -> Tensor:
        loss: Tensor = (trunk(batch["x"]) * batch["y"]).sum()
        return loss

    @made.task("far", batch_size=12, data=rows(2), weight=0.5, every=2)
    def far(batch: Batch) -> Tensor:
        loss: Tensor = (head(trunk(batch["x"])) * batch["y"]).sum()
        return loss

    return made


def by_hand(made: spindle.Workload, steps: int) -> dict[str, Tensor]:
    """What anyone would write: the weights, and the masters as `NAME:master`, after some steps. Modules change."""
    with computing_with(threads_of_rank(1)):
        return _by_hand(made, steps)


def _by_hand(made: spindle.Workload, steps: int) -> dict[str, Tensor]:
    parameters = {name: p for name, p in made.named_parameters() if p.requires_grad}
    masters = {name: nn.Parameter(p.detach().float()) if p.dtype == BF16 else p for name, p in parameters.items()}
    optimizer = adamw(list(masters.values()))
    read = dict.fromkeys(made.tasks, 0)
    for step in range(steps):
        for master in masters.values():
            master.grad = None
        for task in (task for task in made.tasks.values() if step % task.every == 0):
            batches = list(task.batches())
            for _ in range(made.accumulate):
                loss = task.function(dict(batches[read[task.name] % len(batches)])) * (task.weight / made.accumulate)
                loss.backward()  # type: ignore[no-untyped-call]
                read[task.name] += 1
                for name, master in masters.items():
                    given = parameters[name].grad
                    if given is not None and master is not parameters[name]:
                        master.grad = given.float() if master.grad is None else master.grad + given.float()
                        parameters[name].grad = None
        if made.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(masters.values(), made.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                parameters[name].copy_(master)
    held = {name: p.detach().clone() for name, p in made.named_parameters()}
    return held | {f"{name}:master": m.detach().clone() for name, m in masters.items() if m is not parameters[name]}


def planned(made: spindle.Workload, plan: Plan, steps: int) -> dict[str, Tensor]:
    """The same as planned."""
    with launched(prepare(made, plan), optimizer=adamw, launcher="threads", timeout_s=30.0) as run:
        run.steps(steps)
        found = {name: value for name, value in run.state().items() if "norm.running" not in name}
        states = run.optimizer_state()
    masters = {n.split(":")[1]: value for n, value in states.items() if n.endswith(":master_weight")}
    return found | {f"{name}:master": value for name, value in masters.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def assert_all_but_losses(report: ParityReport) -> None:
    """Losses are sums in bfloat16, in an order of the plan's."""
    assert all(row.ok for row in report.rows if row.quantity != "loss"), str(report)


def towers(**options: Any) -> spindle.Workload:
    """A bfloat16 encoder under two tasks, one of which has a float32 head."""
    torch.manual_seed(0)
    made = spindle.Workload("towers", **options)
    encoder = made.component("encoder", HandWritten(5, 8).to(BF16))
    head = made.component("head", nn.Linear(8, 3))
    rows = [{"x": floats(6, 5, seed=n, dtype=BF16), "y": torch.arange(6) % 3} for n in range(3)]

    @made.task("fit", batch_size=6, data=rows)
    def fit(batch: Batch) -> Tensor:
        loss: Tensor = encoder(batch["x"]).float().square().mean()
        return loss

    @made.task("tell", batch_size=6, data=rows, weight=0.3)
    def tell(batch: Batch) -> Tensor:
        return F.cross_entropy(head(encoder(batch["x"]).float()), batch["y"])

    return made


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"recompute": ["encoder"]}], ids=str)
def test_on_one_rank_a_run_is_the_loop_by_hand(options: dict[str, Any]) -> None:
    """Bit for bit, masters and weights, after 20 steps of AdamW."""
    made = towers(**options)
    ours = planned(made, widest_plan(spindle.make_metagraph(made), 1), 20)
    assert_equal(ours, by_hand(made, 20))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded states": {"shard_optimizer": True},
    "accumulation": {"accumulate": 4, "in_flight": 2},
    "sharded states, clipped": {"shard_optimizer": True, "max_grad_norm": 1e6},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", OPTIONS)
def test_masters_are_those_of_one_process(name: str, seed: int) -> None:
    """Where sums are exact no plan changes a bit of a master; weights are masters rounded."""
    made = shifts(**OPTIONS[name])
    ours = planned(made, random_plan(spindle.make_metagraph(made), 2 + seed % 3, seed), 5)
    assert_equal(ours, by_hand(made, 5))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("on_all", [("trunk",), ("trunk", "head")], ids=str)
def test_of_sharded_parameters_each_rank_has_the_masters_of_its_range(on_all: tuple[str, ...], ranks: int) -> None:
    made = shifts(accumulate=2)
    ours = planned(made, random_plan(spindle.make_metagraph(made), ranks, ranks, on_all=on_all), 5)
    assert_equal(ours, by_hand(made, 5))


def test_under_tensor_parallelism_too() -> None:
    """Pieces have masters of their own; verify compares them with those of one process."""
    torch.manual_seed(0)
    made = spindle.Workload("cut", max_grad_norm=0.5)
    encoder = made.component("encoder", Encoder().to(BF16), tensor_parallel=4, tensor_plan=OWN_PLAN)

    @made.task("fit", batch_size=4, data=[{"x": floats(4, 3, 5, seed=n, dtype=BF16)} for n in range(2)])
    def fit(batch: Batch) -> Tensor:
        loss: Tensor = encoder(batch["x"]).float().square().mean()
        return loss

    plan = laid_out(made, 4, lambda _: (2, 2))
    report = spindle.verify(made, plan, steps=3, optimizer=adamw, launcher="threads", atol=1e-3, rtol=0.02)
    assert report.ok, str(report)
    assert any(row.name.endswith("layers.0.up.weight:master_weight") for row in report.rows)


def norms(made: spindle.Workload, plan: Plan) -> list[float | None]:
    """The norm of each step, which every rank must have."""
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    with launched(prepare(made, plan), optimizer=sgd, launcher="threads", timeout_s=30.0) as run:
        _, reports = run.steps(2)
    assert len({tuple(report.grad_norms) for report in reports}) == 1
    return reports[0].grad_norms


@pytest.mark.parametrize("kind", ["tensor parallel", "tensor parallel, sharded states", "sharded", "sharded states"])
def test_the_norm_of_gradients_is_that_of_one_process(kind: str) -> None:
    """Whatever is cut or sharded is counted once: to rounding in float64."""
    made = spread(max_grad_norm=0.3, shard_optimizer="states" in kind)
    if "tensor" in kind:
        plan = laid_out(made, 4, lambda name: (2, 2) if "encoder" in name else (1, 4))
    elif kind == "sharded":
        made = spread(degree=1, max_grad_norm=0.3, fit_options={})
        plan = random_plan(spindle.make_metagraph(made), 2, 3, on_all=("encoder",))
    else:
        plan = random_plan(spindle.make_metagraph(made), 3, 5)
    one = norms(made, widest_plan(spindle.make_metagraph(made), 1))
    assert norms(made, plan) == pytest.approx(one, rel=1e-10)
    assert all(norm is not None and norm > 0.3 for norm in one)


def test_a_checkpoint_holds_masters_and_any_plan_goes_on_with_them(tmp_path: Path) -> None:
    """Two ranks, then three with sharded parameters, then one: as a loop that never stopped, bit for bit."""
    made = shifts()
    options: dict[str, Any] = {
        "optimizer": adamw,
        "launcher": "threads",
        "checkpoints": tmp_path,
        "checkpoint_every": 2,
    }
    metagraph = spindle.make_metagraph(made)
    spindle.train(made, random_plan(metagraph, 2, 1), steps=2, **options)
    saved = tensors(path_of(tmp_path, 2), lambda name: name.endswith("master_weight"))
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert len(saved) == 4
    spindle.train(made, random_plan(metagraph, 3, 2, on_all=("trunk",)), steps=4, resume=True, **options)
    spindle.train(made, widest_plan(metagraph, 1), steps=6, resume=True, **options)
    last = tensors(path_of(tmp_path, 6), lambda name: name.endswith("master_weight"))
    expected = by_hand(shifts(), 6)
    assert_equal(
        {name: p.detach() for name, p in made.named_parameters()}
        | {f"{name.split(':')[1]}:master": value for name, value in last.items()},
        expected,
    )


def test_a_run_without_masters_may_go_on_with_them_not_the_other_way(tmp_path: Path) -> None:
    """What a bfloat16 state has is in a float32 one; the digits of a master would be lost."""
    options: dict[str, Any] = {"optimizer": adamw, "launcher": "threads", "checkpoints": tmp_path}
    bare = shifts(master_weights="none")
    plan = widest_plan(spindle.make_metagraph(bare), 2)
    spindle.train(bare, plan, steps=2, **options)
    assert not tensors(path_of(tmp_path, 2), lambda name: name.endswith("master_weight"))
    spindle.train(shifts(), plan, steps=4, resume=True, **options)
    states = tensors(path_of(tmp_path, 4), lambda name: name.startswith("optimizer:"))
    assert {value.dtype for value in states.values()} == {torch.float32}
    with pytest.raises(CheckpointError, match=r"holds a float32 master of '.*master_weights='none', which"):
        spindle.train(bare, plan, steps=6, resume=True, **options)


def test_weights_that_were_changed_since_are_what_a_run_goes_on_from(tmp_path: Path) -> None:
    """A thawed part of a resumed run has the masters of its checkpoint; a value put there by hand is its own master."""
    made = shifts()
    options: dict[str, Any] = {"optimizer": adamw, "launcher": "threads", "checkpoints": tmp_path}
    plan = widest_plan(spindle.make_metagraph(made), 2)
    spindle.train(made, plan, steps=1, **options)
    frozen = shifts()
    frozen.components["head"].module.requires_grad_(False)
    spindle.train(frozen, plan, steps=2, resume=True, **options)
    kept = [tensors(path_of(tmp_path, step), lambda n: n == "optimizer:head.weight:master_weight") for step in (1, 2)]
    assert_equal(*kept)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_task_writes_its_master_follows(seed: int) -> None:
    """A clamp in a task holds: the next step goes on from it, in elements that it changed, and in no others."""

    def clamped(made: spindle.Workload) -> spindle.Workload:
        trunk, task = made.components["trunk"].module, made.tasks["far"]
        first = trunk.get_parameter("0.weight")

        def near(batch: Batch) -> Tensor:
            with torch.no_grad():
                first.clamp_(-0.5, 0.5)
            loss: Tensor = (trunk(batch["x"]) * batch["y"]).sum()
            return loss

        made.tasks.pop("near")
        made.task("near", batch_size=12, data=task.data)(near)
        made.tasks.pop("far")
        return made

    made = clamped(shifts())
    plan = random_plan(spindle.make_metagraph(made), 3, seed)
    report = spindle.verify(made, plan, steps=4, optimizer=adamw, launcher="threads", rtol=0, atol=0)
    assert_all_but_losses(report)
    ours = planned(made, plan, 4)
    first = ours["trunk.0.weight:master"]
    assert float(first.abs().max()) < 0.51
    assert torch.equal(first.to(BF16), ours["trunk.0.weight"])
    assert not torch.equal(first, ours["trunk.0.weight"].float()), "masters were rounded"


def test_who_wants_no_masters_has_none() -> None:
    """As the optimizer of one process that steps bfloat16 parameters."""
    made = shifts(master_weights="none")
    plan = random_plan(spindle.make_metagraph(made), 3, 0)
    report = spindle.verify(made, plan, steps=3, optimizer=adamw, launcher="threads", rtol=0, atol=0)
    assert_all_but_losses(report)
    assert not any("master_weight" in row.name for row in report.rows)
    with pytest.raises(WorkloadError, match=r"master_weights is 'bf16'; choose one of 'fp32', 'none'"):
        shifts(master_weights="bf16")
    with pytest.raises(WorkloadError, match=r"reduce_dtype is 'fp16'; choose one of 'fp32', 'bf16', None"):
        shifts(reduce_dtype="fp16")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"reduce_dtype": "bf16"}, BF16),
        ({"master_weights": "none"}, BF16),
        ({"master_weights": "none", "reduce_dtype": "fp32"}, torch.float32),
    ],
    ids=str,
)
def test_gradients_are_reduced_in_the_type_that_was_chosen(
    options: dict[str, Any], dtype: torch.dtype, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, and with exact sums the result is that of one process."""
    made = shifts(**options)
    seen: list[torch.dtype] = []

    def noted(name: str) -> Any:
        plain = getattr(ThreadTransport, name)

        def collective(self: ThreadTransport, values: Tensor, *rest: Any) -> Any:
            if values.numel() >= 8 and values.dtype != torch.float64:
                seen.append(values.dtype)
            return plain(self, values, *rest)

        return collective

    monkeypatch.setattr(ThreadTransport, "all_reduce", noted("all_reduce"))
    monkeypatch.setattr(ThreadTransport, "reduce_scatter", noted("reduce_scatter"))
    on_all = ("trunk", "head") if sharded else ()
    plan = random_plan(spindle.make_metagraph(made), 2, 1, on_all=on_all)
    plan = plan if sharded else widest_plan(spindle.make_metagraph(made), 2)
    report = spindle.verify(made, plan, steps=3, optimizer=adamw, launcher="threads", rtol=0, atol=0)
    assert_all_but_losses(report)
    assert set(seen) == {dtype}


def test_planned_memory_counts_masters_and_wide_gradients() -> None:
    """2 + 4 + 4 + 8 bytes a parameter with AdamW; 2 + 2 + 4 without masters."""
    from spindle.cost.memory import state_bytes
    from spindle.verbs.source import cost_options_of

    for made, each in ((shifts(), 18), (shifts(master_weights="none"), 8)):
        operators = [op for metaop in spindle.make_metagraph(made) for op in metaop.operators]
        assert sum(state_bytes(operators, cost_options_of(made))) == each * 32
