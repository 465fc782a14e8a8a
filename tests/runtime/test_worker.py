"""Worker: what a rank is sent, and what it leaves to others."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.record import travel
from spindle.runtime.controller import Prepared, prepare
from spindle.runtime.loading import recordings
from spindle.runtime.parallel.names import held_names
from spindle.runtime.programs.program import SliceRun
from spindle.runtime.rank_spec import RankSpec, make_rank_specs, owners, separate
from spindle.values.plan import Plan, Slice, make_waves
from spindle.workload import Workload
from tests.faults.breaking import Plain, rows, workload_of
from tests.random_plans import widest_plan


def layers_then_loss(workload: Workload) -> Plan:
    """All but the loss on rank 0, the loss on rank 1, nothing on rank 2."""
    metagraph = spindle.make_metagraph(workload)
    slices = [
        Slice(
            metaop=name,
            first_layer=0,
            num_layers=metagraph[name].layers,
            devices=(1,) if name.endswith(".loss") else (0,),
            start_s=float(place),
            end_s=place + 1.0,
        )
        for place, name in enumerate(metagraph.topological_order)
    ]
    return Plan(
        num_devices=3, devices_per_node=3, method="hand", waves=make_waves(slices), makespan_s=float(len(slices))
    )


def prepared() -> Prepared:
    workload = workload_of(lambda: iter([rows(), rows(1.0)]))
    return prepare(workload, layers_then_loss(workload))


def specs(found: Prepared) -> list[RankSpec]:
    return make_rank_specs(found.program, found.captured, found.workload)


def test_a_rank_is_sent_what_it_runs() -> None:
    """Codes of its own operators, and data only of tasks of which it has runs; the user's function is in the recipe,
    which all share.
    """
    found = prepared()
    first, second, third = specs(found)
    assert set(first.codes).isdisjoint(second.codes)
    assert set(second.codes) == {"t.loss"}
    assert not third.codes
    assert callable(first.tasks["t"].data)
    assert second.tasks["t"].data is first.tasks["t"].data
    assert third.tasks["t"].data == ()
    assert first.recipe is second.recipe is third.recipe
    assert first.recipe.functions["t"] is found.workload.tasks["t"].function
    with pytest.raises(AssertionError, match="a worker records the functions of its recipe, never this one"):
        first.tasks["t"].function({})


class Heavy(Plain):
    """A block whose weights are far larger than the code of a rank spec."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 40_000), nn.Linear(40_000, 4)


def test_a_job_travels() -> None:
    """Closures and lambdas of the user go with it; a rank without layers is sent no weights."""
    heavy = workload_of(lambda: iter([rows()]), Heavy(), Heavy())
    found = prepare(heavy, layers_then_loss(heavy))
    first, second, _ = specs(found)
    assert set(cloudpickle.loads(cloudpickle.dumps(first)).codes) == set(first.codes)
    assert [name for code in second.codes.values() for _, name in code.parameters] == []
    weights = sum(p.nbytes for _, p in heavy.named_parameters())
    assert weights > 10**6
    assert len(cloudpickle.dumps(second)) < weights / 10 < len(cloudpickle.dumps(first)) / 10


def test_only_ranks_that_have_runs_run_the_loader() -> None:
    """Ranks 0 and 1, one pass each: the loss needs the batch too, if only its shapes. Rank 2 has nothing to run."""
    passes: list[int] = []

    def data() -> Iterator[dict[str, Tensor]]:
        passes.append(1)
        while True:
            yield rows(1.0)

    workload = workload_of(data)
    plan = layers_then_loss(workload)
    before = len(passes)
    spindle.train(
        workload, plan, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=4, launcher="threads"
    )
    assert len(passes) - before == 2


def test_ranks_of_one_process_share_no_parameters() -> None:
    """Nor with the user's modules; ties inside a rank stay ties."""
    found = prepared()
    spec = specs(found)[0]
    copies = [separate(spec), separate(spec)]
    pointers = [
        {p.data_ptr() for code in one.codes.values() for p in code.module.parameters()} for one in (spec, *copies)
    ]
    assert len(set.union(*pointers)) == sum(map(len, pointers))
    assert len(pointers[0]) == len(pointers[1]) == len(pointers[2]) > 0


def test_every_parameter_has_one_owner() -> None:
    """All that any rank holds, once."""
    found = prepared()
    held = [held_names(spec.codes.values(), spec.cuts, {}) for spec in specs(found)]
    by_rank = owners(found.program, held)
    names = [name for owned in by_rank for name in owned]
    assert sorted(names) == sorted(name for name, _ in found.workload.named_parameters())
    assert by_rank[1] == []


class Counted(Mapping[str, Any]):
    """A mapping that counts what is asked of it."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.own, self.count = own, 0

    def __getitem__(self, name: str) -> Any:
        self.count += 1
        return self.own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


class CountedSlices(tuple[SliceRun, ...]):
    """Slice runs that count how many of them are visited."""

    visits = 0

    def __iter__(self) -> Iterator[SliceRun]:
        for run in super().__iter__():
            CountedSlices.visits += 1
            yield run


def counts(workload: Workload, num_ranks: int) -> tuple[int, int, int]:
    """Codes looked up, slices visited and slices there are, to make the rank specs of all ranks."""
    found = prepare(workload, widest_plan(spindle.make_metagraph(workload), num_ranks))
    codes = Counted(found.captured.codes)
    program = replace(found.program, slices=CountedSlices(found.program.slices))
    CountedSlices.visits = 0
    made = make_rank_specs(program, replace(found.captured, codes=codes), workload)
    assert [spec.rank for spec in made] == list(range(num_ranks))
    return codes.count, CountedSlices.visits, len(found.program.slices)


def test_what_records_tasks_is_packed_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for all, and takes as long as the model is deep."""
    calls: list[object] = []
    packed = travel.dumped

    def counted(content: object, functions: Iterable[object]) -> bytes:
        calls.append(content)
        return packed(content, functions)

    monkeypatch.setattr(recordings, "dumped", counted)
    made = specs(prepared())
    for spec in made:
        assert cloudpickle.loads(cloudpickle.dumps(spec.recipe)).functions.keys() == spec.recipe.functions.keys()
    assert (len(made), len(calls)) == (3, 1)


def test_jobs_of_many_ranks_take_work_by_their_number() -> None:
    """Twice the ranks look up twice the codes; the slices are gone through as often for 64 ranks as for 16."""
    workload = Workload("wide")
    net = workload.component("net", nn.Sequential(Plain(), Plain(), Plain()))

    @workload.task("t", batch_size=64, data=[rows(samples=64)])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    few, more, most = (counts(workload, ranks) for ranks in (16, 32, 64))
    alone = 1  # the loss, on one rank
    assert few[0] - alone == (more[0] - alone) // 2 == (most[0] - alone) // 4 > 0
    assert few[1] == more[1] == most[1] == 10 * most[2]
