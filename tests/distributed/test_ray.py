"""Ray for real, in few tests: it is slow to start."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import spindle
from spindle.errors import RunError
from spindle.metrics import RayMetrics
from tests.faulty import fragile_workload
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_ray_agrees_with_one_process() -> None:
    """Two Ray actors give the gradients of one process."""
    workload = two_towers(torch.float64)
    report = spindle.verify(workload, widest_plan(spindle.make_metagraph(workload), 2), launcher="ray")
    assert report.ok, str(report)


def test_prometheus_has_the_numbers_of_a_run() -> None:
    """Ray's node serves losses, times and memory, with the names of tasks and of the run."""
    import ray

    workload = two_towers(torch.float64)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    metrics = RayMetrics(run="seven")
    result = spindle.train(workload, plan, optimizer=sgd, steps=3, launcher="ray", callbacks=[metrics])
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {f'ray_spindle_loss{{task="{task}"}}' for task in result.losses[2]}
    wanted |= {f'ray_spindle_memory_bytes{{rank="{rank}"}}' for rank in (0, 1)}
    wanted |= {"ray_spindle_steps_total{}", "ray_spindle_step_seconds_count{}"}
    found: dict[str, float] = {}
    until_s = time.monotonic() + 60
    while not wanted <= found.keys() and time.monotonic() < until_s:  # Ray exports every 10 s
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = spindle_numbers(answer.read().decode())
        threading.Event().wait(0.5)
    assert wanted <= found.keys()
    for task, loss in result.losses[2].items():
        assert found[f'ray_spindle_loss{{task="{task}"}}'] == pytest.approx(loss)
    assert found["ray_spindle_steps_total{}"] == found["ray_spindle_step_seconds_count{}"] == 3


def spindle_numbers(text: str) -> dict[str, float]:
    """Numbers of the run "seven" by name and the labels that are of a task or rank."""
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_spindle_") and 'run="seven"' in line:
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            own = ",".join(re.findall(r'\b(?:task|rank)="[^"]*"', labels))
            found[f"{name}{{{own}}}"] = float(value)
    return found


def listens_on(process: psutil.Process) -> list[str]:
    try:
        return [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:  # it ended meanwhile
        return []


def test_everything_listens_on_loopback() -> None:
    """Neither Ray nor its workers can be reached from outside this machine."""
    me = psutil.Process()
    listening = {ip for process in (me, *me.children(recursive=True)) for ip in listens_on(process)}
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_a_worker_that_raises_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    """Rank, instruction, task, step and the user's own line are in the message; it fails while it is recorded."""
    workload = fragile_workload(tmp_path / "break")
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    (tmp_path / "break").touch()
    with pytest.raises(RunError, match=r"rank \d, LOAD task: task 'task', step 1 .*: too hot") as caught:
        spindle.train(workload, plan, optimizer=sgd, steps=3, launcher="ray", timeout_s=30.0)
    assert "faulty.py" in str(caught.value)
    assert "Traceback (most recent call last)" in caught.value.__notes__[0]


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    """kill -9 of one actor is reported, and the other does not hang."""
    workload = fragile_workload(tmp_path / "kill", kill=True)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    (tmp_path / "kill").touch()
    with pytest.raises(RunError, match="died"):
        spindle.train(workload, plan, optimizer=sgd, steps=3, launcher="ray", timeout_s=30.0)


def test_killing_the_driver_leaves_nothing_behind(tmp_path: Path) -> None:
    """When the driver dies by kill -9 its workers and its Ray end too: two helpers of Ray's after a minute, all others
    within seconds (they try for 60 s, a number in Ray's code, to tell the dead driver that its Ray is gone).
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.endless_driver", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().strip() == "training", "the driver did not start to train"
        family = psutil.Process(driver.pid).children(recursive=True)
        names = {process.pid: " ".join(process.cmdline()) for process in family}
        assert any("_Rank" in name for name in names.values())
        driver.kill()
    helpers = [process for process in family if "agent" in names[process.pid].lower()]
    soon, late = time.monotonic() + 30, time.monotonic() + 90
    assert not [p.name() for p in family if p not in helpers and not ends(p, deadline_s=soon)]
    assert not [p.name() for p in helpers if not ends(p, deadline_s=late)]


def ends(process: psutil.Process, *, deadline_s: float) -> bool:
    """Whether a process is gone by then; a zombie is gone, though nobody may have collected it."""
    while time.monotonic() < deadline_s:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            process.wait(timeout=0.2)
        except psutil.TimeoutExpired:
            continue
        except psutil.NoSuchProcess:
            return True
        return True
    process.kill()
    return False
