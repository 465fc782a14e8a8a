"""`spindle calibrate` and what `spindle plan` does with its file, as a shell sees them."""

import json
from pathlib import Path

import pytest

from spindle.files.formats import read
from spindle.planner.report.figures import three_digits
from spindle.values.calibration import Calibration
from tests.printed.conftest import Spindle
from tests.printed.samples import METAGRAPH, MODEL, SPEC

HEAD = "gpus,per_gpu_batch,seconds_per_step"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SPEC.replace("contrastive", "mse"))
    (tmp_path / "measured.csv").write_text(f"{HEAD}\n8,4,0.0101\n8,64,0.0113\n")
    return tmp_path


CALIBRATE = ("calibrate", "small.yaml", "--cluster", "2x8:a100-80g", "--steps", "measured.csv")


def test_calibrate_then_plan(folder: Path, spindle_command: Spindle) -> None:
    """The table of constants and rows, what they leave open, and a plan that is nearer to what was measured."""
    done = spindle_command(*CALIBRATE, "-o", "calibrated.json")
    assert (done.code, done.err) == (0, "")
    assert "step_s" in done.out
    assert "all rows are of 8 GPUs, which says nothing about the network; add a row of another" in done.out
    assert done.out.endswith("written to calibrated.json\n")
    assert max(map(len, done.out.splitlines())) <= 100
    found = read(folder / "calibrated.json", Calibration)
    assert (found.device, found.source, found.method) == ("a100-80g", "small.yaml", "sequential")
    options = ("plan", "small.yaml", "--cluster", "1x8:a100-80g", "--per-device-batch", "4", "--method", "sequential")
    plain = json.loads(spindle_command(*options, "--json").out)
    plan = json.loads(spindle_command(*options, "--calibration", "calibrated.json", "--json").out)
    told_s = plan["step_s"]
    assert told_s == pytest.approx(found.rows[0].predicted_s)
    assert abs(told_s - 0.0101) < abs(plain["step_s"] - 0.0101)
    assert plan["outlook"]["source"] == "calibrated"
    assert plan["outlook"]["low_s"] <= told_s <= plan["outlook"]["high_s"]
    text = spindle_command(*options, "--calibration", "calibrated.json").out
    assert f"step       {three_digits(told_s)} s: " in text
    assert f"fixed part by calibration {three_digits(plan['fixed_s'])} s" in text
    assert "costs      of 3 MetaOps predicted, and calibrated on measured steps" in text


def test_as_json(folder: Path, spindle_command: Spindle) -> None:
    found = json.loads(spindle_command(*CALIBRATE, "--json").out)
    assert (found["format"], found["version"]) == ("spindle.calibration", 1)
    assert [row["seconds"] for row in found["rows"]] == [0.0101, 0.0113]


def test_other_columns_are_named(folder: Path, spindle_command: Spindle) -> None:
    (folder / "measured.csv").write_text(f"{HEAD},precision\n8,4,0.0101,bf16\n8,64,0.0113,bf16\n")
    done = spindle_command(*CALIBRATE)
    assert done.code == 0
    assert (
        "warning: measured.csv: columns precision are not read; put rows that differ in them into tables" in done.said
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("calibrate", "small.yaml", "--steps", "measured.csv"), "no cluster is given for small.yaml; add --cluster"),
        ((*CALIBRATE, "--table", "a"), "measured.csv: has no column 'table' to find 'a' in"),
        ((*CALIBRATE, "--method", "nope"), "'nope' is not one of auto, lp, "),
        ((*CALIBRATE, "-o", "none/c.json"), "none/c.json: its directory does not exist"),
        (("plan", "small.yaml", "-c", "1x8", "--calibration", "small.yaml"), "small.yaml: not JSON"),
        (("plan", "small.yaml", "-c", "1x8", "--per-device-batch", "0"), "0 is less than one"),
    ],
)
def test_what_is_refused(folder: Path, spindle_command: Spindle, arguments: tuple[str, ...], sentence: str) -> None:
    done = spindle_command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.said


def test_a_calibration_of_another_device_type(folder: Path, spindle_command: Spindle) -> None:
    spindle_command(*CALIBRATE, "-o", "calibrated.json")
    done = spindle_command("plan", "small.yaml", "-c", "1x8:h100-80g", "--calibration", "calibrated.json")
    assert done.code == 2
    assert "the calibration is of 'a100-80g' and the cluster has 'h100-80g'" in done.said


def test_rows_on_devices_that_are_no_nodes(folder: Path, spindle_command: Spindle) -> None:
    (folder / "measured.csv").write_text(f"{HEAD}\n12,4,0.01\n")
    done = spindle_command(*CALIBRATE)
    assert done.code == 2
    assert "the row of 12 GPUs, batch 4 each: 12 devices are no whole number of nodes of 8; give multiples" in done.said


@pytest.mark.filterwarnings("always::spindle.errors.SpindleWarning")
def test_tasks_of_some_steps_are_named(folder: Path, spindle_command: Spindle) -> None:
    """A mean over steps with and without a task is the time of neither."""
    spec = (folder / "small.yaml").read_text()
    assert spec.count("batch_size:") >= 1
    (folder / "small.yaml").write_text(spec.replace("batch_size:", "probability: 0.5, batch_size:", 1))
    done = spindle_command(*CALIBRATE)
    assert done.code == 0
    assert "rows are taken for steps with all tasks" in done.said


def test_milliseconds_for_seconds_are_doubted(folder: Path, spindle_command: Spindle) -> None:
    (folder / "measured.csv").write_text(f"{HEAD}\n8,4,410\n8,8,660\n")
    done = spindle_command(*CALIBRATE)
    assert done.code == 0
    assert "check that seconds_per_step is in seconds, of one step" in " ".join(done.out.split())


@pytest.mark.parametrize("source", ["graph.json", "model.py"])
def test_only_specs_are_scaled(folder: Path, spindle_command: Spindle, source: str) -> None:
    done = spindle_command("plan", source, "--cluster", "1x2", "--per-device-batch", "4")
    assert done.code == 2
    assert (
        f"{source}: its batches cannot be scaled to 4 samples a device, only those of a spec (.yaml) can" in done.said
    )


def test_a_model_is_scaled_too(folder: Path, spindle_command: Spindle) -> None:
    """Operator by operator; rows of no whole batch are refused, and a MetaGraph, of whose batch nothing is known."""
    (folder / "model.py").write_text(MODEL)
    (folder / "graph.json").write_text(json.dumps(METAGRAPH))
    (folder / "measured.csv").write_text(f"{HEAD}\n1,4,0.001\n2,4,0.0015\n")
    found = json.loads(
        spindle_command("calibrate", "model.py", "-c", "1x2:cpu", "--steps", "measured.csv", "--json").out
    )
    assert found["device"] == "cpu"
    assert all(abs(row["predicted_s"] / row["seconds"] - 1) < 0.05 for row in found["rows"])
    done = spindle_command("calibrate", "graph.json", "-c", "1x2:cpu", "--steps", "measured.csv")
    assert done.code == 2
    assert "graph.json: a MetaGraph tells times and no batch, so measured steps cannot be set beside it" in done.said


TWO = SPEC.replace("contrastive}", "mse}\n  other: {batch_size: 4, flow: [ear]}")


@pytest.mark.parametrize(("batch", "sizes"), [(3, [16, 8]), (6, [32, 16])])
def test_several_tasks_are_scaled_by_one_factor(batch: int, sizes: list[int]) -> None:
    """Their batches then have the sum that is asked for."""
    from spindle.spec.batch import per_device
    from spindle.spec.file import parse_workload

    assert [task.batch_size for task in per_device(parse_workload(TWO), batch, 8).tasks] == sizes


def test_batches_that_do_not_come_out_whole(folder: Path, spindle_command: Spindle) -> None:
    """The sentence names a batch that works, and it does."""
    (folder / "two.yaml").write_text(TWO)
    options = ("plan", "two.yaml", "--cluster", "1x8", "--method", "sequential", "--per-device-batch")
    done = spindle_command(*options, "4")
    assert done.code == 2
    assert "4 samples on each of 8 devices are 32 a step, of which task 'match' would have 21.3333" in done.said
    assert "give a multiple of 3, so that each task has whole samples" in done.said
    assert spindle_command(*options, "3").code == 0
