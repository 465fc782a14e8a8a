"""Real models: CLIP, BERT, Whisper, Qwen2 and a ModuleList as captured; shapes, FLOPs, bytes; nothing is computed."""

import functools
import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import spindle
from spindle.capture import Captured, capture
from spindle.capture.look.samples import PROBE_SAMPLES
from spindle.values.contract import contract, expand
from spindle.values.graph import Operator
from tests.tiny_workloads import FAMILIES, WIDTH, five_families

FLOAT32 = 4


@functools.cache
def captured() -> Captured:
    return capture(five_families(torch.float32))


def layers(task: str, component: str) -> list[Operator]:
    """The blocks of a component as a task runs them."""
    path = f"{task}.{component}."
    return [op for op in captured().graph if op.name.startswith(path) and op.name.rpartition(".")[2].isdigit()]


FOUND = [
    ("image-text", "vision", 3, (6, 5, WIDTH)),  # 4 patches and the class token
    ("image-text", "text", 2, (6, 6, WIDTH)),
    ("reading", "bert", 3, (4, 7, WIDTH)),
    ("speech-text", "whisper", 2, (5, 6, WIDTH)),
    ("captioning", "lm", 3, (3, 7, WIDTH)),  # the picture and 6 words
    ("regression", "net", 3, (7, WIDTH)),
]


@pytest.mark.parametrize(("task", "component", "count", "shape"), FOUND)
def test_layers_and_their_shapes(task: str, component: str, count: int, shape: tuple[int, ...]) -> None:
    """Every layer is an operator that hands on states of the full batch, cut by samples, with a gradient back."""
    found = layers(task, component)
    assert len(found) == count
    for op in found:
        assert op.splittable
        assert [(t.shape, t.rows, t.needs_grad, t.dtype) for t in op.outputs] == [(shape, 1, True, "float32")]
        assert op.batch_size == shape[0]
    assert len({op.kind for op in found}) == 1


def attention_flops(batch: int, length: int) -> int:
    """Scores and weighted sum over all heads together: two products of length x length x width."""
    return 2 * 2 * batch * length * length * WIDTH


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def test_flops_of_a_clip_layer() -> None:
    """Four projections, attention, and a perceptron of twice the width; backward of products is twice forward."""
    op = layers("image-text", "vision")[0]
    products = 4 * linear_flops(6 * 5, WIDTH, WIDTH) + 2 * linear_flops(6 * 5, WIDTH, 2 * WIDTH)
    attention = attention_flops(6, 5)
    assert op.forward_flops == products + attention
    assert op.backward_flops == 2 * products + attention * 5 / 2  # the fused kernel computes scores anew


def test_flops_of_a_qwen_layer() -> None:
    """Half as many heads for keys and values; a gated perceptron has three products."""
    op = layers("captioning", "lm")[0]
    rows = 3 * 7
    products = 2 * linear_flops(rows, WIDTH, WIDTH) + 2 * linear_flops(rows, WIDTH, WIDTH // 2)
    products += 3 * linear_flops(rows, WIDTH, 2 * WIDTH)
    assert op.forward_flops == products + attention_flops(3, 7)


def test_flops_of_a_perceptron_layer() -> None:
    op = layers("regression", "net")[0]
    assert op.forward_flops == 2 * linear_flops(7, WIDTH, 2 * WIDTH)
    assert op.backward_flops == 2 * op.forward_flops


@pytest.mark.parametrize(
    ("task", "component", "count"),
    [
        ("image-text", "vision", 4 * (WIDTH * WIDTH + WIDTH) + 2 * 2 * WIDTH + 4 * WIDTH * WIDTH + 3 * WIDTH),
        ("regression", "net", 2 * WIDTH + 4 * WIDTH * WIDTH + 3 * WIDTH),
    ],
)
def test_parameter_bytes_of_a_layer(task: str, component: str, count: int) -> None:
    """Weights and biases of projections, norms and the perceptron, in float32, all trained."""
    op = layers(task, component)[0]
    assert sum(p.num_bytes for p in op.parameters) == FLOAT32 * count
    assert all(p.trainable for p in op.parameters)


def test_every_parameter_is_somewhere() -> None:
    """Operators hold the workload's parameters and no others; what tasks share stands under one name."""
    held = {p.name for op in captured().graph for p in op.parameters}
    unused = set(captured().parameters) - held
    assert not held - set(captured().parameters)
    assert all("post_layernorm" in name or "pooler" in name for name in unused), unused
    tasks = {op.task for op in captured().graph for p in op.parameters if p.name.startswith("text.")}
    assert tasks == {"image-text", "speech-text"}


@pytest.mark.parametrize("family", FAMILIES)
def test_expanding_the_contraction_gives_the_graph_back(family: str) -> None:
    """For every workload the tests know (section 2.1 of the paper)."""
    graph = captured().graph if family == "five_families" else capture(FAMILIES[family](torch.float32)).graph
    assert expand(contract(graph)) == graph


def test_a_captured_workload_is_not_captured_again() -> None:
    workload = FAMILIES["two_towers"](torch.float32)
    assert capture(workload) is capture(workload)
    workload.components["left"].module.eval()
    first = capture(workload)
    next(workload.components["left"].module.parameters()).requires_grad_(False)
    assert capture(workload) is not first


CALLS: list[tuple[int, int]] = []
"""Of layers that are watched: bytes in memory of the tensor (0 of fake and meta ones), and its rows."""


class Watched(nn.Module):
    """A layer that notes what it is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.out = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # while it is recorded a value says that it is on the CPU
            held = 0 if isinstance(x, FakeTensor) or x.is_meta else x.untyped_storage().nbytes()
            CALLS.append((held, int(x.shape[0])))
        y: Tensor = x + self.out(torch.tanh(self.linear(self.norm(x))))
        return y


def test_nothing_of_the_batch_s_size_is_computed_or_held() -> None:
    """A batch of 24 GiB, which would not fit: only tensors without numbers are as large; others hold a few samples."""
    rows, length = 200_000, 512
    CALLS.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*(Watched() for _ in range(3)))
    workload = spindle.Workload("large")
    workload.component("m", model)
    batch = {"x": torch.randn(1, 1, 64).expand(rows, length, 64)}  # one row in memory, seen many times

    @workload.task("t", batch_size=rows, data=[batch])
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = model(batch["x"])
        return y.square().mean()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = capture(workload).graph
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 300_000
    assert graph.operators[-2].outputs[0].shape[0] == rows
    assert max(held for held, _ in CALLS) <= 2 * PROBE_SAMPLES * length * 64 * FLOAT32  # the few samples, twice
    assert (0, rows) in CALLS
    assert graph.by_name["t.m.1"].forward_flops == 2 * 2 * rows * length * 64 * 64


def test_precision_is_part_of_what_is_captured() -> None:
    """Under bf16 products hand on bfloat16; parameters stay as they are."""
    workload = spindle.Workload("half", precision="bf16")
    model = workload.component("m", nn.Linear(64, 64))
    head = workload.component("head", nn.Sequential(*(Watched() for _ in range(2))))

    @workload.task("t", batch_size=4, data=[{"x": torch.zeros(4, 64)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(head(model(batch["x"])), batch["x"])

    graph = capture(workload).graph
    assert {p.dtype for op in graph for p in op.parameters} == {"float32"}
    assert graph.by_name["t.m.pre"].outputs[0].dtype == "bfloat16"
