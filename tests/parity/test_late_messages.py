"""Messages and devices that are as late as their waits allow change nothing; each wait that is left out is found."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.runtime.comms.transport import Post, Wait
from spindle.runtime.devices import GpuStreams
from spindle.runtime.steps.executor import Executor
from spindle.runtime.steps.flats import Flats
from spindle.runtime.steps.reductions import Reductions
from spindle.values.plan import Plan
from spindle.workload import Workload
from tests.drawn import SEEDS, drawn
from tests.late_transport import LateDriver, LateMark, LateStream, LateTransport, late
from tests.parity.test_parity import built, report_of
from tests.parity.test_tensor_parallel import spread
from tests.random_plans import random_plan
from tests.state.stateful import WIDTH, sgd, stack, tasks_on, values
from tests.state.stateful_layers import LAYERS
from tests.state.test_writes import teacher

SIZES = (1, 2**10, 25 * 2**20)  # bytes of a bucket
Opened = contextlib.AbstractContextManager[object]
Plant = Callable[[], Opened]


@pytest.mark.parametrize("family", ["two_towers", "encoder_decoder"])
@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_families(family: str, num_ranks: int, seed: int) -> None:
    workload, _ = built(family, torch.float64)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    with late():
        report = report_of(family, torch.float64, plan=replace(plan, bucket_bytes=SIZES[seed % 3]))
    assert report.ok, str(report)


def workload_with(
    layer: Callable[[], nn.Module], *, of_trunk: dict[str, Any] | None = None, **options: Any
) -> Workload:
    """Two tasks on a trunk of layers of a kind."""
    workload = Workload("late", **options)
    return tasks_on(workload, workload.component("trunk", stack(layer), layers=["0", "1"], **(of_trunk or {})), 2)


class Narrowed(nn.Module):
    """A layer that two ranks may hold in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).tanh())
        return y


CUT = {"tensor_parallel": 2, "tensor_plan": {"*.up": "colwise", "*.down": "rowwise"}}
NORM, SPECTRAL = LAYERS["batch norm"], LAYERS["spectral norm"]

SETTINGS: dict[str, Callable[[], Workload]] = {
    "statistics": lambda: workload_with(NORM),
    "states": lambda: workload_with(SPECTRAL),
    "clipping": lambda: workload_with(NORM, max_grad_norm=0.1),
    "sharded states": lambda: workload_with(NORM, shard_optimizer=True),
    "recomputation": lambda: workload_with(SPECTRAL, recompute=("trunk",)),
    "accumulation": lambda: workload_with(NORM, accumulate=4, in_flight=2),
    "sharded parameters": lambda: workload_with(Narrowed, of_trunk={"shard": "parameters"}),
    "cut layers": lambda: workload_with(Narrowed, of_trunk=CUT),
    "a teacher": teacher("lerp", every=2),
}


def plan_of(workload: Workload, setting: str, num_ranks: int, seed: int) -> Plan:
    if setting == "cut layers":
        return spread(workload, 2, 2)
    metagraph = spindle.make_metagraph(workload)
    return random_plan(metagraph, num_ranks, seed, on_all=workload.shard_parameters)


Left = tuple[list[dict[str, float]], dict[str, Tensor]]


def left_by(setting: str, num_ranks: int, seed: int) -> Left:
    """Losses, parameters and buffers after four steps, two of them in one call, so that a device may be behind."""
    workload = SETTINGS[setting]()
    plan = replace(plan_of(workload, setting, num_ranks, seed), bucket_bytes=SIZES[seed % 3])
    found = spindle.train(workload, plan, optimizer=sgd, steps=4, trace_steps=3, launcher="threads", timeout_s=30.0)
    return list(found.losses), values(workload)


@functools.cache
def prompt(setting: str, num_ranks: int, seed: int) -> Left:
    """The same with messages and a device that are never late."""
    return left_by(setting, num_ranks, seed)


def change_nothing(
    setting: str, num_ranks: int, seed: int, plant: Plant = contextlib.nullcontext, moments: int | None = None
) -> None:
    """Late messages and devices, and what is planted, leave all that prompt ones do. `moments`: a seed for when streams
    do what they were given; None: at the last moment.
    """
    wanted = prompt(setting, num_ranks, seed)
    with late(moments), plant():
        found = left_by(setting, num_ranks, seed)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@drawn(1, num_ranks=range(2, 4), seed=SEEDS, moments=(None, 0, 1, 2))
def test_settings(setting: str, num_ranks: int, seed: int, moments: int | None) -> None:
    change_nothing(setting, num_ranks, seed, moments=moments)


# -- each wait left out -----------------------------------------------------------------------------------------------


def no_wait() -> None:
    """What stands for a wait that is left out."""


@contextlib.contextmanager
def without_waits(op: str, method: str) -> Iterator[None]:
    """While open an instruction's handler does not wait for what it starts itself by `method` of the transport."""
    handler, whole = getattr(Executor, op), getattr(LateTransport, method)

    def unwaited(self: Executor, target: str) -> None:
        def started(transport: LateTransport, *args: object) -> Wait:
            whole(transport, *args)
            return no_wait

        with mock.patch.object(self.transport, method, started.__get__(self.transport)):
            handler(self, target)

    with mock.patch.object(Executor, op, unwaited):
        yield


@contextlib.contextmanager
def without_receiving(op: str) -> Iterator[None]:
    """While open an instruction's handler does not wait for what it receives."""
    handler, whole = getattr(Executor, op), LateTransport.start

    def unwaited(self: Executor, target: str) -> None:
        def started(transport: LateTransport, sends: list[Post], receives: list[Post]) -> tuple[Wait, Wait]:
            whole(transport, sends, receives)
            return no_wait, no_wait

        with mock.patch.object(self.transport, "start", started.__get__(self.transport)):
            handler(self, target)

    with mock.patch.object(Executor, op, unwaited):
        yield


def enter_but_there(self: GpuStreams) -> None:
    """Every thread but the one that records batches ahead is on the rank's device."""
    if not threading.current_thread().name.startswith("recording"):
        self._driver.enter()


def too_early() -> Opened:
    """A bucket starts when its first gradient is there."""
    return mock.patch.object(Reductions, "_start_complete", lambda self: _start_all(self))


def _start_all(found: Reductions) -> None:
    while found._queue:
        found._post(found._queue.pop(0))


def earlier(self: LateDriver, stream: LateStream) -> LateMark:
    """The moment before what a stream was given last."""
    return LateMark(stream, max(0, stream.given - 1), 0.0)


def in_place_of(owner: type, name: str, stands_in: Callable[..., object]) -> Plant:
    return lambda: mock.patch.object(owner, name, stands_in)


def unwaited(method: str) -> Plant:
    """Nobody waits for what a method of the transport starts."""
    whole = getattr(LateTransport, method)

    def started(self: LateTransport, *args: object) -> Wait:
        whole(self, *args)
        return no_wait

    return in_place_of(LateTransport, method, started)


def held_not(self: Executor, name: str) -> None:
    """A transfer that holds nothing of what it sends."""
    transfer(self, name)
    self.departures.clear()


transfer = Executor._transfer

PLANTED: dict[str, tuple[str, int, Plant]] = {
    # the place of a wait (docs/runtime.md): what is trained, on which plan, and how the wait is taken away
    "batches of all ranks": ("statistics", 1, lambda: without_waits("_agree", "all_reduce")),
    "activations and gradients": ("statistics", 1, lambda: without_receiving("_transfer")),
    "what was sent": ("statistics", 1, in_place_of(Executor, "_transfer", held_not)),
    "reductions": ("statistics", 1, in_place_of(Reductions, "wait", lambda self, name: self._waits.pop(name))),
    "reductions before the gradient": ("statistics", 1, too_early),
    "running statistics": ("statistics", 1, lambda: without_waits("_tally", "all_reduce")),
    "states": ("states", 1, lambda: without_receiving("_hand")),
    "the norm of all gradients": ("clipping", 1, lambda: without_waits("_clip", "all_reduce")),
    "what is finite elsewhere": ("statistics", 1, lambda: without_waits("_step", "all_reduce")),
    "new parameters": ("sharded states", 1, lambda: without_waits("_gather", "broadcast")),
    "gathered parameters": (
        "sharded parameters",
        1,
        in_place_of(Flats, "wait", lambda self, name: self._gathering.pop(name)),
    ),
    "sums of sharded gradients": ("sharded parameters", 1, unwaited("reduce_scatter")),
    "sums of cut layers": ("cut layers", 1, lambda: without_waits("_forward", "all_reduce")),
    "sums of cut layers, backward": ("cut layers", 1, lambda: without_waits("_backward", "all_reduce")),
    "what a write reads": ("a teacher", 4, lambda: without_receiving("_write")),
    "a batch": ("statistics", 1, in_place_of(LateDriver, "wait", lambda self, stream, mark: None)),
    "memory of a batch": ("statistics", 1, in_place_of(LateDriver, "keep", lambda self, tensor, stream: None)),
    "the moment of a copy": ("statistics", 1, in_place_of(LateDriver, "mark", earlier)),
    "numbers of a step": ("statistics", 1, in_place_of(LateDriver, "settle", lambda self, mark: None)),
    "the device of a thread": ("statistics", 1, in_place_of(GpuStreams, "enter_thread", enter_but_there)),
}
PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"


def test_the_page_has_each_wait() -> None:
    """And no other."""
    rows = PAGE.read_text(encoding="utf-8").split("\n| wait |")[1].split("\n\n")[0].splitlines()[2:]
    assert sorted(row.split("|")[1].strip() for row in rows) == sorted(PLANTED)


SIGNS = "not finite|not close|out of bounds|different shapes|got a gradient again|not kept|the first device"
"""What is said where something was read too early: NaN, or 77 where numbers are whole; and complaints of the device."""


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_that_is_left_out_is_found(name: str) -> None:
    """The run ends with another result, or in an error, or the device complains."""
    setting, seed, plant = PLANTED[name]
    with pytest.raises((AssertionError, spindle.SpindleError), match=SIGNS):
        change_nothing(setting, 3, seed, plant)
