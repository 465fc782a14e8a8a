"""Parity on batches that lack a modality: no sample has an image, or the batch has no field of images at all."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture.grouping import Order
from spindle.capture.look.samples import modalities
from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch, sampled
from spindle.runtime.parity import ParityReport
from spindle.values.plan import Plan
from spindle.workload import Batch, Workload
from tests.late_transport import late
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import Residual

WIDTH, WORDS, IMAGE = 8, 11, 2
IMAGES = ((1, 0, 2, 1), (0, 0, 0, 0), (2, 0, 0, 1))  # of each sample of each batch

Code = Callable[[Batch, "Parts"], Tensor]


class Parts:
    """The components of a model that looks at images and reads words, and their workload."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.workload = Workload("lacking")
        self.vision = self._add("vision", nn.Sequential(*(Residual(WIDTH) for _ in range(3))))
        self.words = self._add("words", nn.Embedding(WORDS, WIDTH))
        self.lm = self._add("lm", nn.Sequential(*(Residual(WIDTH) for _ in range(3))))
        self.head = self._add("head", nn.Linear(WIDTH, WORDS))

    def _add(self, name: str, module: nn.Module) -> Any:
        return self.workload.component(name, module.double())

    def merged(self, batch: Batch) -> Tensor:
        """Words with the features of images among them."""
        where = (batch["ids"] == IMAGE)[..., None]
        words = self.words(batch["ids"])
        found: Tensor = words.masked_scatter(where.expand_as(words), self.vision(batch["pixels"]))
        return found

    def loss(self, batch: Batch, h: Tensor) -> Tensor:
        """The loss of the next word."""
        logits = self.head(self.lm(h))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


def has_images(batch: Batch) -> bool:
    """Whether a batch has any image."""
    return batch.get("pixels") is not None and len(batch["pixels"]) > 0


def branched(batch: Batch, parts: Parts) -> Tensor:
    """One line more where there are images."""
    h = parts.words(batch["ids"])
    if has_images(batch):
        where = (batch["ids"] == IMAGE)[..., None].expand_as(h)
        h = h.masked_scatter(where, parts.vision(batch["pixels"]))
    return parts.loss(batch, h * 1.5)


def apart(batch: Batch, parts: Parts) -> Tensor:
    """Other lines without images."""
    if has_images(batch):
        return parts.loss(batch, parts.merged(batch) * 1.5)
    return parts.loss(batch, parts.words(batch["ids"]) * 1.5)


def two_losses(batch: Batch, parts: Parts) -> Tensor:
    """A second loss where there are images."""
    loss = parts.loss(batch, parts.words(batch["ids"]))
    if has_images(batch):
        loss = loss + parts.vision(batch["pixels"]).square().mean()
    return loss


def added_later(batch: Batch, parts: Parts) -> Tensor:
    """Features of images join between layers."""
    h = parts.lm[0](parts.words(batch["ids"]))
    if has_images(batch):
        where = batch["ids"] == IMAGE
        h = h.clone()
        h[where] = h[where] + parts.vision(batch["pixels"])
    return F.mse_loss(parts.lm[2](parts.lm[1](h)), torch.ones_like(h))


def batches(form: str) -> list[Batch]:
    """Batches of which the second has no image: its field is "missing", "none", or "empty"."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for images in IMAGES:
        ids = torch.randint(3, WORDS, (len(images), 6), generator=generator)
        for row, count in zip(ids, images, strict=True):
            row[:count] = IMAGE
        batch: Batch = {"ids": ids}
        if any(images) or form == "empty":
            batch["pixels"] = torch.randn(sum(images), WIDTH, generator=generator, dtype=torch.float64)
        elif form == "none":
            batch["pixels"] = None
        found.append(batch)
    return found


def rows(batch: Batch) -> Mapping[str, Any]:
    """Images of each sample; a batch without the field counts none."""
    return {"pixels": (batch["ids"] == IMAGE).sum(1)} if batch.get("pixels") is not None else {}


def workload(
    code: Code, form: str = "missing", *, is_listed: bool = False, order: tuple[int, ...] = (0, 1, 2)
) -> Parts:
    """A task of such batches."""
    parts = Parts()
    data = [batches(form)[index] for index in order]
    given = data if is_listed else lambda: data
    parts.workload.task("see", batch_size=4, data=given, rows=rows)(lambda batch: code(batch, parts))
    return parts


def plan_of(made: Workload, num_ranks: int, seed: int | None) -> Plan:
    """The widest plan, or a random one."""
    metagraph = spindle.make_metagraph(made)
    return widest_plan(metagraph, num_ranks) if seed is None else random_plan(metagraph, num_ranks, seed)


def verified(parts: Parts, num_ranks: int = 2, seed: int | None = None, launcher: Any = "threads") -> ParityReport:
    """Each batch is a step."""
    plan = plan_of(parts.workload, num_ranks, seed)
    return spindle.verify(parts.workload, plan, steps=3, launcher=launcher, timeout_s=30.0)


@pytest.mark.parametrize("code", [branched, apart, two_losses, added_later])
@pytest.mark.parametrize("form", ["missing", "none", "empty"])
@pytest.mark.parametrize(("num_ranks", "seed"), [(2, None), (3, 1), (3, 2)])
def test_a_batch_without_images_is_exact(code: Code, form: str, num_ranks: int, seed: int | None) -> None:
    """Layers of the image tower get zero gradients, all others those of one process."""
    report = verified(workload(code, form), num_ranks, seed)
    assert report.ok, str(report)


@pytest.mark.gloo
def test_processes_agree_too() -> None:
    """No message waits for what a rank does not send."""
    report = verified(workload(apart), 3, 1, "processes")
    assert report.ok, str(report)


def test_a_list_that_begins_with_such_a_batch_is_taken_from_the_fullest() -> None:
    """Capture begins with a batch that has images."""
    report = verified(workload(branched, is_listed=True, order=(1, 0, 2)))
    assert report.ok, str(report)


def test_a_loader_that_begins_with_such_a_batch_is_refused_later() -> None:
    """Its field is unknown then, and no rows= show that others have images."""
    with pytest.raises(WorkloadError, match=r"step 2: calls vision\.0 \(line \d+ of .*\) once, but not at all"):
        verified(workload(branched, order=(1, 0, 2)))


def test_frozen_words_and_no_image_train_what_is_left() -> None:
    """Of a value that needs no gradient without images, none is asked for."""
    parts = workload(branched)
    parts.words.requires_grad_(False)
    report = verified(parts, 3, 2)
    assert report.ok, str(report)


def test_recomputed_layers_are_exact() -> None:
    """Activations of a tower that is not called are not computed again."""
    parts = workload(branched)
    parts.workload.recompute = frozenset({"vision", "lm"})
    report = verified(parts, 3, 1)
    assert report.ok, str(report)


def test_a_loss_without_gradient_counts_and_trains_nothing() -> None:
    """Only images train here, and a batch has none."""
    parts = workload(two_losses)
    for module in (parts.words, parts.lm, parts.head):
        module.requires_grad_(False)
    report = verified(parts)
    assert report.ok, str(report)


def test_a_loader_is_read_on_past_a_batch_that_lacks_a_unit() -> None:
    """One image in each sample cannot be told from samples; the next batch has none, and rows= leaves the name out."""
    parts = Parts()
    data = [batches("missing")[index] for index in (0, 1, 2)]
    data[0]["ids"][:, :2] = 3
    data[0]["ids"][:, 0] = IMAGE

    def centered(batch: Batch) -> Tensor:
        h = parts.words(batch["ids"])
        if has_images(batch):
            seen = parts.vision(batch["pixels"])
            h = h.masked_scatter((batch["ids"] == IMAGE)[..., None].expand_as(h), seen - seen.mean(0))
        return parts.loss(batch, h)

    parts.workload.task("see", batch_size=4, data=lambda: data, rows=rows)(centered)
    report = verified(parts, 3, 1)
    assert report.ok, str(report)


# -- what must be refused ---------------------------------------------------------------------------------------------


def test_parts_that_call_other_layers_end_the_run_in_a_sentence() -> None:
    """A branch by values, which the samples of two ranks take apart, must not leave one waiting for the other."""

    def by_value(batch: Batch, parts: Parts) -> Tensor:
        h = parts.words(batch["ids"])
        if has_images(batch):
            h = h.masked_scatter((batch["ids"] == IMAGE)[..., None].expand_as(h), parts.vision(batch["pixels"]))
        if has_images(batch) or bool((batch["ids"][0] > 6).any()):
            h = parts.lm[0](h)
        return F.mse_loss(parts.lm[2](parts.lm[1](h)), torch.ones_like(h))

    parts = workload(by_value)
    text = batches("missing")[1]
    text["ids"][:2], text["ids"][2:] = 7, 4
    parts.workload.tasks.clear()
    data = [batches("missing")[0], text]
    parts.workload.task("see", batch_size=4, data=lambda: data, rows=rows)(lambda batch: by_value(batch, parts))
    with pytest.raises(WorkloadError, match=r"task 'see', step 2: for some samples .* other layers than for others"):
        verified(parts)


def test_other_random_numbers_are_refused() -> None:
    """Noise on images alone moves the place of what is drawn after it."""

    def noisy(batch: Batch, parts: Parts) -> Tensor:
        h = parts.words(batch["ids"])
        if has_images(batch):
            seen = parts.vision(batch["pixels"])
            h = h.masked_scatter((batch["ids"] == IMAGE)[..., None].expand_as(h), seen + torch.randn_like(seen))
        return parts.loss(batch, F.dropout(h, 0.2))

    with pytest.raises(
        WorkloadError, match=r"lacks 'pixels', which the first batch had; .* draws other random numbers"
    ):
        verified(workload(noisy))


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    """With images the words count without a gradient only; without, the same tensor would have to bring one back."""

    def detached(batch: Batch, parts: Parts) -> Tensor:
        h = parts.words(batch["ids"])
        if has_images(batch):
            where = (batch["ids"] == IMAGE)[..., None].expand_as(h)
            h = h.detach().masked_scatter(where, parts.vision(batch["pixels"]))
        return parts.loss(batch, h)

    with pytest.raises(WorkloadError, match=r"lacks 'pixels'.* trains 'words\.weight'"):
        verified(workload(detached))


# -- values -----------------------------------------------------------------------------------------------------------


def batch_of(fields: Batch, **rows: Any) -> SampledBatch:
    """A batch of two samples."""
    return sampled("task", fields, rows, 2)


def test_what_a_batch_holds() -> None:
    """None and units without rows count as nothing."""
    batch = batch_of({"x": torch.ones(2), "pixels": torch.ones(0, 3), "sound": None}, pixels=[0, 0], words=[1, 2])
    assert batch.held == {"x", "samples", "words"}
    assert batch_of({"x": torch.ones(2), "pixels": torch.ones(3)}, pixels=[0, 3]).held == {"x", "samples", "pixels"}


def test_modalities_are_fields_that_the_same_samples_have() -> None:
    """Patches and grids of images together, sounds apart, and all of them."""
    fields = {"x": torch.ones(2), "patches": torch.ones(3), "grid": torch.ones(1), "sound": torch.ones(4)}
    found = modalities(batch_of(fields, patches=[3, 0], grid=[1, 0], sound=[1, 3]))
    assert found == [{"patches", "grid"}, {"sound"}, {"patches", "grid", "sound"}]
    assert modalities(batch_of({"x": torch.ones(2)})) == []


def test_a_batch_without_some_fields_has_no_rows_of_them() -> None:
    """Other fields and units stay."""
    batch = batch_of({"x": torch.ones(2), "patches": torch.ones(3)}, patches=[3, 0], words=[1, 1])
    without = batch.without({"patches"})
    assert set(without.fields) == {"x"}
    assert without.units.rows("patches", 0, 2) == 0
    assert without.units.rows("words", 0, 2) == 2
    assert without.units.rows("never counted", 0, 2) == 0


def test_a_frontier_without_blocks_that_are_not_called() -> None:
    """The blocks before them take their place, unless another that is waited for waits for these."""
    order = Order({"a": (), "b": ("a",), "v": (), "w": ("v",), "c": ("b", "w")})
    assert order.without(("b", "w"), {"a", "b", "v", "w"}) == ("b", "w")
    assert order.without(("b", "w"), {"a", "b"}) == ("b",)
    assert order.without(("c",), {"a", "b", "v"}) == ("b", "v")
    assert order.without(("b", "c"), {"a", "b"}) == ("b",)
    assert order.without(("w",), {"a"}) == ()


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("sharded", [(), ("vision",), ("vision", "lm")], ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_optimizer_lets_a_tower_rest(
    sharded: tuple[str, ...], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a rank has no image and another one has: each has a flag, and their sum is what counts."""
    monkeypatch.setattr(f"{__name__}.IMAGES", ((2, 1, 2, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)))

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3, eps=1e-3)

    alone, made = (workload(branched, order=(0, 1, 2, 3)).workload for _ in range(2))
    expected = dict(alone.named_parameters())
    stepping = adamw(expected.values())
    for batch in alone.tasks["see"].batches():
        stepping.zero_grad()
        torch.autograd.backward(alone.tasks["see"].function(dict(batch)))
        stepping.step()
    plan = random_plan(spindle.make_metagraph(made), num_ranks, 1, on_all=sharded)
    report = spindle.verify(made, plan, steps=4, optimizer=adamw, launcher="threads", timeout_s=30.0)
    assert report.ok, str(report)
    with late():
        spindle.train(made, plan, steps=4, optimizer=adamw, launcher="threads", timeout_s=30.0)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12)
