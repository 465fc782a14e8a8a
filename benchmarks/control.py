"""What control costs as ranks grow: lowering, laws, and what a rank is sent. Printed as Markdown; results/control.md.

    python benchmarks/control.py              64, 256 and 1024 devices, nodes of eight H100
    python benchmarks/control.py 16 32        other numbers of devices

Each spec is planned as `spindle plan` does (search for 5 s, at most) and as one task after another over all devices;
batches grow with the devices. clip-30 has each task of Multitask-CLIP three times over. Nothing is trained.
"""

import argparse
import pickle
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from spindle.files.clusterfile import parse_cluster
from spindle.runtime.laws import check_program
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.parts import parts_of
from spindle.runtime.programs.program import Program
from spindle.runtime.startup import Links
from spindle.spec.batch import scaled_by
from spindle.spec.file import read_workload
from spindle.spec.graph import build_graph
from spindle.spec.values import WorkloadSpec
from spindle.values.contract import contract
from spindle.values.graph import TaskGraph, TensorSpec
from spindle.values.plan import Plan
from spindle.verbs.planning import plan_source
from spindle.verbs.source import spec_source

FOLDER = Path(__file__).parent / "workloads"
DEVICES_OF_SPEC = 16  # for which the batches of a spec are taken
WORKLOADS = {"multitask_clip": 1, "ofasys": 1, "clip-30": 3}
METHODS = ("lp", "sequential")


@dataclass(frozen=True)
class Row:
    """One plan, lowered."""

    workload: str
    method: str
    num_devices: int
    num_slices: int
    num_instructions: int
    lower_s: float
    laws_s: float
    rank_bytes: tuple[int, ...]
    links: Links

    def cells(self) -> Iterator[str]:
        """As the table has them."""
        yield from (self.workload, self.method, str(self.num_devices), str(self.num_slices))
        yield from (f"{self.num_instructions:,}", f"{self.lower_s:.2f}", f"{self.laws_s:.2f}")
        yield f"{max(self.rank_bytes) / 2**10:,.0f}"
        yield f"{sum(self.rank_bytes) / 2**20:,.1f}"
        yield from (str(self.links.groups), str(self.links.groups_of_rank), str(self.links.peers_of_rank))


HEAD = (
    *("workload", "method", "devices", "slices", "instructions", "lower s", "laws s", "KiB a rank, most"),
    *("MiB in all", "groups", "groups of a rank, most", "peers of a rank, most"),
)


def spec_of(name: str, num_devices: int) -> WorkloadSpec:
    """A spec for a number of devices, its tasks repeated where the table of workloads says so."""
    times = WORKLOADS[name]
    spec = read_workload(FOLDER / ("multitask_clip.yaml" if times > 1 else f"{name}.yaml"))
    if times > 1:
        spec = replace(
            spec, tasks=tuple(replace(t, name=f"{t.name}-{copy}") for copy in range(times) for t in spec.tasks)
        )
    scaled = scaled_by(spec, Fraction(num_devices, DEVICES_OF_SPEC))
    if scaled is None:
        raise SystemExit(f"{name}: batches for {num_devices} devices are no whole numbers; take a multiple of 16")
    return scaled


def with_losses(graph: TaskGraph) -> tuple[TaskGraph, dict[str, str]]:
    """The last operator of a task gives out its loss, a number; in the graph of a spec it gives out nothing."""
    last = {op.task: op.name for op in graph}
    made = {name: TensorSpec(name=f"{name}:loss", shape=(), dtype="float32", rows=0) for name in last.values()}
    operators = (replace(op, outputs=(*op.outputs, made[op.name])) if op.name in made else op for op in graph)
    return TaskGraph(tuple(operators)), {task: made[name].name for task, name in last.items()}


def planned(spec: WorkloadSpec, num_devices: int, method: str) -> Plan:
    """As `spindle plan` does; without what other batches of it would take."""
    source = replace(spec_source(spec), executable=True, steps=())
    cluster = parse_cluster(f"{num_devices // 8}x8:h100-80g")
    return plan_source(source, cluster, method=method, time_limit_s=5.0)[0]


def lowered(name: str, method: str, num_devices: int) -> Row:
    """One row of the table."""
    spec = spec_of(name, num_devices)
    plan = planned(spec, num_devices, method)
    graph, losses = with_losses(build_graph(spec))
    metagraph = contract(graph)
    begun_s = time.perf_counter()
    program = lower(
        plan,
        metagraph,
        graph,
        losses=losses,
        weights=dict.fromkeys(losses, 1.0),
        shard_optimizer=plan.shard_optimizer,
        recompute={metaop.component for metaop in metagraph} if plan.recompute else (),
    )
    lowered_s = time.perf_counter()
    check_program(program)
    checked_s = time.perf_counter()
    links = Links.of(program)
    return Row(
        name,
        method,
        num_devices,
        len(program.slices),
        sum(map(len, program.instructions)),
        lowered_s - begun_s,
        checked_s - lowered_s,
        tuple(shipped(program)),
        links,
    )


def shipped(program: Program) -> Iterator[int]:
    """Bytes of the part of the program that goes to each rank."""
    yield from (len(pickle.dumps(part)) for part in parts_of(program))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", type=int, default=[64, 256, 1024])
    parser.add_argument("--workload", choices=tuple(WORKLOADS), action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}\n\n| {' | '.join(HEAD)} |\n|---|---|{'--:|' * (len(HEAD) - 2)}")
    for name in options.workload or WORKLOADS:
        for method in options.method or METHODS:
            for num_devices in options.devices:
                print(f"| {' | '.join(lowered(name, method, num_devices).cells())} |", flush=True)


if __name__ == "__main__":
    main()
