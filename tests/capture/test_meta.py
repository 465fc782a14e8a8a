"""Models on the meta device: captured as if they were in memory, in moments and in next to no memory."""

import resource
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

import spindle
from spindle.capture import Captured, capture
from spindle.capture.look.samples import LONG, shortened
from spindle.errors import WorkloadError
from spindle.record.on_meta.made_up import LARGE, MadeUpProducts, is_made_up, made_up, own_numbers
from tests.capture.capture_models import Coupled, Experts, Rotary
from tests.refusals import Refusal, check_refusal, each
from tests.tiny_workloads import WIDTH, Residual, floats, tokens

BATCH, LENGTH = 6, LONG + 9


class Padded(nn.Module):
    """Attention over texts that are padded; `mixes`: it also subtracts the mean over the batch."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.mixes = mixes
        self.words = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        if self.mixes:
            x = x - x.mean(0)
        if not bool(mask.all()):
            x = x.masked_fill(mask[..., None] == 0, 0)
        y: Tensor = x
        return y


class MixingLayer(nn.Module):
    """A layer in which samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x - x.mean(0))
        return y


class Mixing(nn.Module):
    """Layers in which samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(MixingLayer() for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = x * mask[..., None]
        return y


def llama(**options: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
            "use_cache": False,
            **options,
        }
    )
    return LlamaForCausalLM(config)


def clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50
    )
    return CLIPTextModel(config)


def numbers(*shape: int) -> Tensor:
    return floats(*shape, seed=0, dtype=torch.float32)


def padding() -> Tensor:
    return (torch.arange(LENGTH) < torch.arange(10, 10 + 11 * BATCH, 11)[:, None]).long()


def texts(mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"ids": tokens(BATCH, LENGTH, seed=0), "mask": torch.ones(BATCH, LENGTH).long() if mask is None else mask}


Task = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def of_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(batch["ids"], batch["mask"]).square().mean()
    return result


def of_llama(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["ids"]).loss
    return result


def of_clip(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state.square().mean()
    return result


def of_coupled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(batch["x"], batch["y"]).square().mean()
    return result


def of_floats(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = F.cross_entropy(model(batch["x"]), batch["y"])
    return result


def of_lengths(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(batch["x"], batch["lengths"]).square().mean()
    return result


MODELS: dict[str, tuple[Callable[[], nn.Module], Task, dict[str, Tensor]]] = {
    "llama": (llama, of_llama, texts()),
    "llama on padded texts": (llama, of_llama, texts(padding())),
    "clip, whose positions are a buffer": (clip, of_clip, texts(padding())),
    "padded texts": (lambda: Padded(mixes=False), of_text, texts(padding())),
    "glue that mixes samples": (lambda: Padded(mixes=True), of_text, texts(padding())),
    "layers that mix samples": (Mixing, of_text, texts()),
    "layers in pairs": (Coupled, of_coupled, {"x": numbers(BATCH, 3, WIDTH), "y": numbers(BATCH, 3, WIDTH)}),
    "experts that values choose": (Experts, of_floats, {"x": numbers(BATCH, 5), "y": torch.arange(BATCH) % 3}),
}


def captured_of(model: nn.Module, task: Task, batch: dict[str, Tensor]) -> Captured:
    workload = spindle.Workload("w")
    workload.component("m", model)
    workload.task("t", batch_size=BATCH, data=[batch])(lambda b: task(model, b))
    return capture(workload)


@pytest.mark.filterwarnings("ignore:task 't'")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_meta_is_captured_like_one_in_memory(name: str) -> None:
    """The same operators: what mixes samples, FLOPs, bytes, shapes, kinds."""
    build, task, batch = MODELS[name]
    here = captured_of(build(), task, batch)
    with torch.device("meta"):
        model = build()
    there = captured_of(model, task, batch)
    by_values = "choose" in name  # what is kept for backward follows from the weights there
    assert [replace(op, activation_bytes=op.activation_bytes * (not by_values)) for op in there.graph] == [
        replace(op, activation_bytes=op.activation_bytes * (not by_values)) for op in here.graph
    ]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_rotary_frequencies_are_those_of_a_model_in_memory() -> None:
    """Buffers that no file holds are computed as transformers does."""
    with torch.device("meta"):
        model = llama()
    captured_of(model, of_llama, texts())
    for (name, own), (_, other) in zip(model.named_buffers(), llama().named_buffers(), strict=True):
        assert torch.equal(own, other), name


def test_layers_larger_than_memory_are_captured() -> None:
    """4 billion parameters a layer; neither they nor a gradient of theirs are ever there."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(65536, 65536) for _ in range(3)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = {"x": numbers(4, 65536), "y": torch.zeros(4)}
    captured = captured_of(model, lambda m, b: m(b["x"]).square().mean(), batch)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert len(captured.graph) == 2  # the layers as one operator, and the loss


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_products_with_made_up_matrices(outs: int, ins: int, rows: int, has_bias: bool, seed: int) -> None:
    """Computed by Fourier transforms they are what the matrix itself gives, also for a part of its rows, on either
    side, in backward, and cast to another type.
    """
    generator = torch.Generator().manual_seed(seed)
    line = torch.randn(outs + ins - 1, generator=generator, dtype=torch.float64)
    weight = line.as_strided((outs, ins), (1, 1))
    x, bias = torch.randn(rows, ins, dtype=torch.float64), torch.randn(outs, dtype=torch.float64) if has_bias else None
    for own in (weight, weight[outs // 2 :]):
        own_bias = None if bias is None else bias[: len(own)]
        given = x.clone().requires_grad_()
        with MadeUpProducts():
            found, other, cast_down = F.linear(given, own, own_bias), own @ x.t(), own.float()
            torch.autograd.backward(found.square().sum())
        learned = x.clone().requires_grad_()
        expected = F.linear(learned, own.contiguous(), own_bias)
        torch.autograd.backward(expected.square().sum())
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert given.grad is not None
        assert learned.grad is not None
        assert torch.allclose(given.grad, learned.grad, rtol=1e-9, atol=1e-9)
        assert torch.allclose(other, own.contiguous() @ x.t(), rtol=1e-9, atol=1e-9)
        assert torch.equal(cast_down, own.contiguous().float())


def test_products_of_groups() -> None:
    """Experts whose matrices are stacked: each group of rows times its own."""
    weight = made_up(torch.empty(4, 800, 400, device="meta"), torch.Generator().manual_seed(0))
    x = torch.randn(21, 400, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([5, 5, 12, 21], dtype=torch.int32)
    with MadeUpProducts():
        found = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        batched = torch.bmm(x[:20].reshape(4, 5, 400), weight.transpose(1, 2))
    groups = zip([0, 5, 5, 12], ends.tolist(), weight, strict=True)
    expected = torch.cat([x[low:high] @ matrix.t().contiguous() for low, high, matrix in groups])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        batched, x[:20].reshape(4, 5, 400) @ weight.transpose(1, 2).contiguous(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(3, 5), (2000, 1000), (8, 700, 300), (64, 64, 16, 16), (2 * LARGE,)])
def test_made_up_tensors(shape: tuple[int, ...]) -> None:
    """They have the shape, take little memory, and no two rows are alike."""
    value = made_up(torch.empty(shape, device="meta"), torch.Generator().manual_seed(0))
    assert tuple(value.shape) == shape
    assert is_made_up(value) == (len(shape) > 1 and value.numel() > LARGE)
    if len(shape) > 1:
        assert own_numbers(value).numel() <= LARGE
        assert len(set(value.flatten(1)[:, :9].sum(1).tolist())) == shape[0]


def test_short_texts_keep_their_padding() -> None:
    """Some positions of all of a text, and of fields as long as it; other fields stay."""
    from spindle.inputs.batch import sampled

    long = sampled("t", {**texts(padding()), "x": numbers(BATCH, 3), "bias": numbers(BATCH, LENGTH, LENGTH)}, {}, BATCH)
    short = next(shortened(long)).fields
    size = short["ids"].shape[1]
    assert size < LONG
    assert short["mask"].shape == (BATCH, size)
    assert short["bias"].shape == (BATCH, size, size)
    assert short["x"].shape == (BATCH, 3)
    assert torch.allclose(short["mask"].float().mean(1), padding().float().mean(1), atol=0.1)


class Counted(nn.Module):
    """A buffer that its own formula fills."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.steps
        return y


class Held(nn.Module):
    """A plain tensor that its own formula fills."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.steps = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.steps
        return y


def _on_meta(build: type[nn.Module]) -> Captured:
    with torch.device("meta"):
        model = build()
    return captured_of(model, of_floats, {"x": numbers(BATCH, 4), "y": torch.arange(BATCH) % 3})


REFUSALS: dict[str, Refusal] = {
    "a buffer": (lambda: _on_meta(Counted), "'m.steps'", "nothing tells its values", "lambda: Counted(...)"),
    "an attribute": (lambda: _on_meta(Held), "'steps'", "nothing tells its values", "lambda: Held(...)"),
}


@each(REFUSALS)
def test_values_that_nothing_tells_are_refused(refusal: Refusal) -> None:
    """Numbers that code computes with are never made up."""
    check_refusal(refusal, WorkloadError)


@pytest.mark.parametrize("build", [Counted, Held])
def test_a_function_builds_modules_without_parameters(build: type[nn.Module]) -> None:
    """Parameters take no memory, tied ones stay tied; all else that `__init__` computes is there."""
    workload = spindle.Workload("w")
    model = workload.component("m", lambda: build())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert cast(Tensor, model.steps).tolist() == [0, 1, 2, 3]
    batch = {"x": numbers(BATCH, 4), "y": torch.arange(BATCH) % 3}
    workload.task("t", batch_size=BATCH, data=[batch])(lambda b: of_floats(model, b))
    assert list(capture(workload).graph) == list(captured_of(build(), of_floats, batch).graph)


def test_tied_parameters_stay_tied() -> None:
    """Whether the module ties them after or as it registers them."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.zeros(4, 4))
            self.one, self.other = weight, weight

    model = spindle.Workload("w").component("m", lambda: Tied())
    assert model.one is model.other
    assert model.one.is_meta
    tied = spindle.Workload("w").component("m", lambda: llama(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_rotary_of_other_models() -> None:
    """A model of one's own with real buffers and empty parameters."""
    model = spindle.Workload("w").component("m", lambda: Rotary())
    batch = {"x": numbers(BATCH, 7, WIDTH), "lengths": torch.arange(1, BATCH + 1)}
    here, there = captured_of(Rotary(), of_lengths, batch), captured_of(model, of_lengths, batch)
    assert list(there.graph) == list(here.graph)
