"""Messages that are as late as their waits allow change nothing; each wait that is left out is found."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

import spindle
from spindle.runtime.comms.transport import Post, Wait
from spindle.runtime.steps import reductions
from spindle.runtime.steps.executor import Executor
from spindle.runtime.steps.reductions import Reductions
from tests.drawn import SEEDS, drawn
from tests.late_transport import LateTransport, late
from tests.parity.test_parity import built, report_of
from tests.random_plans import random_plan
from tests.state.stateful import planned, stack, tasks_on
from tests.state.stateful_layers import LAYERS

SIZES = (1, 2**10, 25 * 2**20)  # bytes of a bucket
Plant = Callable[[], contextlib.AbstractContextManager[object]]


@pytest.mark.parametrize("family", ["two_towers", "encoder_decoder"])
@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_families(family: str, num_ranks: int, seed: int) -> None:
    workload, _ = built(family, torch.float64)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    with late():
        report = report_of(family, torch.float64, plan=replace(plan, bucket_bytes=SIZES[seed % 3]))
    assert report.ok, str(report)


def workload_with(layer: str, **options: object) -> spindle.Workload:
    """Two tasks on a trunk of layers of a kind."""
    workload = spindle.Workload("late", **options)  # type: ignore[arg-type]
    return tasks_on(workload, workload.component("trunk", stack(LAYERS[layer]), layers=["0", "1"]), 2)


SETTINGS: dict[str, Callable[[], spindle.Workload]] = {
    "statistics": lambda: workload_with("batch norm"),
    "states": lambda: workload_with("spectral norm"),
    "clipping": lambda: workload_with("batch norm", max_grad_norm=0.1),
    "sharded states": lambda: workload_with("batch norm", shard_optimizer=True),
    "recomputation": lambda: workload_with("spectral norm", recompute=("trunk",)),
    "accumulation": lambda: workload_with("batch norm", accumulate=4, in_flight=2),
}


def change_nothing(setting: str, num_ranks: int, seed: int, plant: Plant = contextlib.nullcontext) -> None:
    """Late messages, and what is planted, leave all parameters and buffers as prompt ones do."""
    left = []
    for open_all in ((), (late, plant)):
        workload = SETTINGS[setting]()
        plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
        plan = replace(plan, bucket_bytes=SIZES[seed % 3])
        with contextlib.ExitStack() as opened:
            for each in open_all:
                opened.enter_context(each())
            left.append(planned(workload, plan, 2))
    torch.testing.assert_close(left[1], left[0], rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_settings(setting: str, num_ranks: int, seed: int) -> None:
    change_nothing(setting, num_ranks, seed)


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


def without_reductions() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(Reductions, "wait", lambda self, name: self._waits.pop(name))


def too_early() -> contextlib.AbstractContextManager[object]:
    """A bucket starts when its first gradient is there."""
    return mock.patch.object(reductions.Reductions, "_start_complete", lambda self: _start_all(self))


def _start_all(found: Reductions) -> None:
    while found._queue:
        found._post(found._queue.pop(0))


PLANTED: dict[str, tuple[str, Plant]] = {
    "activations and gradients": ("statistics", lambda: without_receiving("_transfer")),
    "reductions": ("statistics", without_reductions),
    "reductions before the gradient": ("statistics", too_early),
    "running statistics": ("statistics", lambda: without_waits("_tally", "all_reduce")),
    "states": ("states", lambda: without_receiving("_hand")),
    "the norm of all gradients": ("clipping", lambda: without_waits("_clip", "all_reduce")),
    "new parameters": ("sharded states", lambda: without_waits("_gather", "broadcast")),
}


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_that_is_left_out_is_found(name: str) -> None:
    """The run ends with another result, or in an error."""
    setting, plant = PLANTED[name]
    with pytest.raises((AssertionError, spindle.SpindleError)):
        change_nothing(setting, 3, 1, plant)
