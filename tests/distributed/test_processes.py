"""The same worker in spawned processes over gloo, and under torchrun."""

import multiprocessing.util
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spindle
from spindle.runtime.comms.host import SocketThreads, keep_freed_memory
from spindle.runtime.comms.transport import ProcessTransport, Transport
from spindle.runtime.launch.processes import ProcessWorkers
from tests.distributed.conftest import ROOT, heeding_ctrl_c
from tests.random_plans import by_task, random_plan, widest_plan
from tests.tiny_workloads import encoder_decoder, two_towers

pytestmark = pytest.mark.gloo

SCRIPT = """
import os, sys, torch, spindle
from tests.tiny_workloads import two_towers
report = spindle.verify(two_towers(torch.float64), num_workers=int(os.environ["WORLD_SIZE"]), launcher="auto")
# in one write, so that ranks cannot mix their lines
sys.stdout.write(f"VERDICT {report.ok} {report.max_abs_error < 1e-10} {'ray' in sys.modules}\\n")
"""


@pytest.mark.parametrize(("num_ranks", "seed"), [(2, 5), (3, 6)])
def test_processes_agree_with_one(num_ranks: int, seed: int) -> None:
    """Random plans over gloo give the gradients of one process to 1e-10."""
    workload = two_towers(torch.float64)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    report = spindle.verify(workload, plan, launcher="processes")
    assert report.ok, str(report)


def test_processes_agree_with_one_in_turns() -> None:
    """Each task forward and backward before the next, over gloo."""
    workload = two_towers(torch.float64)
    metagraph = spindle.make_metagraph(workload)
    report = spindle.verify(workload, by_task(widest_plan(metagraph, 2), metagraph), launcher="processes")
    assert report.ok, str(report)


class Linked:
    """A worker that sends messages over links, as ranks with GPUs do, though here gloo carries them."""

    def __init__(self, spec: object, transport: Transport) -> None:
        del spec
        assert isinstance(transport, ProcessTransport)
        self.transport = transport
        transport._gloo = False  # else links are not made
        transport.make_groups([], [(0, 1), (1, 0)])
        transport._gloo = True

    def exchange(self) -> list[float]:
        """What arrives: a receive that was posted first comes last, and holds up nothing."""
        rank, peer, start = self.transport.rank, 1 - self.transport.rank, self.transport._start_on_links
        first, second, third = (torch.zeros(2) for _ in range(3))
        one, two = torch.ones(2), torch.full((2,), 2.0)
        _, arrived = start([], [(peer, first), (peer, second)])
        if rank == 0:
            departed, _ = start([(peer, one), (peer, two)], [])
            departed()
            arrived()
            third += first + second
            start([(peer, third)], [])[0]()
        else:
            arrived()
            departed, arrived = start([(peer, one.add_(first).add_(1)), (peer, two.add_(second))], [(peer, third)])
            departed()
            arrived()
        return [float(each[0]) for each in (first, second, third)]


def test_messages_over_links() -> None:
    """They arrive in their order, each direction by itself."""
    workers = ProcessWorkers([None, None], timeout_s=30.0, worker=Linked)
    try:
        assert workers.call("exchange") == [[3.0, 4.0, 7.0], [1.0, 2.0, 7.0]]
    finally:
        workers.close()


class Sharing:
    """A worker that makes a folder as workers of its loader do, for the sockets through which they send tensors."""

    def __init__(self, spec: object, transport: Transport) -> None:
        del spec, transport

    def folder(self) -> str:
        return multiprocessing.util.get_temp_dir()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
def test_a_group_that_is_closed_holds_nothing_open() -> None:
    """Though an error, which a run keeps of each failure, may hold it: no file, no thread of a store, no socket."""

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    ProcessWorkers([None], worker=Sharing).close()  # the server that forks ranks stays
    before, closed = held(), []
    for _ in range(2):
        workers = ProcessWorkers([None], worker=Sharing)
        (folder,) = workers.call("folder")
        assert os.path.isdir(folder)
        workers.close()
        assert not os.path.exists(folder)
        closed.append(workers)
    assert held() == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to cores")
@pytest.mark.parametrize("num_ranks", [2, 2 * (os.cpu_count() or 1)])
def test_ranks_have_cores_of_their_own(num_ranks: int) -> None:
    """Where there is a core for each, no two ranks share one; where there are fewer, all share all."""

    class Where:
        def __init__(self, spec: object, transport: Transport) -> None:
            del spec, transport

        def cores(self) -> set[int]:
            return os.sched_getaffinity(0)

    cores = os.sched_getaffinity(0)
    workers = ProcessWorkers([None] * num_ranks, worker=Where)
    try:
        found = workers.call("cores")
    finally:
        workers.close()
    if num_ranks > len(cores):
        assert found == [cores] * num_ranks
    else:
        assert not set.intersection(*found)
        assert {len(own) for own in found} == {len(cores) // num_ranks}


@pytest.mark.skipif(not keep_freed_memory(), reason="this system's malloc cannot be told")
def test_a_step_takes_no_pages_that_another_gave_back() -> None:
    """64 MiB of tensors made for the third time need hardly a new page of their 16384."""

    class Faulting:
        def __init__(self, spec: object, transport: Transport) -> None:
            del spec, transport

        def faults(self) -> int:
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
                made = [torch.ones(2**size) for size in (22, 22, 21, 21, 20, 20, 20, 20)]
                del made
            return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    workers = ProcessWorkers([None], worker=Faulting)
    try:
        assert workers.call("faults")[0] < 1638
    finally:
        workers.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policies")
def test_socket_threads_leave_the_core_to_a_rank_that_posts() -> None:
    """Each group's threads are found; they are held back inside, and only there."""

    class Watching:
        def __init__(self, spec: object, transport: Transport) -> None:
            del spec
            self.transport = transport

        def policies(self) -> list[set[int]]:
            tasks = list(Path("/proc/self/task").iterdir())
            threads = [int(task.name) for task in tasks if (task / "comm").read_text().strip() == "gloo_tcp_loop"]
            held, found = SocketThreads(), []
            held.find()
            found.append({os.sched_getscheduler(thread) for thread in threads})
            with held:
                found.append({os.sched_getscheduler(thread) for thread in threads})
            self.transport.start([(1 - self.transport.rank, torch.ones(1))], [])
            found.append({os.sched_getscheduler(thread) for thread in threads})
            return found

    workers = ProcessWorkers([None, None], worker=Watching)
    try:
        assert workers.call("policies") == [[{os.SCHED_OTHER}, {os.SCHED_BATCH}, {os.SCHED_OTHER}]] * 2
    finally:
        workers.close()


def test_rows_in_the_second_dimension_travel() -> None:
    """Tensors whose samples lie in dimension 1 are cut, sent and joined there."""
    workload = encoder_decoder(torch.float64)
    report = spindle.verify(workload, widest_plan(spindle.make_metagraph(workload), 2), launcher="processes")
    assert report.ok, str(report)


def test_training_leaves_its_weights_in_the_users_modules() -> None:
    """After training the user's own modules hold what plain training gives them."""
    workload, alone = two_towers(torch.float64), two_towers(torch.float64)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    result = spindle.train(workload, plan, optimizer=sgd, steps=7, launcher="processes")
    stepper = sgd([p for _, p in alone.named_parameters()])
    for step in range(7):
        stepper.zero_grad()
        for task in alone.tasks.values():
            torch.autograd.backward(task.function(list(task.batches())[step % 3]) * task.weight)
        stepper.step()
    for (name, ours), (_, theirs) in zip(workload.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)
    assert len(result.losses) == 7
    assert set(result.losses[0]) == {"match", "fit"}
    assert {span.rank for span in result.trace} == {0, 1}


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def test_torchrun_launches_it_too(tmp_path: Path) -> None:
    """Every rank runs one script; no Ray is imported."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=root, check=False)
    assert done.stdout.count("VERDICT True True False") == 2, done.stdout + done.stderr


WAITS = """
import os
import threading

from spindle.runtime.launch.processes import ProcessWorkers

class Waits:
    def __init__(self, spec, transport):
        self.transport = transport
    def wait(self):
        os.write(1, b"waits\\n")  # at once, so that ranks cannot mix their lines
        threading.Event().wait(60.0)
    def close(self):
        self.transport.close()

workers = ProcessWorkers([None, None], worker=Waits)
try:
    workers.call("wait")
except KeyboardInterrupt:
    print("heard", flush=True)
finally:
    workers.close()
"""


def test_ctrl_c_is_heard_by_the_driver_alone() -> None:
    """A terminal sends it to all processes; ranks that are at work print no traceback, and end with the driver."""
    with heeding_ctrl_c():
        driver = subprocess.Popen(
            [sys.executable, "-c", WAITS],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    assert driver.stdout is not None
    assert [driver.stdout.readline() for _ in range(2)] == ["waits\n"] * 2
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=30.0)
    assert out == "heard\n"
    assert "Traceback" not in err
    assert driver.returncode == 0


def test_running_statistics_outside_of_layers_come_back() -> None:
    """Batch norm in a stem: ranks update their own buffers, not those that recordings read; they are one process's."""
    ours, theirs = encoder_decoder(torch.float64), encoder_decoder(torch.float64)
    plan = random_plan(spindle.make_metagraph(ours), 2, 3)
    spindle.train(ours, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), steps=3, launcher="processes")
    first, second = theirs.tasks["seq"].batches()
    for batch in (first, second, first):
        theirs.tasks["seq"].function(batch)
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert int(found["stem.1.num_batches_tracked"]) == 3
    assert bool(found["stem.1.running_mean"].any())
    torch.testing.assert_close(found, expected)
