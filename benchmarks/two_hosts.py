"""Two hosts: profiles, plans and runs over a link whose rate is known, between clocks that are an hour apart.

sudo python benchmarks/two_hosts.py [--launcher ray] [--megabits 500,100]

Each host is a network namespace of this machine with an address, cores and a clock of its own (Linux, as root; `ip`,
`tc` and `unshare`). What `spindle profile` says of the link is compared with the rate that it was set to, and steps
that were trained over it with their predictions.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spindle.cost.measured.links import measured_links
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import read
from spindle.values.cluster import Cluster
from spindle.values.plan import Plan
from spindle.values.profile import Profile
from spindle.values.trace import Trace

ROOT = Path(__file__).parents[1]
SOURCE = f"{ROOT / 'docs' / 'examples' / 'digits' / 'workload.py'}:workload"
CLUSTER = "2x1:cpu"
PAYLOAD = 1448 / 1514  # of a packet: the rest is headers
AHEAD_S = 5000
METHODS = ("auto", "sequential", "task_split", "component_split")
WAIT_S = 600.0


@dataclass(frozen=True)
class Host:
    """A namespace with an address, cores of this machine, and a clock that is ahead of its own."""

    number: int
    cores: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the namespace."""
        return f"spindle{self.number}"

    @property
    def address(self) -> str:
        """On the link between both."""
        return f"10.231.0.{self.number + 1}"

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a command there; what it prints on stdout is kept."""
        ahead = str(AHEAD_S * self.number)
        cores = ",".join(map(str, self.cores))
        there = ["unshare", "-T", "--monotonic", ahead, "--boottime", ahead, "taskset", "-c", cores]
        usual = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [*there, "ip", "netns", "exec", self.name, *command],
            env=usual
            | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
            | environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def two_hosts(megabits: int) -> Iterator[tuple[Host, Host]]:
    """Two hosts and a link between them, of so many megabits a second in each direction."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    hosts = Host(0, tuple(cores[:half])), Host(1, tuple(cores[half : 2 * half]) or tuple(cores))
    try:
        for host in hosts:
            _do("ip", "netns", "add", host.name)
        ends = [word for host in hosts for word in ("peer", "name", host.name, "netns", host.name)][2:]
        _do("ip", "link", "add", "name", ends[0], "netns", hosts[0].name, "type", "veth", *ends[3:])
        for host in hosts:
            inside = ("ip", "netns", "exec", host.name)
            _do(*inside, "ip", "address", "add", f"{host.address}/24", "dev", host.name)
            _do(*inside, "ip", "link", "set", "lo", "up")
            _do(*inside, "ip", "link", "set", host.name, "up")
            queue = ("rate", f"{megabits}mbit", "burst", f"{max(16, megabits // 8)}kb", "latency", "100ms")
            _do(*inside, "tc", "qdisc", "add", "dev", host.name, "root", "tbf", *queue)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False)


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


class Torchrun:
    """Every host runs the command, as torchrun would have it."""

    def __init__(self, hosts: tuple[Host, Host]) -> None:
        self.hosts = hosts

    def __call__(self, *arguments: str) -> Mapping[str, Any]:
        """What the first host's `spindle` says."""
        first = self.hosts[0]
        spec = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": first.address}
        spec["MASTER_PORT"] = str(_free_port())
        started = [host.start(*_spindle(*arguments), RANK=str(host.number), **spec) for host in self.hosts]
        found = [_output(process) for process in started]
        return dict(json.loads(found[0]))


class Ray:
    """A Ray node on each host; the first one runs the command."""

    def __init__(self, hosts: tuple[Host, Host], folder: str) -> None:
        self.first, self.auth = hosts[0], {"RAY_AUTH_MODE": "disabled"}  # the link leads nowhere else
        self.address = f"{self.first.address}:6379"
        self.nodes: list[subprocess.Popen[str]] = []
        for host in hosts:
            role = ["--address", self.address] if self.nodes else ["--head", "--port", "6379", "--temp-dir", folder]
            usual = [
                "--num-cpus",
                "1",
                "--node-ip-address",
                host.address,
                "--object-store-memory",
                "200000000",
                "--block",
            ]
            self.nodes.append(
                host.start(str(Path(sys.executable).with_name("ray")), "start", *role, *usual, **self.auth)
            )
            self._await(len(self.nodes))

    def _await(self, count: int) -> None:
        """Until the cluster has so many nodes."""
        asked = f"import ray; ray.init('{self.address}', log_to_driver=False); print(len(ray.nodes()))"
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            process = self.first.start(sys.executable, "-c", asked, **self.auth)
            out, _ = process.communicate(timeout=WAIT_S)
            if out.strip() == str(count):
                return
            time.sleep(1.0)
        raise SystemExit(f"the Ray cluster has no {count} nodes after {WAIT_S:g} s")

    def __call__(self, *arguments: str) -> Mapping[str, Any]:
        """What `spindle` says."""
        process = self.first.start(*_spindle(*arguments), RAY_ADDRESS=self.address, **self.auth)
        return dict(json.loads(_output(process)))

    def close(self) -> None:
        """End both nodes, and what they have started."""
        for node in reversed(self.nodes):  # the head has to hear that the other leaves
            os.killpg(node.pid, 15)
            node.communicate(timeout=WAIT_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spindle(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "spindle", *arguments, "--json"]


def _output(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=WAIT_S)
    if process.returncode:
        raise SystemExit(f"a host's command failed (exit code {process.returncode})\n{out}")
    return out


def link_rows(megabits: int, profile: Profile) -> Iterator[str]:
    """The link's rate as it was set, of what ranks send, and as the profile has it."""
    wanted = megabits * 1e6 / 8 * PAYLOAD
    cluster: Cluster = measured_links(parse_cluster(CLUSTER), profile)
    found = {"fit of transfers": cluster.inter_node.bytes_per_s}
    for entry in profile.links:
        if entry.num_bytes == max(e.num_bytes for e in profile.links):
            found[f"{entry.operation} of {entry.num_bytes >> 20} MiB"] = entry.num_bytes / entry.seconds
    for what, rate in found.items():
        yield f"| {megabits} | {what} | {wanted / 1e6:.1f} | {rate / 1e6:.1f} | {rate / wanted - 1:+.1%} |"


def least_delay_s(trace: Trace) -> float:
    """The least time from when the last rank had begun a message until one has it: below zero where clocks disagree."""
    begun: dict[tuple[int, str], list[float]] = {}
    for span in trace:
        verb, _, name = span.name.partition(" ")
        if verb in ("TRANSFER", "REDUCE"):
            begun.setdefault((span.step, name), []).append(span.start_s)
    awaited = [span for span in trace if span.name.startswith("AWAIT ")]
    # a sender does not wait for its receiver: what it awaits, the last to begin may be itself
    return min(span.end_s - max(begun[span.step, span.name.partition(" ")[2]]) for span in awaited)


def report(megabits: int, run: Torchrun | Ray, folder: Path, steps: int) -> tuple[list[str], list[str]]:
    """Rows on the link and on steps."""
    profile, plan, trace = (str(folder / f"{name}-{megabits}.json") for name in ("profile", "plan", "trace"))
    run("profile", SOURCE, "--cluster", CLUSTER, "--output", profile)
    rows = []
    for method in METHODS:
        options = ("--cluster", CLUSTER, "--profile", profile, "--method", method, "--output", plan)
        subprocess.run(_spindle("plan", SOURCE, *options), stdout=subprocess.DEVNULL, check=True)
        told_s = read(plan, Plan).step_s
        measured_s = run("train", SOURCE, "--plan", plan, "--steps", str(steps), "--trace", trace)["step_s"]
        delay_ms = least_delay_s(read(trace, Trace)) * 1e3
        rows.append(
            f"| {megabits} | {method} | {told_s * 1e3:.1f} | {measured_s * 1e3:.1f} | {told_s / measured_s - 1:+.1%} "
            f"| {delay_ms:.2f} |"
        )
    agrees = run("verify", SOURCE, "--plan", plan)["ok"]
    rows.append(f"| {megabits} | parity of the last: {'agrees' if agrees else 'DIFFERS'} | | | | |")
    return list(link_rows(megabits, read(profile, Profile))), rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=["torchrun", "ray"], default="torchrun")
    parser.add_argument("--megabits", default="500,100", help="rates of the link, in megabits a second")
    parser.add_argument("--steps", type=int, default=40, help="trained by each plan")
    options = parser.parse_args()
    links, steps = [], []
    for megabits in map(int, options.megabits.split(",")):
        with (
            tempfile.TemporaryDirectory(prefix="th") as folder,
            two_hosts(megabits) as hosts,
            contextlib.ExitStack() as stack,
        ):
            run: Torchrun | Ray = Torchrun(hosts)
            if options.launcher == "ray":
                run = Ray(hosts, folder)
                stack.callback(run.close)
            more_links, more_steps = report(megabits, run, Path(folder), options.steps)
            links += more_links
            steps += more_steps
    command = " ".join(("python", "benchmarks/two_hosts.py", *sys.argv[1:]))
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"`{command}`: {versions}, half of them on each host;\nclocks {AHEAD_S} s apart.\n")
    print("| Mbit/s | what | MB/s set | MB/s found | error |\n|--:|---|--:|--:|--:|")
    print("\n".join(links))
    print("\n| Mbit/s | plan | predicted ms | measured ms | error | least delay ms |\n|--:|---|--:|--:|--:|--:|")
    print("\n".join(steps))


if __name__ == "__main__":
    main()
