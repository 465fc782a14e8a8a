"""The command line on evaluations, stages and limits; docs/evaluation.md runs the commands themselves."""

import json
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spindle.cli import cli

MODEL = textwrap.dedent(
    """
    import torch
    from torch import nn

    import spindle

    torch.manual_seed(0)
    workload = spindle.Workload("small")
    body = workload.component("body", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    data = [{"x": torch.randn(4, 4)}]

    for name in ("one", "two"):
        workload.task(name, batch_size=4, data=data)(lambda batch: body(batch["x"]).square().mean())

    evaluation = spindle.Evaluation(workload)
    evaluation.task("t", batch_size=4, data=data, metrics={"sum": lambda out: out["y"].sum()})(
        lambda batch: {"loss": body(batch["x"]).square().mean(), "y": body(batch["x"])}
    )
    stages = [spindle.Stage(until=2, weights={"one": 1.0}), spindle.Stage(until=4)]
    """
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "small_model.py"
    path.write_text(MODEL)
    return f"{path}:workload"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--launcher", "threads"])


def test_train_prints_scores_and_why_it_stopped(source: str, tmp_path: Path) -> None:
    options = ["--steps", "4", "--evaluate-every", "2", "--keep-best", "t:loss", "--max-samples", "20"]
    folder = tmp_path / "run"
    done = run("train", source, *options, "--checkpoints", str(folder))
    assert done.exit_code == 0, done.output
    assert "stopped: 24 samples are trained (max_samples is 20)" in done.stdout
    assert "evaluated after step 2: t loss " in done.stdout
    assert "evaluated after step 2: t loss " in done.stderr
    assert f"best  {folder}/step-00000002" in " ".join(done.stdout.split()).replace("best ", "best  ")


def test_stages_scores_and_losses_as_json(source: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    done = run("train", source, "--stages", "--steps", "4", "--evaluate-every", "4", "--checkpoints", folder, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [sorted(losses) for losses in told["losses"]] == [["one"]] * 2 + [["one", "two"]] * 2
    alone = run("evaluate", source, "--checkpoint", f"{folder}/step-00000004", "--json")
    assert alone.exit_code == 0, alone.output
    assert json.loads(alone.stdout)["scores"]["t"] == pytest.approx(told["scores"]["4"]["t"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep-best", "t:loss"], "--keep-best t:loss: nothing is evaluated; add --evaluate-every STEPS"),
        (["--early-stop", "t:loss"], "--early-stop t:loss: nothing is evaluated"),
        (["--stages"], "--stages: each stage goes on from a checkpoint; give --checkpoints DIR"),
    ],
)
def test_options_that_need_others_say_so(source: str, options: list[str], words: str) -> None:
    done = run("train", source, "--steps", "4", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_a_name_that_is_no_evaluation(source: str) -> None:
    done = run("evaluate", source, "--evaluation", "data")
    assert "has no Evaluation 'data'; it has evaluation" in str(done.exception)
