"""Ray nodes: plan nodes are islands, each on one node of a real cluster of several; what a lost node leads to."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import spindle
from spindle.cost.measured.links import measured_links
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import read
from spindle.runtime.controller import launched, prepare
from spindle.runtime.launch.ray_workers import islands_of
from spindle.runtime.profiling.profiler import MESSAGE_BYTES
from spindle.values.profile import Profile
from tests.distributed.conftest import ROOT, RayCluster
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

DRIVER = """
import sys
from dataclasses import replace

import torch

import spindle
from spindle.runtime.controller import launched, prepare
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

num_ranks, devices_per_node, steps, timeout_s = map(int, sys.argv[1:])
workload = two_towers(torch.float64)
plan = replace(widest_plan(spindle.make_metagraph(workload), num_ranks), devices_per_node=devices_per_node)
try:
    with launched(prepare(workload, plan), optimizer=torch.optim.SGD, launcher="ray", timeout_s=timeout_s) as run:
        print("PLACES", *(place.node for place in run.workers.places), flush=True)
        losses, _ = run.steps(steps)
    print("LOSSES", *(f"{loss:.9f}" for step in losses for loss in step.values()))
except spindle.errors.SpindleError as error:
    print("ERROR", str(error).replace(chr(10), " | "))
"""


def inside(address: str) -> dict[str, str]:
    """An environment in which runs go to the cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}


def driver(address: str, *numbers: int) -> "subprocess.Popen[str]":
    """Train two towers in a process of its own: ranks, devices of a plan node, steps, timeout."""
    command = [sys.executable, "-c", DRIVER, *map(str, numbers)]
    return subprocess.Popen(command, cwd=ROOT, env=inside(address), stdout=subprocess.PIPE, text=True)


def heard(process: "subprocess.Popen[str]", word: str) -> list[str]:
    """The rest of the first line that begins with a word; nothing where the process ends before. Ray has lines of its
    own there, of nodes that died.
    """
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    return next((line.split()[1:] for line in lines if line.startswith(word)), [])


def told(process: "subprocess.Popen[str]") -> dict[str, str]:
    """What a driver that has ended printed, by its first word."""
    with process:
        out, _ = process.communicate(timeout=300)
    return {key: rest for key, _, rest in (line.partition(" ") for line in out.splitlines())}


def alone(steps: int) -> str:
    """Losses of the two towers on a single rank, as drivers print them."""
    workload = two_towers(torch.float64)
    prepared = prepare(workload, widest_plan(spindle.make_metagraph(workload), 1))
    with launched(prepared, optimizer=torch.optim.SGD, launcher="threads") as run:
        losses, _ = run.steps(steps)
    return " ".join(f"{loss:.9f}" for step in losses for loss in step.values())


def test_islands_are_the_nodes_of_the_plan() -> None:
    """The last one may have fewer devices; without nodes all is one."""
    assert islands_of(8, 4) == [4, 4]
    assert islands_of(6, 4) == [4, 2]
    assert islands_of(2, 8) == [2]
    assert islands_of(3, None) == [3]


def test_ranks_of_an_island_are_on_one_node_in_order(ray_cluster: RayCluster) -> None:
    """Two islands of two on two nodes of two; what they compute is what a single rank computes."""
    found = told(driver(ray_cluster.address, 4, 2, 2, 60))
    first, second, third, fourth = found["PLACES"].split()
    assert first == second != third == fourth
    assert found["LOSSES"] == alone(2)


def test_an_island_that_no_node_has_room_for(ray_cluster: RayCluster) -> None:
    """Four CPUs are in the cluster, but three of them on no node."""
    error = told(driver(ray_cluster.address, 3, 3, 1, 5))["ERROR"]
    assert "no room for an island of 3 ranks within 5 s" in error
    assert "its nodes have 2, 2, of which 4 are free" in error
    assert "--cluster 2x2" in error


def test_a_profile_has_links_inside_nodes_and_across(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Of the cluster's own nodes and ranks. The second time all is known; the planner takes its links from there."""
    output = tmp_path / "profile.json"
    source = f"{ROOT / 'docs' / 'examples' / 'quick' / 'model.py'}:workload"
    command = [sys.executable, "-m", "spindle", "profile", source, "--output", str(output), "--json"]
    said = [
        json.loads(subprocess.run(command, env=inside(ray_cluster.address), stdout=subprocess.PIPE, timeout=300).stdout)
        for _ in range(2)
    ]
    found = read(output, Profile)
    assert [one["new"] for one in said] == [found.size, 0]
    assert found.link_keys == {
        (operation, level, 2, num_bytes)
        for operation in ("all_reduce", "reduce", "broadcast", "transfer")
        for level in ("intra_node", "inter_node")
        for num_bytes in MESSAGE_BYTES
    }
    assert dict(found.versions)["ranks"] == "4"  # these nodes are one machine
    assert {entry.num_devices for entry in found.entries} >= {1, 2, 4}
    cluster = parse_cluster("2x2:cpu")
    links = measured_links(cluster, found)
    assert links.inter_node != cluster.inter_node
    assert links.intra_node != cluster.intra_node


def test_a_lost_node_ends_the_run_and_is_named(ray_cluster: RayCluster) -> None:
    """Soon, though ranks on the other node wait for those that are gone."""
    process = driver(ray_cluster.address, 4, 2, 10**6, 60)
    places = heard(process, "PLACES")
    assert len(places) == 4, "the driver did not start to train"
    ray_cluster.kill(places[2])
    start_s = time.monotonic()
    error = told(process)["ERROR"]
    assert f"on node 127.0.0.1 ({places[2][:8]}) died" in error  # of one rank, or of both when Ray has seen so much
    assert time.monotonic() - start_s < 60


RECOVERING = """
import sys
from dataclasses import replace

import ray
import torch

import spindle
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

heard = []

def on_step(step, losses):
    if step == 4 and not heard:
        print("NODES", *(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")), flush=True)
        heard.append(sys.stdin.readline())

workload = two_towers(torch.float64)
plan = replace(widest_plan(spindle.make_metagraph(workload), 4), devices_per_node=2)
elastic = len(sys.argv) > 2
result = spindle.train(
    workload, plan, optimizer=torch.optim.SGD, steps=6, launcher="ray", on_step=on_step, checkpoints=sys.argv[1],
    checkpoint_every=2, failures=spindle.Failures(max_failures=3, backoff_s=1.0, elastic=elastic),
    timeout_s=8.0 if elastic else 60.0,
)
print("LOSSES", *(f"{loss:.9f}" for step in result.losses for loss in step.values()))
print("RECOVERED", *result.recovered)
"""


def test_a_run_goes_on_after_a_lost_node(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """In a new placement group, on the node that took its place; the losses are those of a run without all that."""
    command = [sys.executable, "-c", RECOVERING, str(tmp_path / "c")]
    environment, pipe = inside(ray_cluster.address), subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    nodes = heard(process, "NODES")
    assert len(nodes) == 2, "the driver did not start to train"
    ray_cluster.kill(nodes[1])
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    found = told(process)
    assert f"on node 127.0.0.1 ({nodes[1][:8]}) died" in found["RECOVERED"]
    assert "went on from step 2" in found["RECOVERED"]
    assert found["LOSSES"] == alone(6)


def test_an_elastic_run_goes_on_without_a_lost_node(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """It waits for another one as long as `timeout_s`, and plans anew for the devices of the node that is left."""
    command = [sys.executable, "-c", RECOVERING, str(tmp_path / "c"), "elastic"]
    environment, pipe = inside(ray_cluster.address), subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None
    nodes = heard(process, "NODES")
    assert len(nodes) == 2, "the driver did not start to train"
    with ray_cluster.without(nodes[1]):
        process.stdin.write("go on\n")
        process.stdin.flush()
        found = told(process)
    assert "planned anew for 2 devices (1x2), not 4" in found["RECOVERED"]
    assert "went on from step 2" in found["RECOVERED"]
    assert found["LOSSES"] == alone(6)


WAITING = """
import sys, warnings
from dataclasses import replace

import torch

import spindle
from spindle.files.clusterfile import parse_cluster
from spindle.runtime.launch import ray_room
from spindle.runtime.controller import launched, prepare
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

ray_room.SAY_S = 1.0
warnings.showwarning = lambda message, *_: print("WARNING", message, flush=True)
warnings.simplefilter("always")
workload = two_towers(torch.float64)
plan = widest_plan(spindle.make_metagraph(workload), 2)
plan = replace(plan, devices_per_node=2, cluster=parse_cluster("1x2:h100-80g"))

def run(**asked):
    options = {"optimizer": torch.optim.SGD, "launcher": "ray", "timeout_s": 30.0}
    with launched(prepare(workload, plan), ray_nodes=spindle.RayNodes(**asked), **options) as run:
        print("PLACES", *(place.node for place in run.workers.places), flush=True)

try:
    run(wait_s=2, label_selector={"team": "speech"})
except spindle.errors.NoRoomError as error:
    print("ERROR", str(error).splitlines()[0], flush=True)
run(wait_s=60, accelerator_type="A100", label_selector={"team": "vision"})
"""


def test_a_run_waits_for_nodes(ray_cluster: RayCluster) -> None:
    """For GPUs, and of the plan's type, though the cluster has none yet; it says what it waits for, and goes to the
    node that has the labels and GPUs that were asked for, which are not the plan's, as it says too.
    """
    command = [sys.executable, "-c", WAITING]
    environment = inside(ray_cluster.address)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    waits = " ".join(heard(process, "WARNING"))
    assert "has had no room for an island of 2 ranks for 1 s, and the run waits for 2 s at most" in waits
    assert "an island needs a GPU of type H100 for each of its ranks on one node" in waits
    ends = " ".join(heard(process, "ERROR"))
    assert "within 2 s" in ends
    assert "on one node with the labels team=speech; its nodes have none, of which 0 are free" in ends
    other = " ".join(heard(process, "WARNING"))
    assert "the plan is for h100-80g, and the GPUs of the Ray cluster for it are A100" in other
    assert "plan with --cluster 1x2:a100-40g" in other
    assert "GPU of type A100" in " ".join(heard(process, "WARNING"))
    gpus = {"num_gpus": 2, "resources": {"accelerator_type:A100": 1}}
    with ray_cluster.one_more(labels={"team": "vision"}, **gpus) as node:
        with process:
            out, _ = process.communicate(timeout=120)
        assert f"PLACES {node} {node}" in out


def test_an_address_where_no_cluster_is() -> None:
    """Ray would go on trying."""
    error = told(driver("127.0.0.1:1", 2, 2, 1, 5))["ERROR"]
    assert "RAY_ADDRESS is '127.0.0.1:1', where no Ray cluster answers" in error
