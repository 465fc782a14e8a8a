"""A Ray cluster of several nodes on this machine, on loopback, in a process of its own that ends when its input does.

Tells `READY DASHBOARD ADDRESS`, then takes orders, a line each: `kill NODE` kills the node of that id, without a word
to it, and puts a new one in its place; `lose NODE` puts none there, and `add` adds one, or `add JSON` one with such
settings of `Cluster.add_node`. Answers each with `DONE`, and the id of a new node.
"""

import json
import os
import sys
import tempfile
import uuid
from typing import Any

import psutil

CPUS = (2, 2)
"""Of each node on which ranks may run; the head takes none."""


def add_node(cluster: Any, num_cpus: int, **settings: Any) -> str:
    """One more node; its id. The nodes of a real cluster do not share a disk; here each would unpack jobs over the
    others'.
    """
    folder = f"runtime_env_{uuid.uuid4().hex[:8]}"
    return str(cluster.add_node(num_cpus=num_cpus, runtime_env_dir_name=folder, **settings).node_id)


def kill_node(cluster: Any, node: Any) -> None:
    """Kill a node, and wait until what ran on it is gone: Ray itself leaves that to its processes."""
    family = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    psutil.wait_procs(family, timeout=30)


def main() -> None:
    # Ray's sockets lie in the folder: their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        serve()


def serve() -> None:
    """Start the cluster, obey until the input ends, and end it."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "dashboard_host": "127.0.0.1"}
    head["dashboard_agent_listen_port"] = 0  # another Ray of the tests has the usual one; without it no job is taken
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for num_cpus in CPUS:
            add_node(cluster, num_cpus)
        print("READY", f"http://{cluster.webui_url}", cluster.address, flush=True)
        for order in sys.stdin:
            what, *names = order.split(maxsplit=1)
            for victim in [node for node in cluster.worker_nodes if node.node_id in [name.strip() for name in names]]:
                kill_node(cluster, victim)
            settings = json.loads(names[0]) if what == "add" and names else {}
            print("DONE", add_node(cluster, CPUS[-1], **settings) if what != "lose" else "", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
