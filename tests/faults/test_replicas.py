"""A bit that flips on one rank is found within the stated steps, before the next update, and named; nobody else is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import InputError, ReplicaError, SpindleWarning
from spindle.failures import Failures
from spindle.runtime.controller import Run, launched, prepare
from spindle.workload import Workload
from tests.faults.injected import Fault, Optimizer, own_rank, plan_of, trained, undisturbed, workload_of
from tests.parity.test_tensor_parallel import spread
from tests.parity.test_tensor_parallel import workload as cut
from tests.random_plans import widest_plan
from tests.tiny_workloads import floats

EVERY = 3


class Block(nn.Module):
    """A layer that is kept whole since it repeats, with a frozen part and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.up.requires_grad_(False)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x)) + self.shift))
        return y


def simple(**options: Any) -> Workload:
    torch.manual_seed(0)
    made = Workload("replicas", **options)
    net = made.component("net", nn.Sequential(Block(), Block()))

    @made.task("t", batch_size=6, data=[{"x": floats(6, 4, seed=1, dtype=torch.float32)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(net(batch["x"]), batch["x"].flip(1))

    return made


def flip(value: Tensor) -> None:
    """Its last bit, as a fault in memory does."""
    last = value.detach().view(-1)[-1:].view(torch.uint8)
    last[0] = int(last[0]) ^ 1


def worker_of(run: Run, rank: int) -> Any:
    return run.workers._workers[rank]  # type: ignore[attr-defined]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def found(made: Workload, num_ranks: int, plant: Callable[[Run], None]) -> str:
    """What is said of what is planted after four steps, of which the third and later ones follow a check; it is found
    after the sixth, and never before.
    """
    prepared = prepare(made, widest_plan(spindle.make_metagraph(made), num_ranks))
    options: dict[str, Any] = {"launcher": "threads", "timeout_s": 20.0, "check_replicas_every": EVERY}
    with launched(prepared, optimizer=adam, **options) as run:
        run.steps(4)
        plant(run)
        run.steps(2)
        before = {name: value.clone() for name, value in worker_of(run, 0).store.parameters.items()}
        with pytest.raises(ReplicaError) as caught:
            run.steps(1)
        assert all(torch.equal(value, before[name]) for name, value in worker_of(run, 0).store.parameters.items())
    return str(caught.value)


PLACES: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "parameter": ("net.0.down.weight", lambda worker: worker.store.parameters["net.0.down.weight"]),
    "frozen parameter": ("net.1.up.bias", lambda worker: worker.store.parameters["net.1.up.bias"]),
    "buffer": ("net.1.shift", lambda worker: worker.store.buffers["net.1.shift"]),
    "state": (
        "the optimizer's states of 'net.0.down.bias' differ",
        lambda worker: worker.optimizer.state[worker.store.parameters["net.0.down.bias"]]["exp_avg_sq"],
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_found_and_named(place: str) -> None:
    """On one of three ranks: that one is told from the others, which agree. A state makes its parameter differ too."""
    words, of = PLACES[place]
    said = found(simple(), 3, lambda run: flip(of(worker_of(run, 1))))
    assert words in said
    assert "on rank 1 from ranks 0, 2" in said
    assert "; all were equal after step 3, so that it began in one of the steps 4 to 6. Nothing was stepped" in said


def test_of_two_ranks_none_is_accused() -> None:
    said = found(simple(), 2, lambda run: flip(worker_of(run, 1).store.parameters["net.0.up.weight"]))
    assert said.startswith("'net.0.up.weight' differs between ranks 0, 1; all were equal")


def test_under_zero_1_parameters_are_compared() -> None:
    """A rank that does not step a bucket takes what its owner has, so that a flip in a trained one lasts a step."""
    said = found(simple(shard_optimizer=True), 3, lambda run: flip(worker_of(run, 2).store.parameters["net.1.up.bias"]))
    assert said.startswith("'net.1.up.bias' differs on rank 2 from ranks 0, 1")


def test_of_what_is_cut_each_piece_is_compared_with_the_same_piece() -> None:
    """Two copies of two ranks each: a piece is on two of them."""
    made = cut(degree=2)
    prepared = prepare(made, spread(made, 4, 2))
    options: dict[str, Any] = {"launcher": "threads", "timeout_s": 20.0, "check_replicas_every": 1}
    with launched(prepared, optimizer=adam, **options) as run:
        run.steps(2)
        worker = worker_of(run, 1)
        sets = [each for each in worker.spec.replicas if len(each.ranks) < len(run.workers._workers) and each.items]  # type: ignore[attr-defined]
        name, ranks = next((n, e.ranks) for e in sets for kind, n in e.items if "@" in n and kind == "parameter")
        flip(worker.store.parameters[name])
        with pytest.raises(ReplicaError, match=re.escape(f"{name!r} differs between ranks {ranks[0]}, {ranks[1]}")):
            run.steps(1)


@pytest.mark.parametrize("every", [0, 1])
def test_a_checkpoint_is_compared_before_it_is_written(every: int, tmp_path: Path) -> None:
    """So that a run never goes on from what differs; where checks are off, it is written."""
    made = simple()

    class Flipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            if own_rank() == 1:
                flip(self.param_groups[0]["params"][0])

    options: dict[str, Any] = {"launcher": "threads", "checkpoints": tmp_path, "steps": 1}
    plan = widest_plan(spindle.make_metagraph(made), 2)

    def run() -> None:
        spindle.train(
            made, plan, optimizer=lambda p: Flipping(p, lr=0.1), check_replicas_every=every and 100, **options
        )

    if not every:
        run()
        assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
        return
    with pytest.raises(ReplicaError, match="all were equal after step 0, so that it began in step 1"):
        run()
    assert list(tmp_path.glob("step-*")) == []


class Once(Optimizer):
    """Flips a bit of a parameter in one step of rank 1."""

    def step(self, closure: Any = None) -> Any:
        fault = self.on_step.fault
        armed = own_rank() == fault.rank and fault.is_armed()
        result = super().step(closure)
        if armed and not fault.is_armed():
            flip(self.param_groups[0]["params"][-1])
        return result


@pytest.mark.gloo
def test_a_run_goes_on_from_before_the_flip(tmp_path: Path) -> None:
    """In processes: it ends with the weights of the calm run, bit for bit."""
    fault = Fault("flipped", "optimizer", tmp_path / "faults", call=5).armed()
    workload = workload_of(fault)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = Once(parameters)
        return optimizer.arm(fault)

    with pytest.warns(SpindleWarning, match="differs between ranks 0, 1"):
        result = spindle.train(
            workload,
            plan_of(workload, split=False),
            optimizer=make,
            steps=8,
            checkpoints=tmp_path / "c",
            checkpoint_every=2,
            launcher="processes",
            check_replicas_every=2,
            failures=Failures(max_failures=1, backoff_s=0.0),
        )
    assert re.search(r"it began in one of the steps 5 to 6\..*went on from step 4$", result.recovered[0])
    expected = undisturbed(fault)
    assert all(torch.equal(value, expected[name]) for name, value in workload.named_parameters())


def test_a_number_of_steps_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check_replicas_every is -1; give a number of steps, or 0 for no check"):
        trained(Fault("raises", "forward", tmp_path), launcher="threads", check_replicas_every=-1)
