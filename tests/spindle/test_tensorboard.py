"""TensorBoard by its own package: what a run writes is read back from the event files."""

from pathlib import Path

import pytest
import torch

from spindle.metrics import StepMetrics, TensorBoard, scalars
from tests.spindle.test_metrics import Recorder, trained, words

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def written(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars by name and step, as TensorBoard shows them."""
    events = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_a_run_is_read_back(tmp_path: Path) -> None:
    """Every number of every step, in the float32 that TensorBoard keeps."""
    recorder = Recorder()
    trained(words(), 4, callbacks=[TensorBoard(tmp_path), recorder])
    found = written(tmp_path)
    assert [m.step for m in recorder.steps] == [1, 2, 3, 4]
    for metrics in recorder.steps:
        for name, value in scalars(metrics).items():
            assert found[name][metrics.step] == torch.tensor(value, dtype=torch.float32).item()
    assert {"loss/read", "loss/see", "step_s", "idle", "memory_bytes/rank0", "learning_rate/table"} <= set(found)
    assert set(found["loss/see"]) == {1, 3}  # every second step


def test_a_resumed_run_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    """A run that got to step 3 is resumed after step 2: its step 3 is the one that stays."""
    for first, steps, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 5.0)):
        board = TensorBoard(tmp_path)
        board.on_train_begin(None, first)  # type: ignore[arg-type]
        for step in steps:
            board.on_step_end(StepMetrics(step=step, step_s=0.5, losses={"t": loss}))
        board.on_train_end()
    assert written(tmp_path)["loss/t"] == {1: 1.0, 2: 1.0, 3: 5.0, 4: 5.0}
