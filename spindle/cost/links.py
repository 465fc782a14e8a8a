"""Links: bytes and the devices of a group in, seconds of a collective out.

- A library has several ways to run a collective (`Protocol`); each is alpha + hops + bytes / rate. The fastest one
  for a number of bytes is taken, so that time is piecewise linear in bytes, with a switch where one overtakes the other
  or a size is passed (paper, section 2.2).
- A group that spans nodes runs one ring through all its members. Each level of links carries its part at the same time;
  the slower one sets the rate. k members of a node bring k of the link's rate, or what its ports carry together.
"""

from collections.abc import Sequence
from math import ceil, log2

from spindle.values.cluster import Cluster, Collective, Link, Protocol


def collective_s(operation: Collective, num_bytes: float, cluster: Cluster, per_node: Sequence[int]) -> float:
    """Seconds of one collective of `num_bytes` (the whole buffer) by a group with `per_node` members in each node.

    >>> from spindle.files.clusterfile import parse_cluster
    >>> cluster = parse_cluster("2x8:a100-80g")
    >>> within = collective_s("all_reduce", 1e9, cluster, (8,))
    >>> across = collective_s("all_reduce", 1e9, cluster, (4, 4))
    >>> 0.005 < within < across < 0.05
    True
    """
    members = [count for count in per_node if count]
    total = sum(members)
    if total < 2 or num_bytes <= 0:
        return 0.0
    ring = times_sent(operation, total)
    seconds = []
    if max(members) > 1:
        link, hops = cluster.intra_node, max(members) - 1
        seconds.append(_link_s(link, operation, num_bytes, ring, hops=hops, lanes=1, in_network=len(members) == 1))
    if len(members) > 1:
        lanes = min(members)
        link, share = cluster.inter_node, num_bytes / lanes
        seconds.append(_link_s(link, operation, share, ring, hops=total - 1, lanes=lanes, in_network=False))
    return max(seconds)


def port_s(operation: Collective, num_bytes: float, cluster: Cluster, per_node: Sequence[int]) -> float:
    """Seconds in which the collective takes all that the network ports of its nodes carry; 0: a port for each device.

    Others that go through these ports meanwhile wait that long in all, whichever comes first.
    """
    members = [count for count in per_node if count]
    if len(members) < 2 or cluster.inter_node.node_bytes_per_s is None:
        return 0.0
    return times_sent(operation, sum(members)) * num_bytes / cluster.inter_node.node_bytes_per_s


def times_sent(operation: Collective, members: int) -> float:
    """How often each member of a ring sends the whole buffer: (n - 1) / n, twice for an all-reduce (Patarasuk and Yuan
    2009); once to or from one of them, since the buffer passes each link of the chain.

    >>> times_sent("all_reduce", 4), times_sent("all_gather", 4), times_sent("broadcast", 4)
    (1.5, 0.75, 1.0)
    """
    around = (members - 1) / members
    return {"all_reduce": 2 * around, "reduce": 1.0, "broadcast": 1.0}.get(operation, around)


def _link_s(
    link: Link, operation: Collective, num_bytes: float, ring: float, *, hops: int, lanes: int, in_network: bool
) -> float:
    """Seconds over one level of links with the fastest protocol, of the operation's own where it has any; `lanes`:
    members of a node that send at the same time.

    `in_network`: whether the switch may do an all-reduce; then each member sends the buffer once.
    """
    found = [p for p in link.protocols if p.operation == operation] or [p for p in link.protocols if not p.operation]
    in_network &= operation == "all_reduce"
    usable = [p for p in found if in_network or not p.in_network] or [_plain(link, hops + 1)]
    begin = max((p.from_bytes for p in usable if p.from_bytes <= ring * num_bytes), default=usable[0].from_bytes)
    return min(
        p.latency_s + hops * p.hop_s + (1.0 if p.in_network else ring) * num_bytes / link.rate(p.bytes_per_s, lanes)
        for p in usable
        if p.from_bytes == begin
    )


def _plain(link: Link, members: int) -> Protocol:
    """What a link without protocols does: its own rate, and a message for each step of a tree up and down."""
    return Protocol(latency_s=2 * ceil(log2(members)) * link.latency_s, hop_s=0.0, bytes_per_s=link.bytes_per_s)


def spread_over_nodes(devices: int, cluster: Cluster) -> tuple[int, ...]:
    """Members in each node of a group that fills nodes one after another."""
    full, rest = divmod(devices, cluster.devices_per_node)
    return (cluster.devices_per_node,) * full + ((rest,) if rest else ())
