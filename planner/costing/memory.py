"""Memory: slices in, bytes on each device out.

- A device keeps what it runs: the layers of all its slices, weights, optimizer state and the activations that wait for
  backward, until the step ends. So the peak is the sum, and the order of slices does not matter.
- Where tasks run in turns, the activations of a turn are gone when the next one begins: of them the largest sum counts.
- `memory_bytes` of a MetaOp is for its whole chain; a slice takes its layers' share of it.
- Activations that backward computes again exist for one layer at a time; a search counts them for each MetaOp.
- Where parameters are sharded, two layers are whole at a time: of the MetaOps on a device those of the largest layers.
- Layers that share parameters stand in memory once (paper, section 3.5): each further MetaOp on the device saves
  `saved_bytes` a layer.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping

from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Slice

STATE_COPIES = 2.0
"""Bytes of a layer's state in units of layer_param_bytes where layer_state_bytes is not given: weight and gradient,
which every optimizer needs, so that what sharing saves is rather under-estimated."""


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


def kept_bytes(metaop: MetaOp, count: int) -> float:
    """Of `layer_memory_bytes` the activations that wait for backward; without what backward computes again."""
    own, again = layer_memory_bytes(metaop, count), metaop.recomputed_bytes / count / metaop.layers
    if metaop.kept_bytes:
        return max(0.0, min(own - again, metaop.kept_bytes / count / metaop.layers))
    return max(0.0, own - again - (metaop.layer_state_bytes or STATE_COPIES * metaop.layer_param_bytes))


def peak_bytes(
    metagraph: MetaGraph, slices: Iterable[Slice], num_devices: int, turn_by_task: Mapping[str, int] | None = None
) -> tuple[float, ...]:
    """Predicted peak bytes of each device. `turn_by_task`: turns in which tasks run; None: all at once."""
    turns = turn_by_task or {}
    saved = saved_bytes(metagraph)
    total = [0.0] * num_devices
    again: list[dict[int, float]] = [defaultdict(float) for _ in range(num_devices)]  # by turn
    kept: list[dict[int, float]] = [defaultdict(float) for _ in range(num_devices)]
    held: list[dict[str, int]] = [defaultdict(int) for _ in range(num_devices)]
    gathered = [0.0] * num_devices
    for s in slices:
        metaop, count = metagraph[s.metaop], len(s.devices)
        turn = turns.get(metaop.task, 0)
        own = layer_memory_bytes(metaop, count) * s.num_layers
        recomputed = metaop.recomputed_bytes / count
        own -= recomputed * s.num_layers / metaop.layers  # is in it once for the whole chain
        bits = ((1 << s.num_layers) - 1) << s.first_layer
        for device in s.devices:
            total[device] += own
            gathered[device] = max(gathered[device], metaop.gathered_bytes)
            again[device][turn] = max(again[device][turn], recomputed)
            kept[device][turn] += kept_bytes(metaop, count) * s.num_layers if turns else 0.0
            if metaop.parameters:
                twice = (held[device][metaop.parameters] & bits).bit_count()
                total[device] -= twice * saved[metaop.parameters]
                held[device][metaop.parameters] |= bits
    return tuple(map(_largest_turn, map(sum, zip(total, gathered, strict=True)), kept, again))


def _largest_turn(total: float, kept: Mapping[int, float], again: Mapping[int, float]) -> float:
    """Of all bytes of a device, without the activations of turns other than its fullest."""
    everything = sum(kept.values())
    return total + max((again[turn] - (everything - own) for turn, own in kept.items()), default=0.0)
