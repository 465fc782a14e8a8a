"""Ray: a worker group of Ray actors, one a rank. An actor is a thin shell around the Ray-free Worker.

- The devices of one plan node are an island: its ranks, in order, are on one Ray node. Several islands may share one.
- In a Ray job, and wherever RAY_ADDRESS says so, ranks run in that cluster; otherwise in a Ray of this machine alone.
- Ray starts the actors, carries results and notices deaths. It is not in the data path: a call runs many steps.
- The driver holds the rendezvous store, so that nothing outlives it: actors are its children, and end with it.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from ray._private import ray_constants as constants
from ray._private import services
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spindle.errors import LostRankError, RunError, SpindleError
from spindle.ray_nodes import RayNodes
from spindle.runtime.comms.pulse import Heart, Lookout, Pulse, StoreSigns
from spindle.runtime.comms.transport import ProcessTransport, Transport, join_store, serve_store
from spindle.runtime.launch.ray_room import Room, counts_of, free_of, gpus_of_rank
from spindle.runtime.launch.shipping import carrying
from spindle.runtime.launch.worker_group import called, is_lost_peer, looks_s, made_worker, packed_spec, too_late
from spindle.runtime.startup import Phases
from spindle.runtime.worker import Worker

CONNECT_S = 10.0
START_S = 300.0  # for actors to start; those of a rank spec that names packages install them first
GRACE_S = 5.0  # for the failure that caused the first one seen, or that came of it, to arrive too


@dataclass(frozen=True, order=True)
class Place:
    """Node, address, GPU and process of an actor."""

    node: str
    address: str
    gpu: str
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.address} ({self.node[:8]})"


@dataclass(frozen=True)
class Joining:
    """How ranks find each other. `paths`: where the driver finds modules that rank specs may name. `have_gpus`: Ray
    gave each a GPU, the only one that it sees.
    """

    paths: list[str]
    num_ranks: int
    host: str
    port: int
    timeout_s: float
    have_gpus: bool


class _Rank:
    """What runs in an actor."""

    def __init__(self) -> None:
        self.worker: Any = None
        self.pulse = Pulse()

    def place(self) -> "Place":
        """Where this actor is."""
        gpu = ",".join(f"{number:>3}" for number in ray.get_gpu_ids())  # 9 before 10
        return Place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), gpu, os.getpid())

    def start(self, payload: bytes, rank: int, place: tuple[int, int], joining: "Joining") -> None:
        """Join the others and make the worker. `place`: this rank's number on its machine, and how many are there."""
        sys.path += [path for path in joining.paths if path not in sys.path]
        phases = Phases()
        with phases("import and load"):  # before joining, since ranks import at different speeds
            make, spec = cloudpickle.loads(payload)
        with phases("join"):
            store, own = (join_store(joining.host, joining.port, joining.timeout_s) for _ in range(2))
            Heart(self.pulse, store=own, key=f"pulse/{rank}")
            transport = ProcessTransport(
                store,
                rank,
                joining.num_ranks,
                timeout_s=joining.timeout_s,
                place=place,
                sees_own_gpu=joining.have_gpus,
                pulse=self.pulse,
            )
        self.worker = made_worker(make, spec, transport, phases)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of the worker; on failure leave the group, which releases peers that wait."""
        try:
            return called(self.worker, self.pulse, method, args, kwargs)
        except Exception:
            self.worker.close()
            raise


class RayWorkers:
    """Workers as Ray actors."""

    leads = alone = True
    places: list[Place]
    """Where each rank is."""

    def __init__(
        self,
        specs: Sequence[Any],
        *,
        devices_per_node: int | None = None,
        apart: bool = False,
        timeout_s: float = 60.0,
        worker: Callable[[Any, Transport], Any] = Worker,
        nodes: RayNodes | None = None,
        device: str | None = None,
    ) -> None:
        """Join the cluster, or start a Ray, unless this process did; then start an actor for each rank spec, in
        islands, and have `worker` make of each rank spec what serves calls. `apart`, `nodes`, `device`: see Room.

        Raises NoRoomError when the cluster has no room for an island within `timeout_s`, or what `nodes` says instead.
        """
        self._owns_ray = not ray.is_initialized()
        joined = not self._owns_ray or join_cluster()
        if not joined:
            start_local_ray(len(specs))
        nodes = nodes or RayNodes()
        waits_for_gpus = nodes.wait_s is not None and device not in (None, "cpu")
        num_gpus = gpus_of_rank(len(specs), joined=joined, waits_for_gpus=waits_for_gpus)
        self._actors: list[Any] = []
        self._group: Any = None
        self.places = []
        self._timeout_s = timeout_s
        self._lookout = Lookout(lambda: [], timeout_s)
        sizes = islands_of(len(specs), devices_per_node)
        try:
            self._group = Room(sizes, num_gpus, nodes, device, apart).reserved(timeout_s)
            for island, size in enumerate(sizes):
                self._actors += [self._actor(island, num_gpus) for _ in range(size)]
            self.places = self._in_order(sizes)
            address = _address()
            self._store = serve_store(address)
            signs = StoreSigns(join_store(address, self._store.port, timeout_s), len(specs))
            self._lookout = Lookout(signs, timeout_s, moves=worker is Worker)
            here = [os.path.abspath(path) for path in sys.path]
            joining = Joining(here, len(specs), address, self._store.port, timeout_s, bool(num_gpus))
            numbers = numbered([place.address for place in self.places])
            sent = {id(spec): ray.put(packed_spec(worker, *carrying(spec))) for spec in specs}
            self._gather(
                [
                    actor.start.remote(sent[id(spec)], rank, number, joining)
                    for rank, (actor, spec, number) in enumerate(zip(self._actors, specs, numbers, strict=True))
                ],
                START_S + timeout_s,
            )
        except BaseException:
            self.close()
            raise

    def _actor(self, island: int, num_gpus: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=island)
        options = {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 0, "scheduling_strategy": strategy}
        return ray.remote(**options)(_Rank).remote()

    def _in_order(self, sizes: Sequence[int]) -> list[Place]:
        """Sort the actors of each island by their GPUs; the places of all."""
        island = [index for index, size in enumerate(sizes) for _ in range(size)]
        places: list[Place] = self._gather([actor.place.remote() for actor in self._actors], START_S)
        order = sorted(range(len(places)), key=lambda index: (island[index], places[index], index))
        self._actors = [self._actors[index] for index in order]
        return [places[index] for index in order]

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See WorkerGroup."""
        return self._gather([actor.call.remote(method, args, kwargs) for actor in self._actors], patience_s)

    def _gather(self, references: Sequence[Any], patience_s: float | None = None) -> list[Any]:
        rank_of = {reference: rank for rank, reference in enumerate(references)}
        waiting = list(references)
        deadline_s = None if patience_s is None else time.monotonic() + patience_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=looks_s(self._timeout_s, deadline_s))
            if not done:
                late = too_late(self._lookout, [rank_of[r] for r in waiting], deadline_s, patience_s)
                if late is not None:
                    self._kill()
                    raise late
            elif _failure(done[0]) is not None:
                self._fail(rank_of, done[0], waiting)
        results: list[Any] = ray.get(list(references))
        return results

    def _fail(self, rank_of: Mapping[Any, int], first: Any, waiting: Sequence[Any]) -> None:
        """Raise the cause of a failure, once errors before and after it have had time to arrive."""
        late, silent = ray.wait(list(waiting), num_returns=len(waiting), timeout=GRACE_S) if waiting else ([], [])
        found = {rank_of[r]: error for r in (first, *late) if (error := _failure(r)) is not None}
        cause = self._first_cause(found, [rank_of[reference] for reference in silent])
        self._kill()
        raise cause from None

    def _first_cause(self, found: Mapping[int, Exception], silent: Sequence[int]) -> Exception:
        """Peers of a failed rank fail a moment later; the one to report is the one that did not just lose a peer, or a
        rank that has not answered, for which they waited.
        """
        dead = [rank for rank, error in found.items() if isinstance(error, ray.exceptions.RayActorError)]
        raised = {rank: _translated(error) for rank, error in found.items() if rank not in dead}
        own = [error for error in raised.values() if not is_lost_peer(error)]
        if own:
            return own[0]
        if dead:
            return self._lost(dead, found[dead[0]])
        waited, error = next(iter(raised.items()))
        return self._lookout.blamed(silent, waited) or error

    def _lost(self, dead: Sequence[int], error: Exception) -> LostRankError:
        if not self.places:
            return LostRankError(f"a worker died while it started: {_first_line(error)}")
        place = self.places[dead[0]]
        here = [rank for rank, other in enumerate(self.places) if other.node == place.node]
        whole = len(here) > 1 and set(here) <= set(dead)
        what = f"all ranks on node {place} died, {here}" if whole else f"rank {dead[0]} on node {place} died"
        last = self._lookout.last_of(dead[0], "; its last sign was in ")
        return LostRankError.at(dead[0], f"{what}: {_first_line(error)} (out of memory kills too){last}. The run ended")

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        here = ray.get_runtime_context().get_node_id() if self.places else ""
        for place in self.places:
            if place.node == here:  # Ray asks an actor to end, which one that was stopped does not hear
                with contextlib.suppress(OSError):
                    if _Rank.__name__ in Path(f"/proc/{place.pid}/cmdline").read_text():
                        os.kill(place.pid, signal.SIGKILL)

    def close(self) -> None:
        """See WorkerGroup."""
        self._kill()
        if self._group is not None:
            remove_placement_group(self._group)
        if self._owns_ray:
            ray.shutdown()


def numbered(names: Sequence[str]) -> list[tuple[int, int]]:
    """The number of each among those of its name, and how many these are.

    >>> numbered(["a", "b", "a"])
    [(0, 2), (0, 1), (1, 2)]
    """
    return [(names[:index].count(name), names.count(name)) for index, name in enumerate(names)]


def islands_of(num_ranks: int, devices_per_node: int | None) -> list[int]:
    """Ranks of each plan node, in order; the last one may have fewer. One island when nothing is known of nodes."""
    size = devices_per_node or num_ranks
    return [min(size, num_ranks - first) for first in range(0, num_ranks, size)]


def join_cluster() -> bool:
    """Connect to the cluster that RAY_ADDRESS names, as it does in every Ray job; whether there is one."""
    wanted = os.environ.get("RAY_ADDRESS", "local")
    if wanted in ("", "local"):
        return False
    try:
        address = services.canonicalize_bootstrap_address(wanted)
        if address is None or not _listens(address):  # Ray itself would try without an end
            if not _listens(wanted):
                raise ConnectionError("nothing listens there")
            _stay_on_loopback()  # Ray takes 127.0.0.1 for this machine's outer address
        with _sigterm_as_it_was():
            ray.init(address=wanted, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"RAY_ADDRESS is {wanted!r}, where no Ray cluster answers ({_first_line(error)}); give HOST:6379 of its "
            "head node, or unset it to train on this machine alone"
        ) from error
    return True


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def start_local_ray(num_workers: int) -> None:
    """A Ray of this machine alone, listening on loopback, without dashboard or usage reports."""
    _stay_on_loopback()
    with _sigterm_as_it_was():
        ray.init(
            address="local",  # by default Ray joins a cluster that somebody started on this machine
            num_cpus=num_workers,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            logging_level="error",
        )


@contextlib.contextmanager
def _sigterm_as_it_was() -> Iterator[None]:
    """Ray ends a driver that gets SIGTERM by sys.exit(15), which would pass for an exit of the workload's own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def devices_of_cluster() -> str:
    """The cluster that this process runs in, as planners take it (`4x8`).

    Nodes without GPUs do not count where others have some; of uneven nodes each counts as the smallest.
    """
    resource, counts = _devices_of_nodes()
    return f"{len(counts)}x{counts[0]}" + (":cpu" if resource == "CPU" else "")


def node_sizes() -> list[int]:
    """Devices of each node of the cluster that this process runs in, the smallest first; none where it runs in none."""
    return _devices_of_nodes()[1] if ray.is_initialized() or join_cluster() else []


def _devices_of_nodes() -> tuple[str, list[int]]:
    """What ranks of the cluster compute on, and what each node has of it."""
    if not ray.is_initialized():
        join_cluster()
    resource = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
    counts = counts_of(resource)
    if not counts:
        raise RunError(
            "the Ray cluster has neither a GPU nor a CPU for a rank; add a node with --num-cpus or --num-gpus"
        )
    return resource, counts


def free_devices() -> list[int]:
    """Devices that each node of the cluster that this process runs in has free, without nodes that have none; none
    where it runs in none.
    """
    return free_of(_devices_of_nodes()[0]) if ray.is_initialized() or join_cluster() else []


def _stay_on_loopback() -> None:
    """Ray's own switch for machines that are no cluster; by default it listens on every interface.

    Child processes read the variable; this process has read it already when it imported ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.setdefault(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0") == "0":
        constants.ENABLE_RAY_CLUSTER = False


def _address() -> str:
    """Where workers reach the driver: loopback when all are on one machine."""
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    here: str = ray.util.get_node_ip_address()
    return "127.0.0.1" if nodes <= {here, "127.0.0.1"} else here


def _failure(reference: Any) -> Exception | None:
    """Why a call that has ended failed; None when it did not."""
    try:
        ray.get(reference)
    except Exception as error:
        return error
    return None


def _translated(error: Exception) -> Exception:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, SpindleError) else RunError(str(error))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
