"""Blocks: which layers are found by rule, and how a user names them."""

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.capture.blocks import find_blocks
from spindle.errors import WorkloadError
from tests.tiny_workloads import Residual, bert, clip_text, clip_vision, qwen2, whisper


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.lower = nn.ModuleList(Residual(4) for _ in range(2))
        self.upper = nn.Sequential(*(Residual(4) for _ in range(3)))
        self.lone = Residual(4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def paths(model: nn.Module, **options: object) -> list[str]:
    return [block.path for block in find_blocks("m", model, **options)]  # type: ignore[arg-type]


def test_lists_of_equal_layers_are_found() -> None:
    """Lists of one class with something inside; not lists of plain linear layers, not what stands alone."""
    assert paths(Model()) == ["lower.0", "lower.1", "upper.0", "upper.1", "upper.2"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (clip_vision, "vision_model.encoder.layers"),
        (clip_text, "text_model.encoder.layers"),
        (bert, "encoder.layer"),
        (whisper, "layers"),
        (qwen2, "layers"),
    ],
)
def test_layers_of_known_families_are_found(model: object, expected: str) -> None:
    """By rule, from the modules alone; the tail of the path is enough, since its head moves between releases."""
    built = model()  # type: ignore[operator]
    found = paths(built)
    assert len(found) == built.config.num_hidden_layers
    assert all(path.rpartition(".")[0].endswith(expected.rpartition(".")[2]) for path in found)


def test_the_top_most_list_wins() -> None:
    """Blocks inside a block are part of it."""
    nested = nn.ModuleList(nn.Sequential(Residual(4), Residual(4)) for _ in range(2))
    assert paths(nn.ModuleDict({"outer": nested})) == ["outer.0", "outer.1"]


@pytest.mark.parametrize("layers", ["heads", ["heads"]])
def test_a_list_named_by_its_path(layers: object) -> None:
    assert paths(Model(), layers=layers) == ["heads.0", "heads.1", "heads.2", "heads.3"]


def test_a_single_block_named_by_its_path() -> None:
    assert paths(Model(), layers=["lone", "upper"]) == ["lone", "upper.0", "upper.1", "upper.2"]


def test_no_layers_at_all() -> None:
    assert paths(Model(), layers=()) == []


def test_a_missing_list_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"component 'm' has no list 'middle'; its lists are lower, upper, heads"):
        paths(Model(), layers="middle")


def test_layers_given_as_modules() -> None:
    """What the user has at hand, in place of its path."""
    workload, model = spindle.Workload("w"), Model()
    workload.component("m", model, layers=[model.lone, model.upper])
    assert workload.components["m"].layers == ("lone", "upper")
    workload.component("n", (other := Model()), layers=other.lower)
    assert workload.components["n"].layers == ("lower",)


def test_a_function_among_layers_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"layers holds a builtin_function_or_method; .* put it into a module"):
        spindle.Workload("w").component("m", Model(), layers=[torch.relu])  # type: ignore[list-item]


def test_a_layer_of_another_model_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"layers holds a Residual that is not inside it; .* of its own"):
        spindle.Workload("w").component("m", Model(), layers=[Residual(4)])
