"""Room: the placement group of a run's ranks in a Ray cluster, which may be long in coming, or of other devices.

- An autoscaler starts nodes for placement groups that wait, so a run that waits for nodes asks for what it wants at
  once, and says each minute what it waits for.
- Ray knows GPUs by names of its own: where it has some of the plan's type, ranks are put there; where it has none, a
  warning says so.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group, remove_placement_group

from spindle.errors import NoRoomError, SpindleWarning
from spindle.ray_nodes import RayNodes

SAY_S = 60.0  # between two sentences of a run that waits

RAY_TYPES = {
    "v100-32g": "V100",
    "a100-40g": "A100",
    "a100-80g": "A100",
    "a800-80g": "A800",
    "h100-80g": "H100",
    "h200-141g": "H200",
    "b200-192g": "B200",
    "mi250x-128g": "AMD-Instinct-MI250X-MI250",
}
"""What Ray calls the GPUs of a built-in device type."""

_TYPE = "accelerator_type:"  # of the resource that Ray gives to nodes with GPUs


@dataclass(frozen=True)
class Room:
    """Room for islands of ranks. `sizes`: ranks of each island; `num_gpus`: of each rank, 1 or 0. `device`: the name of
    the plan's device type, where it is known. `apart`: no two islands on one Ray node.
    """

    sizes: Sequence[int]
    num_gpus: int
    nodes: RayNodes = field(default_factory=RayNodes)
    device: str | None = None
    apart: bool = False

    @property
    def accelerator_type(self) -> str | None:
        """Ray's name of the GPUs that ranks want; None where any will do."""
        own = RAY_TYPES.get(self.device or "")
        if self.nodes.accelerator_type or not self.num_gpus:
            return self.nodes.accelerator_type
        return own if self.nodes.wait_s is not None or own in types_of_gpus() else None

    def reserved(self, timeout_s: float) -> Any:
        """The placement group. Raises NoRoomError when the cluster has no room for it within `timeout_s`, or within
        `wait_s` of the nodes.
        """
        self._warn_of_other_gpus()
        kind = self.accelerator_type
        bundles = [
            {"CPU": float(size)}
            | ({"GPU": float(size)} if self.num_gpus else {})
            | ({f"{_TYPE}{kind}": 0.001} if kind else {})
            for size in self.sizes
        ]
        labels = {"bundle_label_selector": [dict(self.nodes.label_selector)] * len(bundles)}
        group = placement_group(
            bundles,
            strategy="STRICT_SPREAD" if self.apart else "PACK",
            **(labels if self.nodes.label_selector else {}),
        )
        try:
            self._wait(group, timeout_s if self.nodes.wait_s is None else self.nodes.wait_s)
        except BaseException:
            remove_placement_group(group)
            raise
        return group

    def _wait(self, group: Any, wait_s: float) -> None:
        began_s = time.monotonic()
        while not group.wait(max(0.0, min(SAY_S, began_s + wait_s - time.monotonic()))):
            waited_s = time.monotonic() - began_s
            if waited_s >= wait_s:
                raise self._none(wait_s)
            warnings.warn(
                f"the Ray cluster has had no room for {self._islands()} for {waited_s:.0f} s, and the run waits for "
                f"{wait_s:g} s at most: {self._reasons()}",
                SpindleWarning,
                stacklevel=4,
            )

    def _warn_of_other_gpus(self) -> None:
        """Where ranks come to GPUs of another type than the plan's."""
        own, types = RAY_TYPES.get(self.device or ""), types_of_gpus()
        chosen = [self.nodes.accelerator_type] if self.nodes.accelerator_type else types
        if not self.num_gpus or own is None or not chosen or any(_is(kind, own) for kind in chosen):
            return
        if self.nodes.accelerator_type is None and self.nodes.wait_s is not None:
            return  # nodes of the plan's type are to come
        known = next((f":{name}" for name, kind in RAY_TYPES.items() if kind == chosen[0]), "")
        warnings.warn(
            f"the plan is for {self.device}, and the GPUs of the Ray cluster for it are {', '.join(chosen)}: what is "
            f"predicted of its time and memory does not hold; plan with --cluster "
            f"{len(self.sizes)}x{self.sizes[0]}{known}",
            SpindleWarning,
            stacklevel=4,
        )

    def _islands(self) -> str:
        count = f"{len(self.sizes)} islands" if len(self.sizes) > 1 else "an island"
        return f"{count} of {self.sizes[0]} ranks"

    def _reasons(self) -> str:
        """What an island needs and what nodes have, in words."""
        resource, kind = "GPU" if self.num_gpus else "CPU", self.accelerator_type
        labels = ", ".join(f"{key}={value}" for key, value in self.nodes.label_selector.items())
        wanted = (
            f"an island needs a {resource}{f' of type {kind}' if kind else ''} for each of its ranks on one node"
            f"{f' with the labels {labels}' if labels else ''}"
        )
        counts = ", ".join(map(str, counts_of(resource))) or "none"
        types = f" ({', '.join(types_of_gpus())})" if self.num_gpus and types_of_gpus() else ""
        return f"{wanted}; its nodes have {counts}{types}, of which {sum(free_of(resource))} are free"

    def _none(self, waited_s: float) -> NoRoomError:
        """What to say when islands do not fit: what is wanted, what nodes have, what of it is free."""
        resource = "GPU" if self.num_gpus else "CPU"
        counts = counts_of(resource)
        error = NoRoomError(
            f"the Ray cluster had no room for {self._islands()} within {waited_s:g} s: {self._reasons()}\n"
            f"plan for islands that fit, for instance --cluster {len(counts)}x{max(counts, default=1) or 1}, add nodes "
            "or wait longer for them (--wait-for-nodes 30m), or let the run plan anew for what is free: "
            "Failures(elastic=True), --elastic"
        )
        error.free = tuple(free_of(resource))
        return error


def gpus_of_rank(num_ranks: int, *, joined: bool, waits_for_gpus: bool = False) -> int:
    """A GPU each where there are enough, or will be. In a cluster with too few, waiting for room says so; here the CPU
    will do.
    """
    gpus = ray.cluster_resources().get("GPU", 0)
    return 1 if gpus >= num_ranks or (joined and (gpus or waits_for_gpus)) else 0


def counts_of(resource: str) -> list[int]:
    """What each node has of it, without nodes that have none."""
    counts = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    return sorted(count for count in counts if count)


def free_of(resource: str) -> list[int]:
    """What of it is free on each node that is alive."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    found = available_resources_per_node()
    return sorted(count for node in alive & found.keys() if (count := int(found[node].get(resource, 0))))


def types_of_gpus() -> list[str]:
    """What Ray calls the GPUs of its nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return sorted({name.removeprefix(_TYPE) for node in nodes for name in node if name.startswith(_TYPE)})


def _is(kind: str, own: str) -> bool:
    """Whether GPUs that Ray calls `kind` are of the type `own`: A100-80G are A100."""
    return kind == own or kind.startswith(f"{own}-")
