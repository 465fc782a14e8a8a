"""What a run asks of Ray's nodes, and what it refuses."""

import pytest

import spindle
from spindle.errors import InputError
from spindle.files.clusterfile import device_types
from spindle.metrics import RayMetrics
from spindle.runtime.launch.ray_room import RAY_TYPES
from tests.printed.conftest import Spindle, spindle_command
from tests.refusals import Refusal, check_refusal, each
from tests.spindle.test_metrics import trained, words

__all__ = ["spindle_command"]  # a fixture

REFUSED: dict[str, Refusal] = {
    "no time": (lambda: spindle.RayNodes(wait_s=0), "wait_s is 0", "seconds", "above 0"),
    "no type": (lambda: spindle.RayNodes(accelerator_type=""), "accelerator_type is ''", "as Ray names it", "H100"),
    "no labels": (
        lambda: spindle.RayNodes(label_selector="spot"),  # type: ignore[arg-type]
        "label_selector is 'spot'",
        "labels of nodes with values",
        "{'market-type': '!spot'}",
    ),
}


@each(REFUSED)
def test_what_is_refused(refusal: Refusal) -> None:
    check_refusal(refusal, InputError)


def test_built_in_gpus_have_a_name_of_ray() -> None:
    """All of them: else a plan for one would go to any GPU without a word."""
    assert RAY_TYPES.keys() == device_types().keys() - {"cpu"}


def test_runs_that_are_not_on_ray() -> None:
    """Metrics for Ray end such a run before its first step; nodes that are asked for are said to be left out."""
    with pytest.raises(InputError, match="RayMetrics gives numbers to Ray, and this run is not on Ray; train with"):
        trained(words(), 1, callbacks=[RayMetrics()])
    with pytest.warns(UserWarning, match="ray_nodes is given and the launcher is 'threads', which asks nothing"):
        trained(words(), 1, ray_nodes=spindle.RayNodes(wait_s=60))


def test_labels_on_the_command_line(spindle_command: Spindle) -> None:
    done = spindle_command("train", "model.py", "--steps", "1", "--node-label", "spot")
    assert (done.code, "'spot' is not KEY=VALUE, for instance market-type=!spot." in done.said) == (2, True)
