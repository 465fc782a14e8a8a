"""Profiler: what is known is not measured again, what does not belong together is refused."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spindle
from spindle.capture import Captured, capture
from spindle.errors import ProfileError
from spindle.runtime.profiling.bench_target import BenchTarget
from spindle.runtime.profiling.measure import MIN_REPEATS
from spindle.runtime.profiling.profiler import MESSAGE_BYTES, measure_profile
from spindle.runtime.profiling.rounds import counts_to_measure
from spindle.values.profile import Profile
from spindle.workload import Batch, Workload
from tests.capture.test_sizes import text, texts
from tests.parity.test_lacking import IMAGE, Parts
from tests.parity.test_lacking import workload as image_workload
from tests.tiny_workloads import cut_language_model, two_towers


def taken_whole(batch: Batch, parts: Parts) -> torch.Tensor:
    """A tower that cannot take no image at all."""
    if not len(batch["pixels"]):
        raise ValueError("no image")
    return parts.loss(batch, parts.merged(batch))


@functools.cache
def captured() -> tuple[Workload, Captured]:
    workload = two_towers(torch.float32)
    return workload, capture(workload)


def profile(known: Profile | None = None, *, num_devices: int = 2, num_ranks: int = 1) -> tuple[Profile, int]:
    """A profile, and how many entries were measured for it."""
    told = [0]
    found = measure_profile(
        *captured(),
        num_devices=num_devices,
        target=BenchTarget(1, num_ranks),
        known=known,
        optimizer=torch.optim.AdamW,
        seconds_per_entry=0.0,
        progress=lambda done, total: told.append(total),
    )
    return found, told[-1]


@functools.cache
def whole() -> Profile:
    return profile()[0]


def test_a_whole_profile_is_not_measured_again() -> None:
    assert profile(whole()) == (whole(), 0)


def test_where_batches_differ_three_sizes_are_measured() -> None:
    """A small, a middle and a large one; a plan takes them for the sizes in between."""
    workload = texts([text(length) for length in (4, 20, 8, 12, 16)])
    found = measure_profile(workload, capture(workload), num_devices=2, seconds_per_entry=0.0)
    sizes = {family: {entry.size for entry in entries} for family, entries in found.by_family.items()}
    assert all(len(each) == 3 for each in sizes.values())
    assert {entry.num_devices for entry in found.entries} == {1, 2}
    again = measure_profile(workload, capture(workload), num_devices=2, known=found, seconds_per_entry=0.0)
    assert again == found
    plan = spindle.make_plan(workload, "1x2:cpu", profile=found)
    assert plan.spread is not None
    assert plan.spread.steps == 5


def test_layers_are_measured_on_parts_that_have_images() -> None:
    """Where the images are those of the last samples, half a batch by number of samples has none."""
    workload = image_workload(taken_whole, "missing", order=(0, 2)).workload
    task = workload.tasks["see"]
    last = [{**b, "ids": b["ids"].flip(0)} for b in task.batches()]
    workload.tasks["see"] = replace(task, data=[{**b, "ids": sorted_by_images(b["ids"])} for b in last])
    workload.captured = None
    found = measure_profile(workload, capture(workload), num_devices=2, seconds_per_entry=0.0)
    assert {entry.num_devices for entry in found.entries} == {1, 2}


def sorted_by_images(ids: torch.Tensor) -> torch.Tensor:
    """Samples with the fewest images first."""
    return ids[(ids == IMAGE).sum(1).argsort()]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_interrupted_profile_goes_on(kept: int) -> None:
    """What is there stays to the bit; the rest is measured, each once."""
    part = replace(whole(), entries=whole().entries[:kept])
    found, measured = profile(part)
    assert found.entries[:kept] == part.entries
    assert measured == len(whole().entries) - kept
    assert {(e.kind, e.num_devices) for e in found.entries} == {(e.kind, e.num_devices) for e in whole().entries}


def test_more_devices_measure_only_their_counts() -> None:
    found, measured = profile(whole(), num_devices=4)
    assert set(whole().entries) < set(found.entries)
    assert measured == len(found.entries) - len(whole().entries)


def test_what_interrupts_loses_at_most_what_was_not_kept() -> None:
    """The profile is kept at the end whatever the time; what was kept goes on."""
    kept: list[Profile] = []
    found = measure_profile(*captured(), num_devices=1, seconds_per_entry=0.0, keep=kept.append)
    assert kept[-1] == found


@pytest.mark.parametrize(
    ("changed", "piece"),
    [
        ({"device": "cpu of another make"}, "another make"),
        ({"versions": (("ranks", "8"),)}, "ranks 8 and 1"),
        ({"versions": (("optimizer", "SGD"),)}, "optimizer SGD and AdamW"),
    ],
)
def test_other_terms_are_refused(changed: dict[str, str], piece: str) -> None:
    with pytest.raises(ProfileError, match="another output file") as caught:
        profile(replace(whole(), **changed))  # type: ignore[arg-type]
    assert piece in str(caught.value)


def test_another_torch_is_told() -> None:
    versions = tuple(sorted({**dict(whole().versions), "torch": "1.0"}.items()))
    with pytest.warns(match=r"torch 1\.0"):
        profile(replace(whole(), versions=versions))


def test_trained_kinds_have_an_update_and_losses_none() -> None:
    operators = {op.kind: op for op in captured()[1].graph}
    for entry in whole().entries:
        trained = any(p.trainable for p in operators[entry.kind].parameters)
        assert (entry.update_s > 0) == trained


def test_each_task_has_the_time_of_its_loader() -> None:
    """By its batch size; a profile that lacks one measures that one."""
    tasks = captured()[0].tasks.values()
    assert {(e.task, e.batch_size) for e in whole().loads} == {(task.name, task.batch_size) for task in tasks}
    assert all(entry.seconds > 0 for entry in whole().loads)
    found, measured = profile(replace(whole(), loads=whole().loads[1:]))
    assert measured == 1
    assert found.loads[:-1] == whole().loads[1:]
    assert found.entries == whole().entries


def test_data_that_ends_starts_over_while_it_is_measured(tmp_path: Path) -> None:
    """In the rank's process: each pass leaves a letter in a file."""
    workload = spindle.Workload("short")
    layer = workload.component("layer", torch.nn.Linear(2, 1))
    passes = tmp_path / "passes"

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        with passes.open("a") as file:
            file.write("p")
        yield {"x": torch.ones(4, 2)}

    @workload.task("t", batch_size=4, data=batches, on_end="stop")
    def fit(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return layer(batch["x"]).square().mean()  # type: ignore[no-any-return]

    found = capture(workload)
    passes.unlink()
    (entry,) = measure_profile(workload, found, num_devices=1, seconds_per_entry=0.0).loads
    assert (entry.task, entry.batch_size) == ("t", 4)
    assert len(passes.read_text()) > MIN_REPEATS


def test_micro_batches_side_by_side_are_measured_as_one() -> None:
    """They run the same layers on as many samples: entries are those of a workload without."""
    kinds = []
    for in_flight in (1, 2):
        workload = spindle.Workload("several", accumulate=2, in_flight=in_flight)
        layer = workload.component("layer", torch.nn.Linear(2, 1))

        @workload.task("t", batch_size=4, data=[{"x": torch.ones(4, 2)}])
        def fit(batch: dict[str, torch.Tensor], layer: torch.nn.Module = layer) -> torch.Tensor:
            return layer(batch["x"]).square().mean()  # type: ignore[no-any-return]

        found = spindle.make_profile(workload, num_devices=1)
        kinds.append({(e.kind, e.num_devices) for e in found.entries} | {(e.task, e.batch_size) for e in found.loads})
    assert kinds[0] == kinds[1] != set()


def test_layers_that_may_be_cut_are_measured_so() -> None:
    """Two ranks hold one copy between them: gradients cross, and each steps half of the weights."""
    workload = cut_language_model(torch.float32)
    captured = capture(workload)
    found = measure_profile(workload, captured, num_devices=2, target=BenchTarget(1, 2), seconds_per_entry=0.0)
    for operator in captured.graph:
        layouts = {(1, 1), (2, 1)} if operator.splittable else {(1, 1)}
        if operator.tensor_parallel == 2:
            layouts |= {(2, 2)}
            assert found.by_layout[operator.kind][2, 2].backward_s > 0
        assert found.by_layout[operator.kind].keys() == layouts
    assert any(entry.tensor_parallel == 2 for entry in found.entries)
    assert measure_profile(workload, captured, num_devices=2, target=BenchTarget(1, 2), known=found) == found


def test_two_ranks_also_measure_messages() -> None:
    found, _ = profile(num_ranks=2)
    assert {(e.operation, e.members, e.num_bytes) for e in found.links} == {
        (operation, 2, num_bytes)
        for operation in ("all_reduce", "reduce", "broadcast", "transfer")
        for num_bytes in MESSAGE_BYTES
    }
    assert dict(found.versions)["ranks"] == "2"


@pytest.mark.parametrize(
    ("batch", "devices", "counts"),
    [(6, 4, [1, 2, 3]), (5, 4, [1]), (64, 64, [1, 2, 4, 8, 16, 32, 64]), (60, 60, [1, 2, 4, 60])],
)
def test_counts(batch: int, devices: int, counts: list[int]) -> None:
    """All while they are few; else powers of two and the largest."""
    assert counts_to_measure(batch, devices) == counts
