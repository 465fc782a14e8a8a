"""Traffic: device sets and bytes in, seconds out. What plans are charged for moving activations between slices.

- A slice holds its devices while it receives its input; the sender is free. Forward carries an activation, backward its
  gradient: both directions together cost twice one transfer.
- Each of the smaller set's devices sends or takes its share at the same time: latency + bytes / (min(n, n') * rate), at
  the rate inside a node when both sets stand in one, else at the rate between nodes (alpha-beta: Hockney 1994), of
  which a node's ports carry no more than they can.
  Nothing moves when the sets are equal. Rows that stay on their device are charged all the same: an upper estimate.
"""

from spindle.values.cluster import Cluster

Devices = tuple[int, ...]


def transfer_s(cluster: Cluster, num_bytes: float, source: Devices, target: Devices) -> float:
    """Seconds to move `num_bytes` in one direction between two device sets."""
    if not num_bytes or source == target:
        return 0.0
    nodes = {cluster.node_of(d) for d in (min(*source, *target), max(*source, *target))}
    link = cluster.intra_node if len(nodes) == 1 else cluster.inter_node
    width = min(len(source), len(target))
    return link.transfer_s(num_bytes / width, senders=min(width, cluster.devices_per_node))
