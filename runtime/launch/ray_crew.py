"""Ray: a crew of Ray actors, one a rank. An actor is a thin shell around the Ray-free Worker.

- Ranks are numbered node by node, as the plan numbers its devices; actors of one node stand together.
- Ray starts the actors, carries results and notices deaths. It is not in the data path: a call runs many steps.
- The driver holds the rendezvous store, so that nothing outlives it: actors are its children, and end with it.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import cloudpickle
import ray
from ray._private import ray_constants as constants
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spindle.errors import RunError, SpindleError
from spindle.runtime.launch.crew import is_lost_peer, silent
from spindle.runtime.transport import ProcessTransport, join_store, serve_store
from spindle.runtime.worker import Job, Worker


class _Rank:
    """What runs in an actor."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def place(self) -> tuple[str, str]:
        """Node of this actor, and its address."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def start(
        self, payload: bytes, paths: list[str], num_ranks: int, host: str, port: int, timeout_s: float, has_gpu: bool
    ) -> None:
        """Join the others and make the worker. `paths`: where the driver finds modules that the job may name.

        `has_gpu`: Ray gave this actor a GPU, the only one that it sees.
        """
        sys.path += [path for path in paths if path not in sys.path]
        job: Job = cloudpickle.loads(payload)
        store = join_store(host, port, timeout_s)
        place = (0, 1) if has_gpu else None
        transport = ProcessTransport(store, job.rank, num_ranks, timeout_s=timeout_s, place=place)
        self.worker = Worker(job, transport)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of the worker; on failure leave the group, which releases peers that wait."""
        assert self.worker is not None
        try:
            return getattr(self.worker, method)(*args, **kwargs)
        except Exception:
            self.worker.close()
            raise


class RayCrew:
    """Workers as Ray actors."""

    leads = True

    def __init__(self, jobs: Sequence[Job], *, devices_per_node: int | None = None, timeout_s: float = 60.0) -> None:
        """Start Ray on this machine unless it runs already, then an actor for each job.

        Raises RunError when the cluster has no room for them within `timeout_s`.
        """
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_local_ray(len(jobs))
        num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= len(jobs) else 0
        bundle = {"CPU": 1.0, "GPU": float(num_gpus)} if num_gpus else {"CPU": 1.0}
        self._group = placement_group([bundle] * len(jobs), strategy="PACK")
        if not self._group.wait(timeout_s):
            self.close()
            raise RunError(
                f"the Ray cluster has no room for {len(jobs)} workers of {bundle}: it has "
                f"{ {k: v for k, v in ray.cluster_resources().items() if k in bundle} }; plan for fewer devices"
            )
        actors = [self._actor(index, num_gpus) for index in range(len(jobs))]
        try:
            self._actors = _in_node_order(actors)
            address = _address()
            self._store = serve_store(address)
            here = [os.path.abspath(path) for path in sys.path]
            common = (here, len(jobs), address, self._store.port, timeout_s, bool(num_gpus))
            pairs = zip(self._actors, jobs, strict=True)
            self._gather([actor.start.remote(cloudpickle.dumps(job), *common) for actor, job in pairs])
        except BaseException:
            self._kill(actors)
            self.close()
            raise

    def _actor(self, bundle: int, num_gpus: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        options = {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 0, "scheduling_strategy": strategy}
        return ray.remote(**options)(_Rank).remote()

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See Crew."""
        return self._gather([actor.call.remote(method, args, kwargs) for actor in self._actors], patience_s)

    def _gather(self, references: Sequence[Any], patience_s: float | None = None) -> list[Any]:
        waiting = list(references)
        deadline_s = None if patience_s is None else time.monotonic() + patience_s
        while waiting:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            done, waiting = ray.wait(waiting, timeout=left_s)
            if not done:
                self._kill(self._actors)
                raise silent([rank for rank, reference in enumerate(references) if reference in waiting], patience_s)
            try:
                ray.get(done)
            except Exception as error:
                cause = self._first_cause(error, waiting)
                self._kill(self._actors)
                raise cause from None
        results: list[Any] = ray.get(list(references))
        return results

    def _first_cause(self, error: Exception, waiting: Sequence[Any]) -> Exception:
        """Peers of a failed rank fail a moment later; the one to report is the one that did not just lose a peer."""
        found = [_translated(error)]
        late, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=2.0) if waiting else ([], [])
        for reference in late:
            try:
                ray.get(reference)
            except Exception as other:
                found.append(_translated(other))
        return next((e for e in found if not is_lost_peer(e)), found[0])

    def _kill(self, actors: Sequence[Any]) -> None:
        for actor in actors:
            ray.kill(actor)

    def close(self) -> None:
        """See Crew."""
        self._kill(getattr(self, "_actors", ()))
        remove_placement_group(self._group)
        if self._owns_ray:
            ray.shutdown()


def start_local_ray(num_workers: int) -> None:
    """A Ray of this machine alone, listening on loopback, without dashboard or usage reports."""
    _stay_on_loopback()
    ray.init(
        num_cpus=num_workers,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        logging_level="error",
    )


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


def _in_node_order(actors: Sequence[Any]) -> list[Any]:
    places = ray.get([actor.place.remote() for actor in actors])
    order = sorted(range(len(actors)), key=lambda index: (places[index], index))
    return [actors[index] for index in order]


def _translated(error: Exception) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, SpindleError):
        return cause
    if isinstance(error, ray.exceptions.RayActorError):
        return RunError(f"a worker died: {str(error).splitlines()[0]} (out of memory kills too). The run ended")
    return RunError(str(error))
