"""Calibrations: what their factors do to a cluster, what is refused, and measured steps as users write them."""

from dataclasses import replace
from pathlib import Path

import pytest

from spindle.cost.links import collective_s
from spindle.cost.roofline import Work, time_operator
from spindle.errors import FormatError, ProfileError
from spindle.files.calibrationfile import read_steps
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import dumps, loads
from spindle.values.calibration import Calibration, Constant, MeasuredStep, calibrated
from spindle.values.cluster import Cluster, Collective

A100 = parse_cluster("2x8:a100-80g")
SHARED_PORT = replace(A100, inter_node=replace(A100.inter_node, node_bytes_per_s=25e9))


def factors(**given: float) -> Calibration:
    return replace(Calibration(device="a100-80g"), **given)  # type: ignore[arg-type]


def test_factors_of_one_change_nothing() -> None:
    assert calibrated(SHARED_PORT, factors()) == SHARED_PORT


@pytest.mark.parametrize("cluster", [A100, SHARED_PORT], ids=["a port each", "one port"])
@pytest.mark.parametrize("per_node", [(4,), (1, 1), (8, 8)])
@pytest.mark.parametrize("num_bytes", [1e3, 1e6, 1e9])
def test_network_multiplies_seconds_of_collectives(
    cluster: Cluster, per_node: tuple[int, ...], num_bytes: float
) -> None:
    """Whatever protocol, size and group: latencies and rates alike."""
    slow = calibrated(cluster, factors(network=3.0))
    operations: tuple[Collective, ...] = ("all_reduce", "reduce_scatter", "broadcast")
    for operation in operations:
        before, after = (collective_s(operation, num_bytes, each, per_node) for each in (cluster, slow))
        assert after == pytest.approx(3 * before)


def test_network_multiplies_seconds_of_transfers() -> None:
    slow = calibrated(SHARED_PORT, factors(network=0.5)).inter_node
    for senders in (1, 8):
        assert slow.transfer_s(1e8, senders) == pytest.approx(0.5 * SHARED_PORT.inter_node.transfer_s(1e8, senders))


def test_compute_and_host_multiply_seconds_of_layers() -> None:
    """Both together multiply all of a layer's time, each alone a part of it."""
    work = Work(matmuls=((512.0, 1024, 1024),) * 4, attention_flops=1e9)
    times = [
        time_operator(work, calibrated(A100, each).device, data_parallel=1).total_s
        for each in (factors(), factors(compute=2.0), factors(host=2.0), factors(compute=2.0, host=2.0))
    ]
    assert times[3] == pytest.approx(2 * times[0])
    assert times[0] < times[1] < times[3]
    assert times[0] < times[2] < times[3]


def test_another_device_type_is_refused() -> None:
    with pytest.raises(ProfileError, match="of 'a100-80g' and the cluster has 'h100-80g'; calibrate on steps"):
        calibrated(parse_cluster("1x8:h100-80g"), factors())


@pytest.mark.parametrize("name", ["compute", "host", "network"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_are_positive(name: str, value: float) -> None:
    with pytest.raises(ProfileError, match=f"calibration: {name} is .*; a factor is a positive number"):
        factors(**{name: value})


def test_file_round_trip() -> None:
    row = MeasuredStep(gpus=8, per_gpu_batch=2, seconds=0.7, predicted_s=0.71)
    found = replace(
        factors(compute=1.2, network=0.9, step_s=0.05),
        rows=(row,),
        source="a.yaml",
        method="sequential",
        undetermined=("host",),
        inseparable=(("compute", "step_s"),),
    )
    assert loads(dumps(found), Calibration) == found


def test_a_plan_is_no_calibration() -> None:
    with pytest.raises(FormatError, match=r"format is 'x'; this Spindle reads .*spindle\.calibration"):
        loads('{"format": "x", "version": 1}', Calibration)


# -- measured steps --------------------------------------------------------------------------------------------------


def steps_file(folder: Path, text: str) -> Path:
    path = folder / "measured.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_in_any_order_of_columns(tmp_path: Path) -> None:
    """With comments, empty lines and spaces; other columns are named."""
    text = "# from our logs\nseconds_per_step, gpus,per_gpu_batch ,note\n\n0.7, 8, 2, first\n# more\n0.9,16,2,\n"
    found = read_steps(steps_file(tmp_path, text))
    assert found.rows == (
        MeasuredStep(gpus=8, per_gpu_batch=2, seconds=0.7),
        MeasuredStep(gpus=16, per_gpu_batch=2, seconds=0.9),
    )
    assert found.unread == ("note",)


HEAD = "gpus,per_gpu_batch,seconds_per_step"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"column 'gpus' is missing \(the first line has nothing\)"),
        (
            "gpus,seconds_per_step\n8,1\n",
            "'per_gpu_batch' is missing .the first line has gpus, seconds_per_step",
        ),
        (f"{HEAD}\n", "holds no measured step; add a line for each"),
        (f"{HEAD}\n8,2\n", "line 2: has another number of values than the first line has columns"),
        (f"{HEAD}\n8,2,1,4\n", "line 2: has another number of values"),
        (f"# c\n\n{HEAD}\n8,2,1\n8,x,1\n", "line 5: gpus '8', per_gpu_batch 'x', seconds_per_step '1'; give whole"),
        (f"{HEAD}\n8,2.5,1\n", "line 2: .*; give whole numbers of GPUs and samples"),
        (f"{HEAD}\n0,2,1\n", "line 2: measured step: 0 GPUs with a batch of 2 each; both are at least one"),
        (f"{HEAD}\n8,2,nan\n", "line 2: a step of nan s; give the seconds of one step, 1e-06 to 1e\\+06"),
        (f"{HEAD}\n8,2,-1\n", "line 2: a step of -1.0 s; give the seconds of one step"),
        (f"{HEAD}\n8,2,1e300\n", r"line 2: a step of 1e\+300 s; give"),
        (f"{HEAD}\n8,2,1\n8,2,1.5\n", "8 GPUs, batch 2 each took 1 s and 1.5 s; what differs is in no column"),
        (
            f"table,{HEAD}\na,8,2,1\nb,8,2,2\n",
            r"2 tables \(a, b\), which are fitted apart; name one with --table",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        read_steps(steps_file(tmp_path, text))


def test_a_log_of_every_step_is_refused(tmp_path: Path) -> None:
    path = steps_file(tmp_path, f"{HEAD}\n" + "8,2,1\n" * 1000)
    with pytest.raises(FormatError, match="holds 1000 steps, and each row is planned; give at most 200"):
        read_steps(path)


@pytest.mark.parametrize(("name", "value"), [("compute", 1e30), ("host", 1e-30), ("network", 1e30), ("step_s", 1e30)])
def test_factors_that_no_step_has(name: Constant, value: float) -> None:
    """Times that differ by more than sixteen digits cannot be added: a plan of them would be nonsense."""
    with pytest.raises(ProfileError, match=f"calibration: {name} is 1e.30.*fit (them|it) again"):
        calibrated(parse_cluster("1x8:a100-80g"), factors(**{name: value}))


def test_the_mark_that_spreadsheets_put_first_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "measured.csv"
    path.write_bytes(f"\ufeff{HEAD}\r\n8,2,1\r\n".encode())
    assert read_steps(path).rows == (MeasuredStep(gpus=8, per_gpu_batch=2, seconds=1.0),)


def test_one_table_of_several(tmp_path: Path) -> None:
    path = steps_file(tmp_path, f"table,{HEAD}\na,8,2,1\nb,8,2,2\n")
    assert [row.seconds for row in read_steps(path, "b").rows] == [2.0]
    with pytest.raises(FormatError, match="holds no table 'c'; it has a, b"):
        read_steps(path, "c")
    with pytest.raises(FormatError, match="has no column 'table' to find 'a' in"):
        read_steps(steps_file(tmp_path, f"{HEAD}\n8,2,1\n"), "a")


def test_equal_rows_may_stand_twice(tmp_path: Path) -> None:
    assert len(read_steps(steps_file(tmp_path, f"{HEAD}\n8,2,1\n8,2,1\n")).rows) == 2
