"""Processes: a worker group of spawned processes on this machine. No Ray needed; what most distributed tests run on.

- Rank specs travel as cloudpickle, so task functions, loaders and optimizer factories may be local functions.
- A child ends when its parent does, however the parent ends; and with a child all that it started ends, such as the
  worker processes of a loader: they are of its process group.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.util import get_temp_dir
from typing import Any

import cloudpickle
from torch._C._distributed_c10d import TCPStore

from spindle.errors import LostRankError, RunError, SpindleError
from spindle.runtime.comms.pulse import SIZE, Heart, Lookout, Pulse
from spindle.runtime.comms.transport import ProcessTransport, Transport, join_store, serve_store
from spindle.runtime.launch.shipping import on_this_machine
from spindle.runtime.launch.worker_group import (
    CAUSE_S,
    called,
    is_lost_peer,
    looks_s,
    made_worker,
    packed_spec,
    too_late,
)
from spindle.runtime.rank_spec import RankSpec
from spindle.runtime.startup import Phases
from spindle.runtime.worker import Worker

HOST = "127.0.0.1"
_MEANING: dict[int, str] = {
    signal.SIGKILL: "killed, as a machine out of memory does",
    signal.SIGBUS: "a file in memory was cut, as by a full disk",
    signal.SIGSEGV: "native code crashed",
    signal.SIGABRT: "native code gave up",
}


class RankProcess(ForkServerProcess):
    """A rank, which leads a process group."""

    def kill(self) -> None:
        """End it and all of its group, which may have outlived it."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; or it has no group yet
                os.killpg(self.pid, signal.SIGKILL)
        super().kill()


class ProcessWorkers:
    """Workers as processes of this machine, over gloo (or NCCL when each can have a GPU)."""

    leads = alone = True

    def __init__(
        self,
        specs: Sequence[Any],
        *,
        timeout_s: float = 60.0,
        worker: Callable[[Any, Transport], Any] = Worker,
        lost_gpus: frozenset[int] = frozenset(),
    ) -> None:
        """Start a process for each rank spec and wait until all are ready; `worker` makes of each rank spec what serves
        calls. `lost_gpus`: numbers of this machine's GPUs that no rank takes.
        """
        store = serve_store(HOST)
        self._store: TCPStore | None = store
        context = multiprocessing.get_context("forkserver")
        # torch._dynamo: the first optimizer of a process imports it, which takes a second
        context.set_forkserver_preload(["torch", "torch._dynamo", "spindle.runtime.launch.processes", *_needed(specs)])
        self._pipes: list[Connection] = []
        self._children: list[RankProcess] = []
        self._timeout_s = timeout_s
        memory = context.RawArray(ctypes.c_ubyte, SIZE * len(specs))  # without a name: nothing of it is left behind
        # ranks are killed in the end, and so cannot remove the sockets through which workers of loaders send tensors
        self._sockets = tempfile.mkdtemp(prefix="", dir=get_temp_dir())
        self._pulses = [Pulse(memory, SIZE * rank) for rank in range(len(specs))]
        signs = [pulse.sign for pulse in self._pulses]
        self._lookout = Lookout(lambda: [sign() for sign in signs], timeout_s, moves=worker is Worker)
        with on_this_machine(specs) as light:
            try:
                for rank, (spec, left) in enumerate(light):
                    ours, theirs = context.Pipe()
                    place = rank, len(specs), store.port
                    payload = packed_spec(worker, spec, left)
                    arguments = (theirs, payload, place, timeout_s, _start_method(), memory, lost_gpus, self._sockets)
                    child = RankProcess(target=_child, args=arguments, daemon=True, name=f"spindle-rank{rank}")
                    with _main_hidden():
                        child.start()
                    theirs.close()
                    self._pipes.append(ours)
                    self._children.append(child)
            except BaseException:
                self.close()
                raise
            self._results(timeout_s + 60.0)

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See WorkerGroup."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a dead child is noticed below
                pipe.send_bytes(cloudpickle.dumps((method, args, kwargs)))
        return self._results(patience_s)

    def _results(self, timeout_s: float | None) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(results) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(waiting), looks_s(self._timeout_s, deadline))
            if not ready:
                late = too_late(self._lookout, waiting.values(), deadline, timeout_s)
                if late is not None:
                    self.close()
                    raise late
            for pipe in ready:
                assert isinstance(pipe, Connection)
                results[waiting[pipe]] = self._result(waiting[pipe], pipe, results)
        return [results[rank] for rank in range(len(self._pipes))]

    def _result(self, rank: int, pipe: Connection, answered: Collection[int]) -> Any:
        try:
            ok, value = cloudpickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            error: Exception = self._death(rank)
            self.close()
            raise error from None
        if ok:
            return value
        error = self._first_cause(rank, value, answered)
        self.close()
        raise error

    def _death(self, rank: int) -> LostRankError:
        child = self._children[rank]
        child.join(5.0)
        place, code = self._lookout.last_of(rank, " in "), child.exitcode
        why = f": {_MEANING[-code]}" if code is not None and -code in _MEANING else ""
        return LostRankError.at(rank, f"rank {rank} died (exit code {code}){place}{why}. The run ended")

    def _first_cause(self, first: int, error: Exception, answered: Collection[int]) -> Exception:
        """Of failures that came in together, one that is not just a lost peer: a rank that raised, or one that died;
        else the rank for which `first` waited. `answered` did what they were called for.
        """
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank != first and rank not in answered}
        deadline = time.monotonic() + CAUSE_S
        while is_lost_peer(error) and waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, value = cloudpickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    return self._death(rank)
                if not ok and not is_lost_peer(value):
                    return value  # type: ignore[no-any-return]
        if not is_lost_peer(error):
            return error
        return self._lookout.blamed(waiting.values(), first) or error

    def close(self) -> None:
        """See WorkerGroup. What is open goes at once, though an error that is kept may hold this group."""
        for child in self._children:
            child.kill()
            child.join(10.0)
            if child.exitcode is not None:
                child.close()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._children, self._store = [], None


def _needed(specs: Sequence[Any]) -> list[str]:
    """Modules that every rank would import by itself: what optimizers import when the first is made, and installed
    packages that define layers. The server of the first worker group of this process imports them once, for all ranks.
    """
    if not specs or not isinstance(specs[0], RankSpec):
        return []
    components = specs[0].recipe.skeleton.components.values()
    names = dict.fromkeys(type(part).__module__ for component in components for part in component.modules())
    files = {name: getattr(sys.modules.get(name), "__file__", None) or "" for name in names}
    installed = [name for name, file in files.items() if "site-packages" in file and not name.startswith("torch.")]
    return ["torch._dynamo"] * (specs[0].optimizer is not None) + installed


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Children would run the user's script again to have its `__main__`; rank specs bring what they need of
    it by value.
    """
    names = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: names.pop(name) for name in ("__file__", "__spec__") if name in names}
    names["__spec__"] = None
    try:
        yield
    finally:
        names.update(hidden)


def _start_method() -> str:
    """How loaders in ranks start their workers: as the user chose, else by a fork where the system's own libraries bear
    it, since a data set that came by value can seldom be pickled.
    """
    usual = "fork" if sys.platform == "linux" else multiprocessing.get_all_start_methods()[0]
    return multiprocessing.get_start_method(allow_none=True) or usual


def _child(
    pipe: Connection,
    payload: bytes,
    place: tuple[int, int, int],
    timeout_s: float,
    start_method: str,
    memory: Any,
    lost_gpus: frozenset[int],
    sockets: str,
) -> None:
    """Serve calls until the pipe closes. Ctrl-C reaches all processes of a terminal; the parent alone heeds it, and is
    sent SIGTERM, which schedulers send to all processes too.

    `place`: the rank, how many there are, and the port of their store. `memory`: of the pulses of all. `sockets`:
    a folder for the ones that multiprocessing makes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pulse = Pulse(memory, SIZE * place[0])
    signal.signal(signal.SIGTERM, lambda *_: pulse.stop())
    Heart(pulse)
    os.setpgid(0, 0)
    _end_with_parent()
    _allow_children(pipe, start_method, sockets)
    rank, num_ranks, port = place
    with _reported(pipe):
        phases = Phases()
        with phases("join"):
            store = join_store(HOST, port, timeout_s)
            transport = ProcessTransport(store, rank, num_ranks, timeout_s=timeout_s, lost_gpus=lost_gpus, pulse=pulse)
        with phases("import and load"):
            make, spec = cloudpickle.loads(payload)
        worker = made_worker(make, spec, transport, phases)
        pipe.send_bytes(cloudpickle.dumps((True, None)))
    while True:
        try:
            method, args, kwargs = cloudpickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            _end()
        try:
            with _reported(pipe, again=True):
                pipe.send_bytes(cloudpickle.dumps((True, called(worker, pulse, method, args, kwargs))))
        except Exception:
            worker.close()  # releases peers that wait for this rank, once it has said why


def _allow_children(pipe: Connection, start_method: str, sockets: str) -> None:
    """Let loaders have worker processes, which a daemon may not. They close the pipe, so that the parent notices it at
    once when this process dies.
    """
    process = multiprocessing.current_process()
    process.daemon = False
    process._config["tempdir"] = sockets  # type: ignore[attr-defined]  # where `get_temp_dir` looks first
    multiprocessing.set_start_method(start_method, force=True)
    os.register_at_fork(after_in_child=pipe.close)


@contextlib.contextmanager
def _reported(pipe: Connection, *, again: bool = False) -> Iterator[None]:
    """While open an error goes to the driver; `again`: and is raised then."""
    try:
        yield
    except Exception as error:
        report = error if isinstance(error, SpindleError) else RunError.of(error)
        report.__cause__ = report.__context__ = None  # its note has it all; causes may not travel
        with contextlib.suppress(OSError):
            pipe.send_bytes(cloudpickle.dumps((False, report)))
        if again:
            raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        _end()

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _end() -> None:
    """End this process and what it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
