"""Loaders with worker processes: they work under every launcher, read each batch once, and end with their rank."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spindle
from spindle.errors import RunError
from spindle.runtime.controller import Launcher
from spindle.runtime.launch.processes import ProcessCrew
from spindle.runtime.transport import Transport
from spindle.workload import Workload
from tests.distributed.conftest import ROOT
from tests.random_plans import widest_plan

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


TORCHRUN = """
import sys
from pathlib import Path
import spindle
from tests.distributed.test_loader_workers import read, sgd, workload_of
from tests.random_plans import widest_plan
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
    script = tmp_path / "run.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.count("READ True 2") == 2, done.stdout + done.stderr


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
from tests.random_plans import widest_plan

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

    def __init__(self, job: Path, transport: Transport) -> None:
        del transport
        self.path = job

    def vanish(self) -> None:
        child = os.fork()
        if child == 0:
            threading.Event().wait(LONG_S)
        self.path.write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_rank_is_noticed_though_its_children_live(tmp_path: Path) -> None:
    """Its pipe closes at once, and they are ended with the run."""
    crew = ProcessCrew([tmp_path / "child"], worker=Forking)
    with pytest.raises(RunError, match=re.escape("rank 0 died (exit code -9)")):
        crew.call("vanish", patience_s=WAIT_S)
    assert running({int((tmp_path / "child").read_text())}) == []
