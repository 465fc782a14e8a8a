"""The examples of docs/cluster.md for schedulers that this machine does not have."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spindle.cli import cli
from tests.checkpoints.test_resume import left_in
from tests.distributed.conftest import ROOT

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
MODEL = ROOT / "docs" / "examples" / "quick" / "model.py"


def file_of_page(name: str) -> str:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n```\w+\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return found[1]


@pytest.mark.gloo
def test_the_slurm_script_trains(tmp_path: Path) -> None:
    """With Slurm's variables and commands of one node of two devices."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    script = file_of_page("train.sbatch")
    for text, other in (("29500", port), ("10000", "2"), ("/shared/runs/a", str(tmp_path / "runs"))):
        assert script.count(text) == 1
        script = script.replace(text, other)
    (tmp_path / "train.sbatch").write_text(script)
    (tmp_path / "model.py").write_text(MODEL.read_text())
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "localhost", "NNODES": "1", "JOB_ID": "7", "GPUS_ON_NODE": "2", "CPUS_PER_TASK": "2"}
    environment = {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "spindle", "plan", "model.py:workload", "-c", "1x2:cpu", "-o", "plan.json")
    assert "2 steps in " in run("bash", "train.sbatch")
    assert left_in(tmp_path / "runs") == ["step-00000002"]


def test_the_rayjob_runs_what_train_takes() -> None:
    """Its entry point's arguments are known to `train`, and what it mounts it has."""
    job = yaml.safe_load(file_of_page("rayjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    python, _, module, verb, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, verb) == ("python", "spindle", "train")
    given = cli.commands["train"].make_context("spindle train", arguments).params
    assert given["source"].startswith("/app/")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert given["checkpoints"].startswith(mounts["shared"])
