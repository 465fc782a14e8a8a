"""Sizes: what operators do on batches of other sizes is what they would do had that batch come first."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.capture.sizes import ALIKE, IDLE, MEASURED, READ, Sizes, sizes_of
from spindle.values.graph import TaskGraph
from spindle.verbs.source import source_of
from spindle.workload import Batch, Workload
from tests.parity.test_lacking import batches as image_batches
from tests.parity.test_lacking import branched
from tests.parity.test_lacking import workload as image_workload
from tests.tiny_workloads import Residual

WIDTH, WORDS = 8, 11


class Model(nn.Module):
    """Words in, logits of words out, by attention and residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.more = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        for layer in (*self.layers, *self.more):
            h = layer(h)
        logits: Tensor = self.head(h)
        return logits


def text(length: int, samples: int = 4) -> Batch:
    """A batch of padded texts."""
    return {"ids": torch.randint(WORDS, (samples, length), generator=torch.Generator().manual_seed(length))}


def texts(data: Any, in_flight: int = 1) -> Workload:
    """A task that learns the next word."""
    torch.manual_seed(0)
    workload = Workload("texts", accumulate=in_flight, in_flight=in_flight)
    model = workload.component("model", Model())

    @workload.task("read", batch_size=4, data=data)
    def read(batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())

    return workload


def found(workload: Workload) -> Sizes:
    """Sizes of a workload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sizes_of(workload, capture(workload))


def amounts(graph: TaskGraph) -> list[tuple[object, ...]]:
    """All of a graph that depends on the batch."""
    return [
        (op.name, op.family, op.forward_flops, op.backward_flops, op.input_bytes, op.activation_bytes, op.output_bytes)
        for op in graph
    ]


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5, 3)])
def test_operators_do_what_they_would_if_that_batch_came_first(lengths: tuple[int, ...]) -> None:
    """FLOPs, bytes read, kept and written."""
    sizes = found(texts([text(length) for length in lengths]))
    assert len(sizes.steps) == len(lengths)
    for step, length in zip(sizes.steps, lengths, strict=True):
        assert amounts(step) == amounts(capture(texts([text(length)])).graph)


def test_micro_batches_have_batches_that_follow_each_other() -> None:
    """Two in flight: the first takes one length while the second takes the next."""
    sizes = found(texts([text(5), text(9)], in_flight=2))
    ids = [{name: batch.fields["ids"].shape[1] for name, batch in step.items()} for step in sizes.batches]
    assert ids == [{"read#0": 5, "read#1": 9}, {"read#0": 9, "read#1": 5}]


def test_of_many_batches_some_are_measured_and_the_largest_is() -> None:
    """The rest only widens the ranges."""
    lengths = [3 + index % 7 for index in range(READ - 1)] + [40]
    sizes = found(texts([text(length) for length in lengths]))
    assert len(sizes.steps) == MEASURED
    assert max(step["read"].entries["ids"] for step in sizes.batches) == 160
    assert [(r.field, r.least, r.most) for r in sizes.ranges] == [("samples", 4, 4), ("ids", 12, 160)]


def test_batches_that_are_alike_have_no_steps_and_few_are_read() -> None:
    """The planner then takes the first batch, as it is."""
    read = []

    def data() -> Iterator[Batch]:
        for index in range(100):
            read.append(index)
            yield text(5)

    workload = texts(data)
    captured = capture(workload)
    read.clear()
    sizes = sizes_of(workload, captured)
    assert (sizes.steps, sizes.batches) == ((), ())
    assert read == list(range(ALIKE))


def test_a_loader_that_breaks_later_counts_as_far_as_it_goes() -> None:
    """It is told when the run gets there."""

    def data() -> Iterator[Batch]:
        yield text(5)
        yield text(7)
        raise OSError("a broken file")

    assert len(found(texts(data)).steps) == 2


def test_reading_changes_neither_batches_nor_generators() -> None:
    """A task that writes to its batch, and a loader that shuffles."""
    order = []

    def data() -> Iterator[Batch]:
        for length in torch.randperm(6).tolist():
            order.append(length)
            yield {"x": torch.ones(2, 3 + length)}

    listed = [{"x": torch.ones(2, 3 + length)} for length in range(3)]
    for given in (data, listed):
        torch.manual_seed(0)
        workload = Workload("writes")
        layer = workload.component("layer", nn.Linear(1, 4))

        @workload.task("t", batch_size=2, data=given)
        def t(batch: Batch, layer: Any = layer) -> Tensor:
            batch["x"].mul_(2)
            loss: Tensor = layer(batch["x"][..., None]).square().mean()
            return loss

        captured = capture(workload)
        before = torch.get_rng_state()
        assert len(sizes_of(workload, captured).steps) == len(given if isinstance(given, list) else range(6))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(batch["x"], torch.ones_like(batch["x"])) for batch in listed)


def test_layers_that_a_batch_leaves_out_do_nothing_in_it() -> None:
    """A batch without an image takes no time of the image tower, and is not measured."""
    sizes = found(image_workload(branched).workload)
    kinds = [{op.kind for op in step if op.component == "vision"} for step in sizes.steps]
    assert [IDLE in found for found in kinds] == [False, True, False]
    assert all(op.forward_flops == 0 for op in sizes.steps[1] if op.component == "vision")
    assert 1 not in sizes.telling()


def test_units_tell_the_slowest_part() -> None:
    """Four samples with 1, 0, 2 and 1 images: the best cut leaves three of the four images on one side."""
    sizes = found(image_workload(branched).workload)
    layer = next(op for op in sizes.steps[0] if op.name == "see.vision.0")
    assert layer.unit == "pixels"
    assert layer.units is not None
    assert layer.units.slowest("pixels", 2) == pytest.approx(1.5)
    assert layer.units.slowest("samples", 2) == 1.0


def test_a_source_has_the_same_metaops_in_every_step() -> None:
    """So that one plan holds for all."""
    source = source_of(texts([text(5), text(9)]))
    names = [metaop.name for metaop in source.metagraph]
    assert [[metaop.name for metaop in step] for step in source.steps] == [names, names]
    assert [flow.num_bytes for flow in source.steps[0].flows] < [flow.num_bytes for flow in source.steps[1].flows]


def test_the_plan_is_for_the_mean_and_tells_the_spread() -> None:
    """Of steps with texts of 16 and of 64 words: in between, with memory for the longer."""
    short, long = (spindle.make_plan(texts([text(length)]), "1x2:cpu") for length in (16, 64))
    both = spindle.make_plan(texts([text(16), text(64)]), "1x2:cpu")
    assert short.spread is None
    assert both.spread is not None
    assert short.makespan_s < both.makespan_s < long.makespan_s
    assert both.spread.p10_s < both.spread.mean_s < both.spread.p90_s
    assert "batches    differ in size" in str(both)
    assert max(both.memory.peak_bytes_per_device) >= max(long.memory.peak_bytes_per_device)
    assert {(size.field, size.least, size.most) for size in both.sizes} == {("samples", 4, 4), ("ids", 64, 256)}


def test_fields_of_images_that_a_batch_lacks_do_not_narrow_its_range() -> None:
    """The range of a field is of the batches that have it."""
    sizes = found(image_workload(branched).workload)
    pixels = next(size for size in sizes.ranges if size.field == "pixels")
    counts = [batch["pixels"].numel() for batch in image_batches("missing") if "pixels" in batch]
    assert (pixels.least, pixels.most) == (min(counts), max(counts))
