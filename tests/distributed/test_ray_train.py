"""Ray Train and Ray Data: a run inside of a TorchTrainer's function has its workers as ranks, and reports to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spindle
from spindle.errors import RunError, WorkloadError
from spindle.runtime.controller import Launcher, chosen
from spindle.values.plan import Plan
from spindle.workload import Workload
from tests.distributed.conftest import ROOT
from tests.random_plans import widest_plan

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own, of its own settings
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray Data leaves log files open
]

STEPS = 6


def squares(data: Any) -> Workload:
    """One task over data with `id`."""
    torch.manual_seed(0)
    workload = Workload("squares")
    layers = workload.component("layers", nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1)))

    @workload.task("square", batch_size=4, data=data)
    def square(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["id"].float()[:, None]
        return F.mse_loss(layers(x / 10), x.square() / 100)

    return workload


def plan_of(workload: Workload) -> Plan:
    return widest_plan(spindle.make_metagraph(workload), 2)


def losses_of(workload: Workload, launcher: Launcher) -> list[dict[str, float]]:
    """Losses by step; the last steps begin the data of ten samples anew."""
    plan = plan_of(workload)
    return list(spindle.train(workload, plan, optimizer=torch.optim.SGD, steps=STEPS, launcher=launcher).losses)


def listed() -> Workload:
    """With the batches as a list."""
    return squares([{"id": torch.arange(start, min(start + 4, 10))} for start in (0, 4, 8)])


def test_a_data_set_of_ray() -> None:
    """Its batches come in order, pass after pass, to the driver and to actors; without a Ray they are refused."""
    import ray.data

    expected = losses_of(listed(), "threads")
    assert losses_of(squares(lambda: ray.data.range(10)), "threads") == expected
    workload = squares(ray.data.range(10))
    assert losses_of(workload, "ray") == [pytest.approx(losses) for losses in expected]
    with pytest.raises(WorkloadError, match="a data set of Ray, which this process is not connected to; train with"):
        losses_of(workload, "processes")


def loop_of(root: str, out: str, plan: Plan) -> Any:
    """A function for Ray Train, which comes by value to workers that cannot import this module."""

    def loop() -> None:
        import sys

        sys.path.append(root)
        import torch.distributed as dist

        from tests.distributed.test_ray_train import trained

        trained(Path(out), plan)
        together = torch.ones(1)
        dist.all_reduce(together)  # Ray's own process group is there again
        assert together.item() == 2

    return loop


def trained(out: Path, plan: Plan) -> None:
    """The first try is broken off by rank 1 after a checkpoint; the next one has another folder, as it would on other
    machines.
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
    with pytest.raises(WorkloadError, match=r"one of 2 shards of a data set of Ray.*datasets_to_split=\[\]"):
        squares(ray.train.get_dataset_shard("split"))
    result = spindle.train(
        squares(ray.train.get_dataset_shard("whole")),
        plan,
        optimizer=torch.optim.SGD,
        steps=STEPS,
        on_step=on_step,
        checkpoints=out / f"checkpoints-{int(begins_anew)}",
        checkpoint_every=2,
        resume=True,
    )
    (out / f"rank{rank}.json").write_text(json.dumps([result.first_step, result.losses]))


def test_a_run_inside_of_ray_train(tmp_path: Path) -> None:
    """Losses are those of threads, on all workers; a failure that Ray Train sees to costs what came after the last
    checkpoint, which comes back from Ray's own storage.
    """
    import ray.data
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out, alone = tmp_path / "out", listed()
    out.mkdir()
    trainer = TorchTrainer(
        loop_of(str(ROOT), str(out), plan_of(alone)),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path), name="ray", failure_config=FailureConfig(max_failures=1)),
        datasets={"whole": ray.data.range(10), "split": ray.data.range(10)},
        dataset_config=DataConfig(datasets_to_split=["split"]),
    )
    result = trainer.fit()

    expected = losses_of(alone, "threads")
    for rank in (0, 1):
        first_step, losses = json.loads((out / f"rank{rank}.json").read_text())
        assert first_step == 4
        assert losses == [pytest.approx(each) for each in expected[4:]]
    assert result.metrics["step"] == STEPS
    assert result.metrics["loss/square"] == pytest.approx(expected[-1]["square"])
    assert json.loads((Path(result.checkpoint.path) / "spindle.json").read_text())["step"] == STEPS
    assert len([path for path in (tmp_path / "ray").glob("checkpoint_*") if path.is_dir()]) == 3
