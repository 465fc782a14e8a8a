"""Jobs on a real Ray cluster of several nodes: sent, followed through lost connections, detached from, stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spindle.errors import ClusterError, FormatError
from spindle.runtime.launch.jobs import Jobs
from tests.distributed.conftest import ROOT, RayCluster, heeding_ctrl_c

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

MODEL = """\
import torch

import spindle

torch.manual_seed(0)
rows = [{"x": torch.arange(32.0).reshape(8, 4) / 32, "y": torch.ones(8, 4)}]
workload = spindle.Workload("small")
net = workload.component("net", torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)))


@workload.task("fit", batch_size=8, data=rows)
def fit(batch):
    return torch.nn.functional.mse_loss(net(batch["x"]), batch["y"])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "raising.py").write_text("print('before')\nraise RuntimeError('no such luck')\n")
    return tmp_path


def command(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`spindle ARGUMENTS` in a folder. It heeds Ctrl-C, also where a shell's background made us ignore it."""
    with heeding_ctrl_c():
        return subprocess.Popen(
            [sys.executable, "-m", "spindle", *arguments],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def spindle(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    with command(folder, *arguments) as process:
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err


def test_a_job_that_fails(ray_cluster: RayCluster, folder: Path) -> None:
    """Exit 1 with the last lines on stderr; one JSON object on stdout, and the log beside the errors."""
    arguments = (
        "submit",
        "-a",
        ray_cluster.dashboard,
        "--json",
        "--job-id",
        "fails",
        "--",
        "raising.py",
        "--steps",
        "1",
    )
    code, out, err = spindle(folder, *arguments)
    assert code == 1
    told = json.loads(out)
    assert (told["job_id"], told["status"], told["address"]) == ("fails", "FAILED", ray_cluster.dashboard)
    assert told["last_lines"][-2:] == [
        "before",
        "spindle: raising.py, line 2 raised RuntimeError: no such luck; mend the file",
    ]
    assert "exit code 2" in told["message"]
    assert "\nbefore\n" in err
    assert err.splitlines()[-3:] == [
        "spindle: job fails FAILED: Job entrypoint command failed with exit code 2",
        *told["last_lines"][-2:],
    ]
    assert "choose another --job-id" in spindle(folder, *arguments)[2]


def test_variables_reach_the_job(ray_cluster: RayCluster, folder: Path) -> None:
    """From the command line and from files; what comes later wins."""
    (folder / "job.env").write_text("# of the run\nFRUIT=apple\nexport TREE=oak\n")
    (folder / "shows.py").write_text("import os\nprint(*(os.environ[n] for n in ('FRUIT', 'TREE')))\nraise OSError\n")
    given = ("--env", "job.env", "--env", "FRUIT=pear=ripe")
    _, out, err = spindle(folder, "submit", "-a", ray_cluster.dashboard, *given, "--", "shows.py", "--steps", "1")
    assert "pear=ripe oak" in out, err


def lines_until(go: Path, before: int, after: int) -> str:
    """A job's entry point: some lines, then a wait until a file is there, then more."""
    script = (
        f"import os, time\nfor i in range({before}): print('line', i, 'ä', flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.1)\n"
        f"for i in range({before}, {before + after}): print('line', i, 'ä', flush=True)"
    )
    return f'python -c "{script}"'


@pytest.mark.parametrize("loss", ["cut", "silent"])
def test_a_lost_connection_loses_no_line_and_repeats_none(ray_cluster: RayCluster, tmp_path: Path, loss: str) -> None:
    """Connections that close, and ones that stay open while nothing comes any more."""
    go, shown = tmp_path / "go", ""
    notes: list[str] = []
    with proxied(ray_cluster.dashboard) as (address, state):
        jobs = Jobs(address, request_s=3.0, quiet_s=1.0)
        jobs.submit(lines_until(go, 25, 25), {}, f"lines-{loss}")

        def show(text: str) -> None:
            nonlocal shown
            shown += text
            if "line 24 " in shown and not notes:
                state.lose(silent=loss == "silent")

        def note(text: str) -> None:
            notes.append(text)
            state.pass_on()
            go.touch()

        ended = jobs.follow(f"lines-{loss}", show, note)
    assert ended.ok
    assert [f"line {i} ä" for i in range(50)] == [line for line in shown.splitlines() if line.startswith("line ")]
    assert ended.last_lines[-1] == "line 49 ä"
    assert len(notes) == 1
    assert "lost; trying again for 120 s" in notes[0]


def test_a_cluster_that_stays_away(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Following ends, and says that the job may go on; which it does."""
    jobs = Jobs(ray_cluster.dashboard)
    jobs.submit(lines_until(tmp_path / "never", 1, 1), {}, "away")
    with proxied(ray_cluster.dashboard) as (address, state):
        far = Jobs(address, request_s=1.0, quiet_s=0.5, patience_s=2.0)
        with pytest.raises(ClusterError, match=r"no Ray dashboard answers at(.|\n)*job away may still run"):
            far.follow("away", lambda text: state.lose(silent=False) if "line 0" in text else None)
    assert jobs.status("away") == "RUNNING"
    assert jobs.stop("away") == "STOPPED"


def test_jobs_train_over_two_nodes_and_are_left_found_again_and_stopped(ray_cluster: RayCluster, folder: Path) -> None:
    """Four ranks on nodes of two CPUs, by a plan that is sent along. Ctrl-C only detaches, and says how to go on."""
    assert spindle(folder, "plan", "model.py:workload", "--cluster", "2x2:cpu", "-o", "plan.json")[0] == 0
    where = ("submit", "--address", ray_cluster.dashboard)
    train = ("--", "model.py", "--plan", "plan.json", "--steps", "1000000")
    started, _, _ = spindle(folder, *where, "--no-wait", "--job-id", "long", *train)
    assert started == 0
    with command(folder, *where, "--follow", "long") as process:
        assert process.stdout is not None
        assert any("training" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    here = f"spindle submit --address {ray_cluster.dashboard}"
    assert err.splitlines()[-3:] == [
        "job long goes on",
        f"follow it:  {here} --follow long",
        f"stop it:    {here} --stop long",
    ]
    assert Jobs(ray_cluster.dashboard).status("long") == "RUNNING"
    code, out, err = spindle(folder, *where, "--stop", "long", "--json")
    assert (code, json.loads(out)["status"]) == (0, "STOPPED"), err
    code, out, err = spindle(folder, *where, "--follow", "long")
    assert code == 1
    assert "spindle: job long STOPPED" in err
    all_cpus_are_free(where, folder)


def all_cpus_are_free(where: tuple[str, ...], folder: Path) -> None:
    """A job without a plan plans for all four, not for the machine its driver is on, which has none; and prints at its
    end what a run on this machine prints."""
    trace = folder / "trace.json"
    train = ("model.py:workload", "--steps", "2")
    code, out, err = spindle(folder, *where, "--", *train, "--trace", str(trace))
    assert code == 0, out + err
    assert json.loads(trace.read_text())["num_ranks"] == 4
    here = spindle(folder, "train", *train, "--launcher", "threads")[1]
    losses = re.findall(r"^(?:first|last) .*", out, re.MULTILINE)
    assert losses == re.findall(r"^(?:first|last) .*", here, re.MULTILINE)
    assert len(losses) == 2
    assert re.search(r"job spindle-\d{8}-\d{6}-\w{4} SUCCEEDED", err)


def test_a_job_that_nobody_knows(ray_cluster: RayCluster) -> None:
    """To follow and to stop it is bad input."""
    jobs = Jobs(ray_cluster.dashboard)
    with pytest.raises(FormatError, match="knows no job 'nothing'"):
        jobs.follow("nothing", print)
    with pytest.raises(FormatError, match="knows no job 'nothing'"):
        jobs.stop("nothing")


def test_a_server_that_takes_calls_and_never_answers() -> None:
    """Ray's own client waits for it without an end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        start_s = time.monotonic()
        with pytest.raises(ClusterError, match=r"no Ray dashboard answers at http://127.*Timeout"):
            Jobs(f"127.0.0.1:{server.getsockname()[1]}", request_s=1.0)
    assert time.monotonic() - start_s < 20


class Line:
    """A line to a server that one can lose: `lose` closes all connections, or lets nothing through any more."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.open: list[socket.socket] = []
        self.lost = self.silent = False
        self.threads: list[threading.Thread] = []
        self._start(self._accept)

    def lose(self, *, silent: bool) -> None:
        self.lost, self.silent = True, silent
        if not silent:
            self._end_all()

    def pass_on(self) -> None:
        """New connections work again; those of before stay as they are."""
        self.lost = False

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self.threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self.threads[-1].start()

    def _end_all(self) -> None:
        for end in self.open:
            end_of(end)

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self.server.accept()
            except OSError:
                return
            self.open.append(here)
            if self.lost:
                if not self.silent:
                    end_of(here)
                continue
            there = socket.create_connection(self.target, 10)
            self.open.append(there)
            for source, sink in ((here, there), (there, here)):
                self._start(self._copy, source, sink)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        stale = False
        try:
            while part := source.recv(65536):
                stale = stale or self.lost
                if not stale:
                    sink.sendall(part)
        except OSError:
            pass
        if not stale:
            end_of(sink)

    def close(self) -> None:
        end_of(self.server)
        self.threads[0].join(20)  # from here on no connection is new
        self._end_all()
        for thread in self.threads:
            thread.join(20)
        for end in (self.server, *self.open):
            end.close()


def end_of(end: socket.socket) -> None:
    """End a connection that another thread may be reading from."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxied(dashboard: str) -> Iterator[tuple[str, Line]]:
    """The address of a dashboard by way of a line that one can lose, and the line."""
    host, _, port = dashboard.removeprefix("http://").partition(":")
    line = Line(host, int(port))
    try:
        yield f"http://127.0.0.1:{line.server.getsockname()[1]}", line
    finally:
        line.close()
