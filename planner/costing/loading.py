"""Loading: slices in; which devices load which batch before which slice, and how long a step waits for loaders, out.

- A rank loads a task's batch once a step, before its first slice of a MetaOp that reads fields of it (`MetaOp.load_s`),
  whole, whatever its share of the samples.
- The loader's thread shares a CPU rank's core, so its time is the step's. Beside a GPU it costs nothing, but where a
  rank's loaders take longer than the step, each step waits for them.
"""

from collections import defaultdict
from collections.abc import Sequence

from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Slice

Loads = list[dict[int, float]]
"""For each slice the devices that load a batch for it, and seconds of it."""


def loads_of(metagraph: MetaGraph, slices: Sequence[Slice]) -> Loads:
    """What each of `slices`, in order of start, makes its devices load."""
    loaded: set[tuple[int, str]] = set()
    found: Loads = []
    for s in slices:
        metaop = metagraph[s.metaop]
        fresh = [d for d in s.devices if (d, metaop.task) not in loaded] if metaop.load_s else []
        loaded.update((device, metaop.task) for device in fresh)
        found.append(dict.fromkeys(fresh, metaop.load_s))
    return found


def in_line(cluster: Cluster | None, loads: Loads) -> Loads:
    """The `loads` that take their time from the step."""
    return loads if cluster is not None and cluster.device.is_cpu else [{} for _ in loads]


def waits_by_device(cluster: Cluster, loads: Loads, step_s: float) -> dict[int, float]:
    """Seconds that devices wait for loaders that run beside a step of `step_s`, and are slower than it."""
    if cluster.device.is_cpu:
        return {}
    total_s: dict[int, float] = defaultdict(float)
    for by_device in loads:
        for device, seconds in by_device.items():
            total_s[device] += seconds
    return {device: seconds - step_s for device, seconds in sorted(total_s.items()) if seconds > step_s}
