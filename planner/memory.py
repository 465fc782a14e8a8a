"""Memory: slices in, bytes on each device out.

- A device keeps what it runs: the layers of all its slices, weights, optimiser state and the activations that wait for
  backward, until the step ends. So the peak is the sum, and the order of slices does not matter.
- `memory_bytes` of a MetaOp is for its whole chain; a slice takes its layers' share of it.
- Activations that backward computes again exist for one layer at a time; a search counts them for each MetaOp.
- Layers that share parameters stand in memory once (paper, section 3.5): each further MetaOp on the device saves
  `saved_bytes` a layer.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable

from spindle.metagraph import MetaGraph, MetaOp
from spindle.plan import Slice

STATE_COPIES = 2.0
"""Bytes of a layer's state in units of layer_param_bytes where layer_state_bytes is not given: weight and gradient,
which every optimiser needs, so that what sharing saves is rather under-estimated."""


def layer_memory_bytes(metaop: MetaOp, count: int) -> float:
    """Bytes that one layer takes on each of `count` devices; those of the next smaller count given when it has none."""
    if not metaop.memory_bytes:
        return 0.0
    counts = [n for n, _ in metaop.memory_bytes]
    at = max(0, bisect_right(counts, count) - 1)
    return metaop.memory_bytes[at][1] / metaop.layers


def saved_bytes(metagraph: MetaGraph) -> dict[str, float]:
    """Bytes that a further MetaOp with the same parameters saves on a device, for each layer, by parameter set.

    The least over all its MetaOps and counts, so that it never takes off more than any of them has put there.
    """
    saved: dict[str, float] = {}
    for metaop in metagraph:
        if metaop.parameters:
            own = min((b / metaop.layers for _, b in metaop.memory_bytes), default=0.0)
            least = min(own, metaop.layer_state_bytes or STATE_COPIES * metaop.layer_param_bytes)
            saved[metaop.parameters] = min(least, saved.get(metaop.parameters, least))
    return saved


def peak_bytes(metagraph: MetaGraph, slices: Iterable[Slice], num_devices: int) -> tuple[float, ...]:
    """Predicted peak bytes of each device."""
    saved = saved_bytes(metagraph)
    peak = [0.0] * num_devices
    again = [0.0] * num_devices
    held: list[dict[str, int]] = [defaultdict(int) for _ in range(num_devices)]
    for s in slices:
        metaop = metagraph[s.metaop]
        own = layer_memory_bytes(metaop, len(s.devices)) * s.num_layers
        recomputed = metaop.recomputed_bytes / len(s.devices)
        own -= recomputed * s.num_layers / metaop.layers  # is in it once for the whole chain
        bits = ((1 << s.num_layers) - 1) << s.first_layer
        for device in s.devices:
            peak[device] += own
            again[device] = max(again[device], recomputed)
            if metaop.parameters:
                twice = (held[device][metaop.parameters] & bits).bit_count()
                peak[device] -= twice * saved[metaop.parameters]
                held[device][metaop.parameters] |= bits
    return tuple(sum(parts) for parts in zip(peak, again, strict=True))
