"""Loaders with worker processes: they work under every launcher, read each batch once, and end with their rank."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import spindle
from spindle.errors import RunError, WorkloadError
from spindle.runtime.comms.transport import Transport
from spindle.runtime.controller import Launcher, prepare
from spindle.runtime.launch.processes import ProcessWorkers, RankProcess
from spindle.runtime.programs.program import Op
from spindle.workload import Workload
from tests.distributed.conftest import ROOT
from tests.random_plans import random_plan, widest_plan

pytestmark = pytest.mark.gloo

WAIT_S = 10.0
LONG_S = 60.0  # longer than any test


class Told(Dataset[Tensor]):
    """Samples that say in a file which process read them. From `stuck` on, reading takes longer than the run."""

    def __init__(self, path: Path, stuck: int) -> None:
        self.path, self.stuck = str(path), stuck

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(file, f"{os.getpid()} {index}\n".encode())
        os.close(file)
        if index >= self.stuck:
            threading.Event().wait(LONG_S)
        return torch.full((4,), float(index))


def as_fields(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"x": torch.stack(samples)}


def workload_of(path: Path, stuck: int) -> Workload:
    torch.manual_seed(0)
    workload = Workload("told")
    net = workload.component("net", nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))))
    loader = DataLoader(Told(path, stuck), batch_size=4, num_workers=2, prefetch_factor=1, collate_fn=as_fields)

    @workload.task("t", batch_size=4, data=loader, prefetch=0)
    def task(batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    spindle.make_metagraph(workload)  # which reads a batch
    path.unlink()
    return workload


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def read(path: Path) -> tuple[set[int], list[int]]:
    """The processes that read samples, and the samples."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {int(process) for process, _ in lines}, sorted(int(index) for _, index in lines)


def running(processes: set[int]) -> list[int]:
    """Those that have not ended some seconds later."""

    def found(number: int) -> list[psutil.Process]:
        try:
            return [psutil.Process(number)]
        except psutil.NoSuchProcess:
            return []

    _, left = psutil.wait_procs([p for number in processes for p in found(number)], timeout=WAIT_S)
    return [p.pid for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("launcher", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_each_sample_is_read_once(launcher: Launcher, tmp_path: Path) -> None:
    """By two processes that one of the ranks started, which then end."""
    workload = workload_of(tmp_path / "read", stuck=16)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    spindle.train(workload, plan, optimizer=sgd, steps=4, launcher=launcher)
    processes, samples = read(tmp_path / "read")
    assert samples == list(range(16))
    assert len(processes) == 2
    assert running(processes) == []


class Squares(Dataset[dict[str, Tensor]]):
    """Samples of which four have a sum that tells which they are."""

    def __init__(self) -> None:
        self.lock: Any = None

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((4,), float(index))}


def in_order(**options: Any) -> tuple[Workload, Any, list[float]]:
    """A workload whose losses are sums of the samples' squares; its loader; the losses of three passes in one process.

    The loader keeps its workers, and planning and the user have begun to read it.
    """

    def loader() -> DataLoader[Any]:
        given = options or {"generator": torch.Generator().manual_seed(3), "shuffle": True}
        return DataLoader(Squares(), 4, num_workers=2, persistent_workers=True, **given)

    def told(loader: Any, epoch: int) -> Iterator[float]:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        return (float(batch["x"].square().sum()) for batch in loader)

    fresh, given = loader(), loader()
    expected = [loss for epoch in range(3) for loss in told(fresh, epoch)]
    if options:  # a sampler with a generator would stand elsewhere then
        next(iter(given))
    torch.manual_seed(0)
    workload = Workload("in-order")
    net = workload.component("net", nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))))

    @workload.task("t", batch_size=4, data=given)
    def task(batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).sum() * 0 + batch["x"].square().sum()  # type: ignore[no-any-return]

    return workload, given, expected


SAMPLED: dict[str, Callable[[], dict[str, Any]]] = {
    "generator": dict,
    "DistributedSampler": lambda: {"sampler": DistributedSampler(Squares(), 1, 0)},
}
LAUNCHERS = ["threads", "processes", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_workers_that_persist_give_the_order_of_one_process(launcher: Launcher, sampled: str, tmp_path: Path) -> None:
    """Also from the middle of a later pass on."""
    workload, given, expected = in_order(**SAMPLED[sampled]())
    if launcher == "threads":  # of a process with threads and locks of whatever was tested before
        given.multiprocessing_context = "forkserver"
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    found = [
        spindle.train(
            workload, plan, optimizer=sgd, steps=steps, launcher=launcher, checkpoints=tmp_path, resume=resume
        )
        for steps, resume in ((6, False), (12, True))
    ]
    assert [losses["t"] for result in found for losses in result.losses] == expected
    if launcher == "threads":
        report = spindle.verify(workload, plan, steps=12, launcher=launcher)
        assert [losses["t"] for losses in report.reference_losses] == expected


def test_planning_leaves_no_workers_in_the_driver() -> None:
    """Those that persist would else stay through the run, each with the data set."""
    gc.collect()
    before = multiprocessing.active_children()  # of other tests
    workload, _, _ = in_order()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    left: list[object] = []

    def look(step: int, losses: object) -> None:
        del step, losses
        children = (child for child in multiprocessing.active_children() if child not in before)
        left.extend(child for child in children if not isinstance(child, RankProcess))

    spindle.train(workload, plan, optimizer=sgd, steps=2, launcher="processes", on_step=look)
    assert left == []


@pytest.mark.parametrize("launcher", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_loader_that_cannot_be_sent_is_named(launcher: Launcher) -> None:
    workload, given, _ = in_order()
    given.dataset.lock = threading.Lock()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    with pytest.raises(WorkloadError, match=r"task 't': its data \(DataLoader\) cannot be sent .*lock.*keep locks"):
        spindle.train(workload, plan, optimizer=sgd, steps=2, launcher=launcher)
    assert not [child for child in multiprocessing.active_children() if isinstance(child, RankProcess)]


IN_ORDER = """
import sys
import spindle
from tests.distributed.test_loader_workers import in_order, sgd
from tests.random_plans import random_plan, widest_plan

workload, _, expected = in_order()
plan = widest_plan(spindle.make_metagraph(workload), 2)
result = spindle.train(workload, plan, optimizer=sgd, steps=12, launcher="torchrun")
sys.stdout.write(f"ORDER {[losses['t'] for losses in result.losses] == expected}\\n")
"""


TORCHRUN = """
import sys
from pathlib import Path
import spindle
from tests.distributed.test_loader_workers import read, sgd, workload_of
from tests.random_plans import random_plan, widest_plan
import os

path = Path(sys.argv[1]) / "read"
workload = workload_of(Path(sys.argv[1]) / ("looked" + os.environ["RANK"]), stuck=16)
workload.tasks["t"].data.dataset.path = str(path)
plan = widest_plan(spindle.make_metagraph(workload), 2)
spindle.train(workload, plan, optimizer=sgd, steps=4, launcher="torchrun")
processes, samples = read(path)
sys.stdout.write(f"READ {samples == list(range(16))} {len(processes)}\\n")
"""


def test_each_sample_is_read_once_under_torchrun(tmp_path: Path) -> None:
    done = under_torchrun(TORCHRUN, tmp_path)
    assert done.stdout.count("READ True 2") == 2, done.stdout + done.stderr


def test_workers_that_persist_give_the_order_of_one_process_under_torchrun(tmp_path: Path) -> None:
    done = under_torchrun(IN_ORDER, tmp_path)
    assert done.stdout.count("ORDER True") == 2, done.stdout + done.stderr


def under_torchrun(text: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    script = tmp_path / "run.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )


def test_a_busy_worker_ends_with_the_run(tmp_path: Path) -> None:
    """It reads ahead what takes a minute when the run is over."""
    workload = workload_of(tmp_path / "read", stuck=8)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    spindle.train(workload, plan, optimizer=sgd, steps=2, launcher="processes")
    processes, samples = read(tmp_path / "read")
    assert max(samples) >= 8
    assert running(processes) == []


DRIVER = """
import sys
from pathlib import Path
import spindle
from tests.distributed.test_loader_workers import sgd, workload_of
from tests.random_plans import random_plan, widest_plan

workload = workload_of(Path(sys.argv[1]), stuck=8)
plan = widest_plan(spindle.make_metagraph(workload), 2)
told = lambda step, losses: print("step", step, flush=True)
spindle.train(workload, plan, optimizer=sgd, steps=9, launcher="processes", on_step=told)
"""


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    """So do the ranks; nobody is there to end them."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "read")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "step 1\n"
    children = {child.pid for child in psutil.Process(driver.pid).children(recursive=True)}
    workers, _ = read(tmp_path / "read")
    assert workers <= children
    driver.kill()
    driver.communicate(timeout=WAIT_S)
    assert running(children) == []


class Forking:
    """Starts a process, which holds what it inherits, and is then killed."""

    def __init__(self, spec: Path, transport: Transport) -> None:
        del transport
        self.path = spec

    def vanish(self) -> None:
        child = os.fork()
        if child == 0:
            threading.Event().wait(LONG_S)
        self.path.write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_rank_is_noticed_though_its_children_live(tmp_path: Path) -> None:
    """Its pipe closes at once, and they are ended with the run."""
    workers = ProcessWorkers([tmp_path / "child"], worker=Forking)
    with pytest.raises(RunError, match=re.escape("rank 0 died (exit code -9)")):
        workers.call("vanish", patience_s=WAIT_S)
    assert running({int((tmp_path / "child").read_text())}) == []


def pairs() -> Iterator[dict[str, Tensor]]:
    """Batches that are no list, so that one rank of a machine reads them."""
    for seed in range(4):
        yield {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("prefetch", [0, 1])
def test_ranks_that_read_for_each_other_do_not_wait_for_each_other_regression(prefetch: int, tmp_path: Path) -> None:
    """Of two tasks each rank reads one, and needs the other's first: without prefetch, and after a resume, whose feeds
    begin with nothing read, both had waited until the time was up.
    """
    workload = Workload("crossing")
    for name in ("a", "b"):
        tower = workload.component(f"tower-{name}", nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))))

        def task(batch: dict[str, Tensor], tower: nn.Module = tower) -> Tensor:
            loss: Tensor = tower(batch["x"]).square().mean()
            return loss

        workload.task(name, batch_size=4, data=pairs, prefetch=prefetch)(task)
    metagraph = spindle.make_metagraph(workload)

    def loads(plan: spindle.Plan) -> list[list[str]]:
        lists = prepare(workload, plan).program.instructions
        return [[i.target for i in instructions if i.op is Op.LOAD] for instructions in lists]

    plans = (random_plan(metagraph, 2, seed) for seed in range(300))
    plan = next(plan for plan in plans if loads(plan) == [["b", "a"], ["a", "b"]])
    for steps in (3, 6):
        result = spindle.train(
            workload,
            plan,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            steps=steps,
            launcher="processes",
            timeout_s=20.0,
            checkpoints=tmp_path,
            resume=steps > 3,
        )
        assert len(result.losses) == 3
