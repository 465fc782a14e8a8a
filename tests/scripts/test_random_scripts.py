"""Parity of random training scripts: planned, they give what a plain loop in one process gives, in any plan.

SPINDLE_SCRIPT_EXAMPLES sets how many are tried; `benchmarks/fuzz/script_fuzz.py` tries many and prints a summary.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from spindle.runtime.comms.transport import Transport
from spindle.runtime.loading.data import Feed
from spindle.runtime.rank_spec import RankSpec
from spindle.runtime.steps.executor import Executor
from spindle.runtime.worker import Worker
from tests.scripts.random_scripts import (
    STEPS,
    Case,
    ComponentCase,
    TaskCase,
    all_kinds,
    covering_seeds,
    is_valid,
    kinds_of,
    random_case,
    smaller,
)
from tests.scripts.script_runs import verdict_of
from tests.threads import computing_with

EXAMPLES = int(os.environ.get("SPINDLE_SCRIPT_EXAMPLES", "50"))
PART = 5
REFUSED = frozenset({"gradient_hook"})
"""Kinds that are refused whatever else is in a script: they would hide the rest of it."""


@pytest.mark.timeout(60 * (PART + 1))
@pytest.mark.parametrize("first", range(0, EXAMPLES, PART))
def test_a_random_script_is_exact(first: int) -> None:
    """Losses, parameters, buffers, optimizer states and rates agree, or a sentence says what is not supported."""
    for seed in covering_seeds(EXAMPLES, REFUSED)[first : first + PART]:
        case = random_case(seed, REFUSED)
        verdict, text = verdict_of(case)
        assert verdict in ("ok", "refused"), f"seed {seed}: {verdict}\n{text}\n{case}"


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_always_refused(kind: str) -> None:
    """A script in which it is used."""
    cases = (random_case(seed, REFUSED - {kind}) for seed in range(1000))
    case = next(c for c in cases if kind in (c.component(name).kind for task in c.tasks for name in task.uses))
    assert verdict_of(case)[0] == "refused"


# -- faults that must be found ----------------------------------------------------------------------------------------

CASE = Case(
    components=(
        ComponentCase(name="a", kind="buffer_in_place"),
        ComponentCase(name="b", kind="mlp", depth=2, settings=(("lr", 0.002),)),
    ),
    tasks=(
        TaskCase(loss="contrastive", towers=("a",), others=("b",), data="loader", samples=10),
        TaskCase(loss="mse", towers=("b",), every=2, weight=0.5, seed=1),
    ),
    optimizer="adamw",
    schedule="lambda",
    max_grad_norm=0.3,
    plan_seed=3,
)
RESUMED = replace(CASE, middle="resume", ranks_after=3)


def verdict(case: Case) -> str:
    """How a case ends."""
    return verdict_of(case)[0]


@pytest.mark.parametrize("case", [CASE, RESUMED], ids=["whole", "resumed"])
def test_without_a_fault_the_cases_are_exact(case: Case) -> None:
    """What the planted faults change works by itself."""
    assert verdict_of(case) == ("ok", "")


@pytest.mark.parametrize("step", [1, STEPS - 1])
def test_a_skipped_step_of_a_schedule_is_found(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The last one too, which no value but the learning rate shows."""
    own = Worker._step

    def skipping(self: Worker, observe: Callable[..., None] | None) -> object:
        kept = self.scheduler
        if self.steps_done == step:
            self.scheduler = None
        try:
            return own(self, observe)
        finally:
            self.scheduler = kept

    monkeypatch.setattr(Worker, "_step", skipping)
    assert verdict(CASE) == "differs"


def test_a_lost_update_of_a_buffer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step on all ranks."""
    own = Worker._step

    def losing(self: Worker, observe: Callable[..., None] | None) -> object:
        before = {name: buffer.clone() for name, buffer in self.store.buffers.items()}
        record = own(self, observe)
        if self.steps_done == STEPS:
            for name, buffer in self.store.buffers.items():
                buffer.copy_(before[name])
        return record

    monkeypatch.setattr(Worker, "_step", losing)
    assert verdict(CASE) == "differs"


def test_swapped_groups_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group with the learning rate of the other."""
    own = Worker.__init__

    def swapping(self: Worker, spec: RankSpec, transport: Transport) -> None:
        own(self, spec, transport)
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            for group, rate in zip(groups, [group["lr"] for group in reversed(groups)], strict=True):
                group["lr"] = rate

    monkeypatch.setattr(Worker, "__init__", swapping)
    assert verdict(replace(CASE, schedule="", num_ranks=1)) == "differs"


def test_lost_states_of_the_optimizer_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run begins with none."""
    own = Worker.load

    def losing(self: Worker, *args: object) -> object:
        told = own(self, *args)  # type: ignore[arg-type]
        if self.optimizer is not None:
            self.optimizer.state.clear()
        return told

    monkeypatch.setattr(Worker, "load", losing)
    assert verdict(CASE) == "ok"
    assert verdict(RESUMED) == "differs"


def test_batches_read_again_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run begins its data anew."""
    monkeypatch.setattr(Feed, "resume", lambda self, state: None)
    assert verdict(RESUMED) == "differs"


def test_gradients_that_are_not_clipped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norm is larger than allowed in some step."""
    monkeypatch.setattr(Executor, "_clip", lambda self, target: None)
    assert verdict(replace(CASE, optimizer="momentum")) == "differs"


def test_a_run_that_raises_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours inside a rank counts as a failure."""

    def raising(self: Worker, observe: Callable[..., None] | None) -> object:
        raise KeyError("nothing")

    monkeypatch.setattr(Worker, "_step", raising)
    assert verdict(CASE) == "error"


# -- the generator ----------------------------------------------------------------------------------------------------


def test_every_kind_can_be_switched_off() -> None:
    """And a name that is none is refused."""
    for kind in all_kinds():
        assert all(kind not in kinds_of(random_case(seed, {kind})) for seed in range(10)), kind
    with pytest.raises(ValueError, match="bach_norm: no such kind"):
        random_case(0, {"bach_norm"})


def test_the_seeds_cover_all_kinds() -> None:
    """Nearly all of them, and none twice."""
    seeds = covering_seeds(50, REFUSED)
    assert len(set(seeds)) == 50
    covered = frozenset[str]().union(*(kinds_of(random_case(seed, REFUSED)) for seed in seeds))
    assert len(all_kinds() - covered - REFUSED) <= 4, sorted(all_kinds() - covered)


def test_a_seed_is_always_the_same_case() -> None:
    """Other seeds are other cases, and smaller ones are valid and smaller."""
    cases = [random_case(seed) for seed in range(40)]
    assert cases == [random_case(seed) for seed in range(40)]
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert all(is_valid(other) and other != case for other in smaller(case))


def test_plain_scripts_run() -> None:
    """One process runs what chance brings: a case that it cannot run would test nothing."""
    from tests.scripts.script_runs import Plain

    with computing_with(1):
        for seed in range(60):
            assert len(Plain(random_case(seed)).run().losses) == STEPS
