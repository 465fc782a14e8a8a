"""Parameters to which nothing leads in a step: an optimizer lets them rest, as in one process."""

import contextlib
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import RunError, WorkloadError
from spindle.runtime.steps import executor
from spindle.runtime.steps.reductions import Reductions
from spindle.workload import Workload
from tests.late_transport import late
from tests.parity.test_tensor_parallel import laid_out
from tests.random_plans import random_plan


class Branching(nn.Module):
    """Uses one of its layers for some batches, and one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.extra(x).tanh() if flag else y


@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"shard_optimizer": True}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_parameters_without_gradients_rest(kind: str, options: dict[str, Any], num_ranks: int) -> None:
    """One process has no gradient where nothing leads to a parameter, so that it neither decays nor moves on."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if kind == "AdamW":
            return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3, eps=1e-3)
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)

    def made() -> tuple[spindle.Workload, Any]:
        workload = spindle.Workload("resting", **options)
        torch.manual_seed(0)
        body = workload.component("body", nn.ModuleList([Branching(), Branching()]).double(), layers=["0", "1"])
        draw = torch.Generator().manual_seed(0)
        data = [{"x": torch.randn(6, 4, generator=draw, dtype=torch.float64), "flag": torch.tensor(n == 1)}
                for n in range(4)]  # fmt: skip

        @workload.task("t", batch_size=6, data=data)
        def task(batch: Any) -> Tensor:
            x: Tensor = batch["x"]
            for layer in body:
                x = layer(x, batch["flag"])
            return x.square().mean()

        return workload, (task, data)

    workload, (task, data) = made()
    alone, count = dict(workload.named_parameters()), workload.accumulate
    stepping = optimizer(alone.values())
    for step in range(5):
        stepping.zero_grad()
        for number in range(count):
            torch.autograd.backward(task(data[(count * step + number) % len(data)]) / count)
        if workload.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(alone.values(), workload.max_grad_norm)
        stepping.step()
    planned, _ = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = random_plan(spindle.make_metagraph(planned), num_ranks, 3)
        spindle.train(planned, plan, optimizer=optimizer, steps=5, launcher="threads")
    for name, parameter in planned.named_parameters():
        torch.testing.assert_close(parameter, alone[name], rtol=1e-9, atol=1e-12)


class Skipped(nn.Module):
    """Lets a batch through, or computes without gradients, by a flag; or lets it through by a draw."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 4)

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        if self.how == "switch":
            with torch.set_grad_enabled(flag):
                return self.linear(x)  # type: ignore[no-any-return]
        taken = flag if self.how == "flag" else torch.rand(1).item() < 0.5
        return self.linear(x) if taken else x


@pytest.mark.parametrize("how", ["flag", "switch", "draw"])
def test_layers_that_the_first_batch_does_not_train_are_trained_by_later_ones(how: str) -> None:
    """Layers that nothing trained stands before, so that what they give needs no gradient at capture."""
    torch.manual_seed(0)
    workload = spindle.Workload("skipped")
    body = workload.component("body", nn.ModuleList([Skipped(how), Skipped(how)]).double(), layers=["0", "1"])
    head = workload.component("head", nn.Linear(4, 2).double())
    data = [{"x": torch.randn(6, 4, dtype=torch.float64), "flag": torch.tensor(n > 0)} for n in range(4)]

    @workload.task("t", batch_size=6, data=data)
    def task(batch: Any) -> Tensor:
        x: Tensor = batch["x"]
        for layer in body:
            x = layer(x, bool(batch["flag"]))
        return head(x).square().mean()  # type: ignore[no-any-return]

    report = spindle.verify(workload, num_workers=2, steps=6, optimizer=adamw, launcher="threads")
    assert report.ok, str(report)
    trained = {row.name for row in report.rows if row.quantity == "gradient"}
    assert any("body.0" in name for name in trained)


# -- sharded parameters -----------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Uses other layers in each of its branches, and one in none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.one, self.two, self.never = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        y: Tensor = self.linear(x).tanh()
        return y + self.one(x) if branch == 1 else y + self.two(x).tanh() if branch == 2 else y


BRANCHES = {"a": (1, 0, 0, 0, 0, 0, 1, 0), "b": (0, 0, 0, 2, 0, 0, 0, 0)}  # of each batch of a task


def routed(**options: Any) -> Workload:
    """Two tasks of one component, which lead to other layers in each step; a head that stays whole."""
    torch.manual_seed(0)
    workload = Workload("routed", **options)
    body = workload.component("body", nn.ModuleList([Routed(), Routed()]).double(), layers=["0", "1"])
    head = workload.component("head", nn.Linear(4, 2).double())
    for number, (name, branches) in enumerate(BRANCHES.items()):
        draw = torch.Generator().manual_seed(number)
        data = [
            {"x": torch.randn(6, 4, generator=draw, dtype=torch.float64), "branch": torch.tensor(branch)}
            for branch in branches
        ]

        @workload.task(name, batch_size=6, data=data)
        def task(batch: Any) -> Tensor:
            x: Tensor = batch["x"]
            for layer in body:
                x = layer(x, batch["branch"])
            return head(x).square().mean()  # type: ignore[no-any-return]

    return workload


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3, eps=1e-3)


def looped(workload: Workload, steps: int) -> Mapping[str, Tensor]:
    """Parameters after a plain loop over the tasks, which knows nothing of plans."""
    parameters, count = dict(workload.named_parameters()), workload.accumulate
    stepping = adamw(parameters.values())
    batches = {name: list(task.batches()) for name, task in workload.tasks.items()}
    for step in range(steps):
        stepping.zero_grad()
        for name, task in workload.tasks.items():
            for number in range(count * step, count * (step + 1)):
                loss = task.function(dict(batches[name][number % len(batches[name])]))
                torch.autograd.backward(loss / count)
        if workload.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), workload.max_grad_norm)
        stepping.step()
    return parameters


def trained(workload: Workload, num_ranks: int, seed: int, steps: int) -> Mapping[str, Tensor]:
    """Parameters after as many steps with the body sharded over all ranks."""
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed, on_all=["body"])
    spindle.train(workload, plan, optimizer=adamw, steps=steps, launcher="threads", timeout_s=60.0)
    return dict(workload.named_parameters())


def far(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Parameters that differ."""
    return [name for name in ours if not torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"accumulate": 4, "in_flight": 2, "max_grad_norm": 0.1},
    {"shard_optimizer": True, "recompute": ["body"]},
]


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("is_late", [False, True], ids=["threads", "late"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sharded_parameters_rest_too(options: dict[str, Any], num_ranks: int, is_late: bool) -> None:
    """With momenta and weight decay the parameters of a plain loop; one branch is taken in few steps, one in none."""
    alone = looped(routed(**options), 5)
    with late() if is_late else contextlib.nullcontext():
        assert far(trained(routed(**options), num_ranks, num_ranks, 5), alone) == []


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_verify_agrees(num_ranks: int) -> None:
    made = routed(accumulate=2)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, 1, on_all=["body"])
    report = spindle.verify(made, plan, optimizer=adamw, steps=4, launcher="threads", timeout_s=60.0)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
def test_flags_that_are_not_waited_for_are_noticed() -> None:
    """They hold what is not a number until then, which counts as reached."""
    wait = Reductions.wait

    def impatient(self: Reductions, name: str) -> None:
        if name not in self.program.flags_by_name:
            wait(self, name)

    with late(), mock.patch.object(Reductions, "wait", impatient):
        assert far(trained(routed(), 2, 2, 5), looped(routed(), 5))


class Join(nn.Module):
    """Makes no use of an input for some batches, by a flag of any kind or by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, both: Any) -> Tensor:
        if both if isinstance(both, (bool, int)) else bool((both > 0).any()):
            y = y + self.extra(x)
        z: Tensor = self.linear(y)
        return z


def flag_of(kind: str, batch: Any) -> Any:
    """What steers the layer."""
    value = batch["both"]
    return {"tensor": value, "bool": bool(value), "int": int(value), "size": batch["x"].shape[1] > 2}[kind]


def joined(kind: str, uses: str, **options: Any) -> Workload:
    """The first two layers of the body lead to a layer that uses their result where `uses` has a 1."""
    torch.manual_seed(0)
    made = Workload("joined", **options)
    body = made.component("body", nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double(), layers=["0", "1", "2"])
    join = made.component("join", nn.ModuleList([Join()]).double(), layers=["0"])
    data = [{"x": torch.randn(6, 2 + int(n), 4, dtype=torch.float64), "both": torch.tensor(int(n))} for n in uses]

    @made.task("t", batch_size=6, data=data)
    def task(batch: Any) -> Tensor:
        x = batch["x"]
        z: Tensor = join[0](body[1](body[0](x).tanh()), body[2](x), flag_of(kind, batch))
        return z.square().mean()

    return made


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("kind", ["tensor", "bool", "int", "size"])
@pytest.mark.parametrize("uses", ["1011", "0100"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_layers_whose_result_a_later_layer_leaves_out_rest(kind: str, uses: str, num_ranks: int) -> None:
    """No gradient comes back to them, through as many devices as lie between, whatever the first batch did."""
    made = joined(kind, uses)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, num_ranks)
    report = spindle.verify(made, plan, optimizer=adamw, steps=4, launcher="threads", timeout_s=60.0)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("is_late", [False, True], ids=["threads", "late"])
@pytest.mark.parametrize("sharded", [(), ("body",)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_so_they_do_under_all_options(options: dict[str, Any], sharded: tuple[str, ...], is_late: bool) -> None:
    made = joined("tensor", "10010111", **options)
    plan = random_plan(spindle.make_metagraph(made), 3, 5, on_all=sharded)
    with late() if is_late else contextlib.nullcontext():
        report = spindle.verify(made, plan, optimizer=adamw, steps=3, launcher="threads", timeout_s=60.0)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
def test_flags_of_gradients_that_are_ignored_are_found() -> None:
    """With zeros in place of no gradient the layers move on, and `verify` says where."""
    made = joined("tensor", "101")
    plan = random_plan(spindle.make_metagraph(made), 3, 1)
    with mock.patch.object(executor, "with_gradients", lambda pieces, flags: pieces):
        report = spindle.verify(made, plan, optimizer=adamw, steps=3, launcher="threads", timeout_s=60.0)
    assert not report.ok
    assert "none in one process" in str(report)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize(("first", "kind"), [(False, bool), (True, bool), (False, float), (True, float)])
def test_gradients_switched_off_for_some_batches(first: bool, kind: type) -> None:
    """Around layers of a task: exact where the first batch had them on, or a flag of a list of batches tells which has;
    else refused, where a gradient would be lost.
    """
    torch.manual_seed(0)
    made = Workload("switched")
    body = made.component("body", nn.ModuleList(nn.Linear(4, 4) for _ in range(2)).double(), layers=["0", "1"])
    draw = torch.Generator().manual_seed(0)
    states = [kind((n % 2 == 0) == first) for n in range(4)]
    data = [{"x": torch.randn(6, 4, generator=draw, dtype=torch.float64), "on": on} for on in states]

    @made.task("t", batch_size=6, data=data)
    def task(batch: Any) -> Tensor:
        with torch.set_grad_enabled(bool(batch["on"])):
            x = body[0](batch["x"])
        return (body[1](batch["x"]) + x).square().mean()  # type: ignore[no-any-return]

    plan = random_plan(spindle.make_metagraph(made), 2, 1)
    verify = partial(spindle.verify, made, plan, optimizer=adamw, steps=4, launcher="threads", timeout_s=60.0)
    if first or kind is bool:
        report = verify()
        assert report.ok, str(report)
    else:
        with pytest.raises(
            WorkloadError, match=r"'body\.0' \(line \d+ of test_resting\.py\) gets a gradient, and got none"
        ):
            verify()


class Queries(nn.Module):
    """A layer on learned queries, so that what it gives exists whole only."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])

    def forward(self) -> Tensor:
        y: Tensor = self.layers[0](self.queries)
        return y


class MayUse(nn.Module):
    """Uses what the queries give for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, given: Tensor, flag: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + given.sum(0) if flag else y


def test_tensor_parallel_layers_whose_result_is_left_out_in_a_step_are_refused() -> None:
    """The result exists whole, so that one of two ranks alone knows that nothing leads back to it."""
    torch.manual_seed(0)
    workload = spindle.Workload("left out")
    body: Any = workload.component(
        "body",
        Queries().double(),
        layers="layers",
        tensor_parallel=2,
        tensor_plan={"layers.0.0": "colwise", "layers.0.1": "rowwise"},
    )
    head: Any = workload.component("head", nn.ModuleList([MayUse()]).double(), layers=["0"])
    data = [{"x": torch.ones(6, 4, dtype=torch.float64), "flag": torch.tensor(n != 1)} for n in range(3)]

    @workload.task("t", batch_size=6, data=data)
    def task(batch: Any) -> Tensor:
        loss: Tensor = head[0](batch["x"], body(), batch["flag"]).square().mean()
        return loss

    plan = laid_out(workload, 2, lambda _: (1, 2))
    with pytest.raises(
        RunError, match=r"BACKWARD .*nothing leads back to t/body.layers.0:0.*choose between values by torch.where"
    ):
        spindle.train(workload, plan, optimizer=partial(torch.optim.SGD, lr=0.1), steps=3, launcher="threads")
