"""Links: bytes and the devices of a group in, seconds of a collective out.

- A library has several ways to run a collective (`Protocol`); each is alpha + hops + bytes / rate, and the fastest is
  taken, so that time is piecewise linear in bytes with a switch where one overtakes the other (paper, section 2.2).
- A group that spans nodes runs one ring through all its members. Each level of links carries its part at the same time;
  the slower one sets the rate. All members of a node share its ports: k of them bring k of the link's rate.
"""

from collections.abc import Sequence
from math import ceil, log2
from typing import Literal

from spindle.cluster import Cluster, Link, Protocol

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def collective_s(operation: Collective, num_bytes: float, cluster: Cluster, per_node: Sequence[int]) -> float:
    """Seconds of one collective of `num_bytes` (the whole buffer) by a group with so many members in each node.

    >>> from spindle.clusterfile import parse_cluster
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
    seconds = [link_s(operation, num_bytes, cluster.intra_node, total)] if max(members) > 1 else []
    if len(members) > 1:
        seconds.append(link_s(operation, num_bytes, cluster.inter_node, total, lanes=min(members)))
    return max(seconds)


def link_s(operation: Collective, num_bytes: float, link: Link, members: int, *, lanes: int = 1) -> float:
    """Seconds over one level of links, `lanes` of them side by side: the fastest protocol."""
    protocols = link.protocols or (_plain(link, members),)
    usable = [p for p in protocols if operation == "all_reduce" or not p.in_network]
    return min(_protocol_s(p, operation, num_bytes, members, lanes) for p in usable or (_plain(link, members),))


def _protocol_s(protocol: Protocol, operation: Collective, num_bytes: float, members: int, lanes: int) -> float:
    """Each member of a ring sends (n - 1) / n of the buffer, twice for an all-reduce (Patarasuk and Yuan 2009)."""
    ring = (members - 1) / members * (2 if operation == "all_reduce" else 1)
    sent = 1.0 if protocol.in_network else ring
    fixed = protocol.latency_s + (members - 1) * protocol.hop_s
    return fixed + sent * num_bytes / (lanes * protocol.bytes_per_s)


def _plain(link: Link, members: int) -> Protocol:
    """What a link without protocols does: its own rate, and a message for each step of a tree up and down."""
    return Protocol(latency_s=2 * ceil(log2(members)) * link.latency_s, hop_s=0.0, bytes_per_s=link.bytes_per_s)


def spread_over_nodes(devices: int, cluster: Cluster) -> tuple[int, ...]:
    """Members in each node of a group that fills nodes one after another."""
    full, rest = divmod(devices, cluster.devices_per_node)
    return (cluster.devices_per_node,) * full + ((rest,) if rest else ())
