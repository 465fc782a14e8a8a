"""Ray Train: a run inside of a TorchTrainer's function has its workers as ranks, and reports to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spindle
from spindle.errors import RunError
from spindle.runtime.controller import chosen
from tests.distributed.conftest import ROOT
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own, of its own settings
]


def loop_of(root: str, out: str) -> Any:
    """A function for Ray Train, which comes by value to workers that cannot import this module."""

    def loop() -> None:
        import sys

        sys.path.append(root)
        import torch.distributed as dist

        from tests.distributed.test_ray_train import trained

        trained(Path(out))
        together = torch.ones(1)
        dist.all_reduce(together)  # Ray's own process group is there again
        assert together.item() == 2

    return loop


def trained(out: Path) -> None:
    """Six steps. The first try is broken off by rank 1 after a checkpoint; the next one has another folder, as it would
    on other machines.
    """
    import ray.train

    rank, broken = ray.train.get_context().get_world_rank(), out / "broken"
    begins_anew = broken.exists()

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 5 and rank == 1 and not begins_anew:
            broken.touch()
            raise RuntimeError("as if this worker were lost")

    with pytest.raises(RunError, match="leave launcher out"):
        chosen("ray")
    workload = two_towers(torch.float64)
    result = spindle.train(
        workload,
        widest_plan(spindle.make_metagraph(workload), 2),
        optimizer=torch.optim.SGD,
        steps=6,
        on_step=on_step,
        checkpoints=out / f"checkpoints-{int(begins_anew)}",
        checkpoint_every=2,
        resume=True,
        timeout_s=30.0,
    )
    (out / f"rank{rank}.json").write_text(json.dumps([result.first_step, result.losses]))


def test_a_run_inside_of_ray_train(tmp_path: Path) -> None:
    """Losses are those of threads, on all workers; a failure that Ray Train sees to costs what came after the last
    checkpoint, which comes back from Ray's own storage.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out = tmp_path / "out"
    out.mkdir()
    storage = RunConfig(storage_path=str(tmp_path), name="ray", failure_config=FailureConfig(max_failures=1))
    trainer = TorchTrainer(
        loop_of(str(ROOT), str(out)), scaling_config=ScalingConfig(num_workers=2), run_config=storage
    )
    result = trainer.fit()

    workload = two_towers(torch.float64)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    alone = spindle.train(workload, plan, optimizer=torch.optim.SGD, steps=6, launcher="threads")
    for rank in (0, 1):
        first_step, losses = json.loads((out / f"rank{rank}.json").read_text())
        assert first_step == 4
        assert losses == [pytest.approx(expected, rel=1e-12) for expected in alone.losses[4:]]
    assert result.metrics["step"] == 6
    assert {f"loss/{task}" for task in alone.losses[5]} < result.metrics.keys()
    assert json.loads((Path(result.checkpoint.path) / "spindle.json").read_text())["step"] == 6
    assert len([path for path in (tmp_path / "ray").glob("checkpoint_*") if path.is_dir()]) == 3
