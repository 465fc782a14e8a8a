"""Metrics: what a run tells of its steps, to JSON lines, to TensorBoard, to any callback."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import PrinterCallback

import spindle
from spindle.cli import cli
from spindle.errors import InputError, RunError
from spindle.metrics import Callback, JsonLines, StepMetrics, TensorBoard, scalars
from spindle.runtime.steps.record import StepRecord
from spindle.runtime.watch import rank_step, tokens_of
from spindle.values.plan import Plan
from spindle.values.trace import Span, SpanKind
from spindle.workload import Workload


class Recorder(Callback):
    def __init__(self) -> None:
        self.told: list[str | StepMetrics] = []

    def on_train_begin(self, plan: Plan, first_step: int) -> None:
        self.told.append(f"begin {plan.num_devices} {first_step}")

    def on_step_end(self, metrics: StepMetrics) -> None:
        self.told.append(metrics)

    def on_train_end(self) -> None:
        self.told.append("end")

    @property
    def steps(self) -> list[StepMetrics]:
        return [told for told in self.told if isinstance(told, StepMetrics)]


def words(**settings: Any) -> Workload:
    """Words in, a number out; a second task without words, in every other step."""
    torch.manual_seed(0)
    workload = Workload("words", **settings)
    table = workload.component("table", nn.Embedding(9, 4), optimizer={"lr": 0.25})
    head = workload.component("head", nn.Linear(4, 1))
    ids = torch.arange(12).reshape(4, 3) % 9

    @workload.task("read", batch_size=4, data=[{"input_ids": ids}])
    def read(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = head(table(batch["input_ids"]).mean(1)).square().mean()
        return loss

    @workload.task("see", batch_size=6, data=[{"x": torch.ones(6, 4)}], every=2)
    def see(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = head(batch["x"]).square().mean()
        return loss

    return workload


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def trained(workload: Workload, steps: int, **options: Any) -> spindle.TrainResult:
    plan = spindle.make_plan(workload, "1x2:cpu")
    return spindle.train(workload, plan, optimizer=sgd, steps=steps, launcher="threads", **options)


def test_every_step_is_told() -> None:
    """Begin, each step once and in order with its losses, end."""
    recorder = Recorder()
    result = trained(words(), 5, callbacks=[recorder])
    assert (recorder.told[0], recorder.told[-1]) == ("begin 2 0", "end")
    assert [m.step for m in recorder.steps] == [1, 2, 3, 4, 5]
    assert [dict(m.losses) for m in recorder.steps] == list(result.losses)


def test_figures_of_a_step() -> None:
    """Samples are those of tasks that took part, tokens of those with ids; shares lie in 0..1."""
    recorder = Recorder()
    trained(words(accumulate=2, max_grad_norm=1.0), 4, callbacks=[recorder])
    both, one = recorder.steps[2], recorder.steps[3]
    assert {t: round(v * both.step_s) for t, v in both.samples_per_s.items()} == {"read": 8, "see": 12}
    assert {t: round(v * one.step_s) for t, v in one.samples_per_s.items()} == {"read": 8}
    assert {t: round(v * one.step_s) for t, v in one.tokens_per_s.items()} == {"read": 24}
    assert dict(both.learning_rates) == {"table": 0.25, "": 0.5}
    for metrics in (both, one):
        assert 0 < metrics.utilization <= 1
        assert metrics.utilization + metrics.idle == pytest.approx(1)
        assert 0 <= metrics.loading < 1
        assert 0 <= metrics.communication < 1
        assert metrics.grad_norm is not None
        assert metrics.mfu is None  # CPUs
        assert min(metrics.memory_bytes) > 2**20


def test_mfu_of_known_devices() -> None:
    """FLOPs of the tasks that took part, over time and the peak of all devices that the plan names."""
    workload = words()
    plan = spindle.make_plan(workload, "1x2:a100-80g")
    recorder = Recorder()
    spindle.train(workload, plan, optimizer=sgd, steps=2, launcher="threads", callbacks=[recorder])
    flops = dict.fromkeys(("read", "see"), 0.0)
    for metaop in spindle.make_metagraph(workload):
        flops[metaop.task] += sum(op.forward_flops + op.backward_flops for op in metaop.operators)
    first, second = recorder.steps
    assert first.mfu == pytest.approx(sum(flops.values()) / (first.step_s * 2 * 312e12))
    assert second.mfu == pytest.approx(flops["read"] / (second.step_s * 2 * 312e12))


def test_shares_are_sums_of_spans() -> None:
    """Waits count as communication; what no span covers is idle."""

    def span(kind: SpanKind, start_s: float, end_s: float) -> Span:
        return Span(rank=0, kind=kind, name="x", start_s=start_s, end_s=end_s)

    spans = [
        span(SpanKind.LOAD, 0, 1),
        span(SpanKind.FORWARD, 1, 3),
        span(SpanKind.TRANSFER, 3, 4),
        span(SpanKind.BACKWARD, 4, 8),
        span(SpanKind.REDUCE, 8, 9),
        span(SpanKind.STEP, 9, 9.5),
    ]
    told = rank_step(10.0, StepRecord(spans=spans, busy_s={"s0": 1.5}), {"t": 3})
    assert told.shares_s == {"utilization": 6.5, "communication": 2.0, "loading": 1.0}
    assert (told.step_s, told.tokens) == (10.0, {"t": 3})


def test_tokens() -> None:
    """A mask says which count; ids count whole; pictures have none."""
    ids = torch.ones(2, 3, dtype=torch.long)
    assert tokens_of({"input_ids": ids}) == 6
    assert tokens_of({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == 3
    assert tokens_of({"pixels": ids}) == 0


def test_json_lines(tmp_path: Path) -> None:
    """A line a step; a resumed run goes on in the file, a fresh one starts it anew."""
    path, runs = tmp_path / "run.jsonl", tmp_path / "runs"
    trained(words(), 2, callbacks=[JsonLines(path)])
    trained(words(), 2, callbacks=[JsonLines(path)], checkpoints=runs)
    trained(words(), 3, callbacks=[JsonLines(path)], checkpoints=runs, resume=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert set(lines[0]["losses"]) == {"read", "see"}
    assert lines[0]["mfu"] is None


def test_json_has_no_nan(tmp_path: Path) -> None:
    """A loss that is not a number is null, which every reader takes."""
    lines = JsonLines(tmp_path / "run.jsonl")
    lines.on_train_begin(None, 0)  # type: ignore[arg-type]
    lines.on_step_end(StepMetrics(step=1, step_s=1.0, losses={"t": math.nan}, mfu=math.inf))
    lines.on_train_end()
    told = json.loads((tmp_path / "run.jsonl").read_text())
    assert (told["losses"], told["mfu"]) == ({"t": None}, None)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metrics cannot be written"):
        JsonLines(tmp_path / "no" / "run.jsonl").on_train_begin(None, 0)  # type: ignore[arg-type]


def test_flat_names() -> None:
    metrics = StepMetrics(
        step=3, step_s=0.5, losses={"a": 1.0}, memory_bytes=(7, 8), learning_rates={"": 0.1}, grad_norm=2.0
    )
    found = scalars(metrics)
    assert found["loss/a"] == 1.0
    assert (found["memory_bytes/rank0"], found["memory_bytes/rank1"]) == (7.0, 8.0)
    assert found["learning_rate/all"] == 0.1
    assert found["grad_norm"] == 2.0
    assert "mfu" not in found
    assert "step" not in found


def test_tensorboard_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard("logs")


def test_a_callback_that_raises_ends_the_run() -> None:
    """Its error is the user's own; the others are still closed."""

    class Breaks(Callback):
        def on_step_end(self, metrics: StepMetrics) -> None:
            raise RunError("enough")

    recorder = Recorder()
    with pytest.raises(RunError, match="enough"):
        trained(words(), 3, callbacks=[recorder, Breaks()])
    assert recorder.told[-1] == "end"


@pytest.mark.parametrize("later", [False, True])
def test_checkpoints_are_told_when_they_are_whole(tmp_path: Path, later: bool) -> None:
    """In the order of the steps, those of `save_async` too; each is there when the callback hears of it."""

    class Saved(Callback):
        def __init__(self) -> None:
            self.found: list[tuple[int, str, bool]] = []

        def on_save(self, step: int, checkpoint: Path) -> None:
            self.found.append((step, checkpoint.name, (checkpoint / "spindle.json").is_file()))

    saved = Saved()
    trained(words(), 3, callbacks=[saved], checkpoints=tmp_path / "runs", checkpoint_every=2, save_async=later)
    assert saved.found == [(2, "step-00000002", True), (3, "step-00000003", True)]


def test_a_callback_that_would_never_be_called_is_refused() -> None:
    """A method that a run does not know, and a callback of transformers, whose methods get other arguments."""

    class Epochs(Callback):
        def on_epoch_end(self) -> None:
            raise AssertionError

    with pytest.raises(InputError, match=r"Epochs\.on_epoch_end would never be called; a run calls on_train_begin, "):
        trained(words(), 1, callbacks=[Recorder(), Epochs()])
    with pytest.raises(InputError, match=r"callbacks\[0\] is a PrinterCallback, which .* spindle\.metrics\.Callback"):
        trained(words(), 1, callbacks=[PrinterCallback()])


MODEL = Path(__file__).parents[2] / "docs" / "examples" / "quick" / "model.py"


def test_metrics_of_the_command_line(tmp_path: Path) -> None:
    """`spindle train --metrics` writes the same lines."""
    path = tmp_path / "run.jsonl"
    done = CliRunner().invoke(
        cli, ["train", str(MODEL), "--steps", "3", "--launcher", "threads", "--metrics", str(path)]
    )
    assert done.exit_code == 0, done.output
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2, 3]
    assert set(told[0]["samples_per_s"]) == {"classify", "match", "listen"}


def test_the_command_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = CliRunner().invoke(cli, ["train", str(MODEL), "--steps", "1", "--tensorboard", "logs"])
    assert "pip install tensorboard" in str(done.exception)
