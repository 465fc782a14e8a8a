"""Real processes: what they share."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """What is started meanwhile heeds Ctrl-C, also where a shell's background made us ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all Ray tests: it takes seconds to start."""
    import ray

    from spindle.runtime.launch.ray_workers import start_local_ray

    start_local_ray(4)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class RayCluster:
    """A head without CPUs for ranks, and two nodes of two. `address` is for RAY_ADDRESS, `dashboard` for jobs."""

    dashboard: str
    address: str
    process: "subprocess.Popen[str]"

    def kill(self, node: str) -> None:
        """Kill the node of this id as a power cut would; another takes its place."""
        self._order("kill", node)

    @contextlib.contextmanager
    def without(self, node: str) -> Iterator[None]:
        """Kill it for as long as this is open."""
        self._order("lose", node)
        yield
        self._order("add")

    @contextlib.contextmanager
    def one_more(self, **settings: Any) -> Iterator[str]:
        """A node with such settings (`Cluster.add_node`), for as long as this is open; its id."""
        node = self._order("add", json.dumps(settings))
        yield node
        self._order("lose", node)

    def _order(self, *words: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        done, _, node = self.process.stdout.readline().strip().partition(" ")
        assert done == "DONE"
        return node


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """One cluster for all tests that need several nodes; no process is left of it."""
    process, ready = _start_cluster()
    if not ready:  # Ray gives each node 30 s to start, which a crowded machine may exceed
        process, ready = _start_cluster()
    assert ready, "the cluster did not start, twice"
    with process:
        assert process.stdin is not None
        family: list[psutil.Process] = []
        try:
            yield RayCluster(ready[1], ready[2], process)
            family = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            process.wait(timeout=60)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [left.name() for left in alive if left.status() != psutil.STATUS_ZOMBIE]


def _start_cluster() -> tuple["subprocess.Popen[str]", list[str]]:
    """The process that runs it, and what it says when it is ready; nothing when it could not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # where jobs find `python`
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"],
        cwd=ROOT,
        env=environment | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    if not ready:
        process.communicate(timeout=60)
    return process, ready
