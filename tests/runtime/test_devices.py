"""Devices: who names them, what is moved to them, and whose clock tells their moments."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spindle.runtime.devices import GpuStreams, Streams, move_modules
from spindle.runtime.profiling.measure import Bench
from spindle.runtime.steps.clock import Clock
from tests.late_transport import LateDriver, LateMark

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_one_module_of_the_runtime_names_gpus() -> None:
    """So that what it does on a GPU can be read in one place, and run on a double."""
    files = [path for path in (ROOT / "runtime").rglob("*.py") if path.name != "devices.py"]
    naming = [str(path) for path in files if re.search(r"torch\.cuda|record_stream|pin_memory", path.read_text())]
    assert files
    assert naming == []


def test_a_buffer_of_two_modules_stays_one_tensor() -> None:
    """`Module.to` makes two of it on another device."""
    shared = torch.zeros(3)
    modules = [nn.Module(), nn.Sequential(nn.Module())]
    modules[0].register_buffer("own", shared)
    modules[1][0].register_buffer("other", shared)  # type: ignore[index]
    weight = nn.Parameter(torch.zeros(2))
    modules[0].register_parameter("weight", weight)
    move_modules(modules, torch.device("meta"))
    assert modules[0].own is modules[1][0].other  # type: ignore[index]
    assert modules[0].own.is_meta


@pytest.mark.parametrize("shape", ["expanded", "transposed", "empty", "whole numbers"])
def test_a_copy_in_is_there_when_it_is_taken(shape: str) -> None:
    made = {
        "expanded": torch.arange(3.0).expand(2, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.empty(0, 3),
        "whole numbers": torch.arange(3),
    }[shape]
    for streams in (Streams(CPU), GpuStreams(CPU, LateDriver())):
        assert torch.equal(streams.copy_in(made)(), made)


def test_the_source_of_a_copy_may_change_once_it_is_begun() -> None:
    """A loader may fill it anew."""
    source, streams = torch.ones(3), GpuStreams(CPU, LateDriver())
    take = streams.copy_in(source)
    source.zero_()
    assert take().tolist() == [1.0] * 3


def test_numbers_are_those_of_their_moment() -> None:
    """What is computed later does not change them, and nobody waited; without any there is still a wait."""
    value, driver = torch.tensor(2.0), LateDriver()
    streams = GpuStreams(CPU, driver)
    take, moment, nothing = streams.numbers([value, torch.tensor([3.0, 4.0])]), streams.mark(), streams.numbers([])
    value.zero_()
    assert not streams.has_passed(moment)
    assert nothing() == []
    assert streams.has_passed(moment)
    assert take() == [2.0, 3.0, 4.0]


def test_the_clocks_are_compared_when_the_device_has_come_to_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else moments of the device would be told as many seconds too early as it was behind."""
    clock = [100.0]
    monkeypatch.setattr("spindle.runtime.devices.time.perf_counter", lambda: clock[0])

    class Behind(LateDriver):
        def settle(self, mark: LateMark) -> None:
            super().settle(mark)
            clock[0] += 5.0

        def between_s(self, begun: LateMark, ended: LateMark) -> float:
            return 2.0

    streams = GpuStreams(CPU, Behind())
    streams.set_origin()
    assert streams.moment_s(streams.mark()) == 107.0
    assert streams.moment_s(3.0) == 3.0


def test_settling_waits_for_all_that_was_given() -> None:
    driver = LateDriver()
    streams = GpuStreams(CPU, driver)
    begun, ended = streams.mark(), streams.mark()
    assert not streams.has_passed(ended)
    with pytest.raises(AssertionError, match="has not come to a moment whose time is asked"):
        streams.between_s(begun, ended)
    streams.settle()
    assert streams.has_passed(ended)
    assert streams.between_s(begun, ended) >= 0.0


def bench() -> Bench:
    """One that measures nothing on a late device."""
    found = object.__new__(Bench)
    found.layers, found.num_ranks, found.rest, found.optimizer = {}, 1, torch.zeros(0), None
    found._streams, found.clock = GpuStreams(CPU, LateDriver()), Clock()
    return found


def now(found: Bench) -> None:
    moment = found._streams.mark()
    found._now()
    assert found._streams.has_passed(moment), "the device has not come to a moment whose time is asked"


MEASURED: dict[str, Callable[[Bench], object]] = {
    "a small step": lambda found: found.rehearse(recompute=False),
    "updates": lambda found: found._update_s(SimpleNamespace(trained={})),  # type: ignore[arg-type]
    "messages": now,
}


@pytest.mark.parametrize("what", MEASURED)
def test_what_is_measured_is_waited_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a wait that is left out is found."""
    weight = nn.Parameter(torch.zeros(2))
    monkeypatch.setattr(Bench, "_optimizer", lambda self, layers: torch.optim.SGD([weight], lr=0.1))
    MEASURED[what](bench())
    monkeypatch.setattr(GpuStreams, "settle", lambda self: None)
    with pytest.raises(AssertionError, match="has not come to a moment whose time is asked"):
        MEASURED[what](bench())
