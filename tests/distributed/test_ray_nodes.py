"""Ray nodes: plan nodes are islands, each on one node of a real cluster of several; what a lost node leads to."""

import os
import subprocess
import sys
import time

import pytest
import torch

import spindle
from spindle.runtime.controller import launched, prepare
from spindle.runtime.launch.ray_crew import islands_of
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
        print("PLACES", *(place.node for place in run.crew.places), flush=True)
        losses, _ = run.steps(steps)
    print("LOSSES", *(f"{loss:.9f}" for step in losses for loss in step.values()))
except spindle.errors.SpindleError as error:
    print("ERROR", str(error).replace(chr(10), " | "))
"""


def driver(address: str, *numbers: int) -> "subprocess.Popen[str]":
    """Train two towers in a process of its own: ranks, devices of a plan node, steps, timeout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, numbers)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def told(process: "subprocess.Popen[str]") -> dict[str, str]:
    """What a driver that has ended printed, by its first word."""
    with process:
        out, _ = process.communicate(timeout=300)
    return {key: rest for key, _, rest in (line.partition(" ") for line in out.splitlines())}


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
    workload = two_towers(torch.float64)
    prepared = prepare(workload, widest_plan(spindle.make_metagraph(workload), 1))
    with launched(prepared, optimizer=torch.optim.SGD, launcher="threads") as run:
        losses, _ = run.steps(2)
    assert found["LOSSES"] == " ".join(f"{loss:.9f}" for step in losses for loss in step.values())


def test_an_island_that_no_node_has_room_for(ray_cluster: RayCluster) -> None:
    """Four CPUs are in the cluster, but three of them on no node."""
    error = told(driver(ray_cluster.address, 3, 3, 1, 5))["ERROR"]
    assert "no room for an island of 3 ranks within 5 s" in error
    assert "its nodes have 2, 2, of which 4 are free" in error
    assert "--cluster 2x2" in error


def test_a_lost_node_ends_the_run_and_is_named(ray_cluster: RayCluster) -> None:
    """Soon, though ranks on the other node wait for those that are gone."""
    process = driver(ray_cluster.address, 4, 2, 10**6, 60)
    assert process.stdout is not None
    places = process.stdout.readline().split()[1:]
    assert len(places) == 4, "the driver did not start to train"
    ray_cluster.kill(places[2])
    start_s = time.monotonic()
    error = told(process)["ERROR"]
    assert f"on node 127.0.0.1 ({places[2][:8]}) died" in error  # of one rank, or of both when Ray has seen so much
    assert time.monotonic() - start_s < 60


def test_an_address_where_no_cluster_is() -> None:
    """Ray would go on trying."""
    error = told(driver("127.0.0.1:1", 2, 2, 1, 5))["ERROR"]
    assert "RAY_ADDRESS is '127.0.0.1:1', where no Ray cluster answers" in error
