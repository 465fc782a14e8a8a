"""Sharded parameters: a part of every layer on each rank, gathered as it is computed, gives what one process gives."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import PlanError, WorkloadError
from spindle.runtime import parity
from spindle.runtime.checkpoints import tensor_files
from spindle.runtime.checkpoints.checkpoint import Checkpoints, load_weights, path_of
from spindle.runtime.checkpoints.tensor_files import sources_in
from spindle.runtime.controller import launched, prepare
from spindle.runtime.programs.program import Instruction
from spindle.runtime.reference import Outcome, restored
from spindle.runtime.steps.executor import Executor
from spindle.runtime.steps.flats import Flats, Row
from spindle.runtime.steps.record import Timed
from spindle.values.plan import Plan
from tests.drawn import SEEDS, drawn
from tests.late_transport import late
from tests.parity.test_tensor_parallel import EXACT, compared, halving, language, momentum, next_word, spread
from tests.parity.test_tensor_parallel import FEATURES as CUT_FEATURES
from tests.parity.test_tensor_parallel import workload as encoder_and_language
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import HandWritten, Residual, floats, tokens

BOTH = ("encoder", "lm")


def workload(**options: Any) -> spindle.Workload:
    """An encoder into a language model with tied embeddings, and the encoder alone: batches of 5 and 4 samples."""
    return encoder_and_language(degree=1, **options)


def light(*, frozen: bool = False, fit_options: dict[str, Any] | None = None, **options: Any) -> spindle.Workload:
    """The same without a language model, which takes seconds to capture: an encoder into a trunk, and alone."""
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float64)
    made = spindle.Workload("light", **options)
    encoder = made.component("encoder", HandWritten(5, 8).to(dtype))
    lm = made.component("lm", HandWritten(8, 3, depth=2).to(dtype), optimizer={"lr": 0.05, "weight_decay": 0.2})
    if frozen:
        encoder.blocks[1].requires_grad_(False)

    def rows(batch: int, width: int, seed: int) -> list[dict[str, Tensor]]:
        return [
            {
                "x": floats(batch, 5, seed=seed + n, dtype=dtype),
                "y": floats(batch, width, seed=seed + n + 50, dtype=dtype),
            }
            for n in range(2)
        ]

    @made.task("describe", batch_size=5, data=rows(5, 3, 1))
    def describe(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(lm(encoder(batch["x"])), batch["y"])

    @made.task("fit", batch_size=4, data=rows(4, 8, 20), **(fit_options or {}))
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(encoder(batch["x"]), batch["y"])

    return made


def planned(made: spindle.Workload, num_ranks: int, seed: int, names: tuple[str, ...] = BOTH, **options: Any) -> Plan:
    return random_plan(spindle.make_metagraph(made), num_ranks, seed, on_all=names, **options)


@drawn(2, num_ranks=range(2, 5), seed=SEEDS, names=[BOTH, ("encoder",), ("lm",)])
def test_random_plans_are_exact(num_ranks: int, seed: int, names: tuple[str, ...]) -> None:
    """Both components or one of them, waves of the other around it, tasks at once and in turns."""
    made = workload()
    report = compared(made, planned(made, num_ranks, seed, names))
    assert report.ok, str(report)


FEATURES: dict[str, dict[str, Any]] = {**CUT_FEATURES, "probability": {"fit_options": {"probability": 0.5}}}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@drawn(2, num_ranks=range(2, 5), seed=SEEDS)
def test_features_go_along(options: dict[str, Any], num_ranks: int, seed: int) -> None:
    """A component's own learning rate and decay, and a schedule, are always there."""
    made = light(**options)
    report = compared(made, planned(made, num_ranks, seed), scheduler=halving, steps=4)
    assert report.ok, str(report)


@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_float32_too(num_ranks: int, seed: int) -> None:
    made = light(dtype=torch.float32)
    report = compared(made, planned(made, num_ranks, seed), tolerance=parity.Tolerance(1e-4, 1e-5))
    assert report.ok, str(report)


def wide(**options: Any) -> spindle.Workload:
    """Three tasks of one trunk and a head, eight samples each: for many ranks."""
    torch.manual_seed(0)
    made = spindle.Workload("wide", **options)
    trunk = made.component("trunk", HandWritten(5, 8).double(), shard="parameters")
    head = made.component("head", nn.Linear(8, 3).double())
    for number, name in enumerate(("a", "b", "c")):
        rows = [
            {"x": floats(8, 5, seed=10 * number + n, dtype=torch.float64), "y": tokens(8, 1, n)[:, 0] % 3}
            for n in range(2)
        ]

        @made.task(name, batch_size=8, data=rows)
        def task(batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(head(trunk(batch["x"])), batch["y"])

    return made


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_component_that_asks_for_it(num_ranks: int) -> None:
    """The planner gives it all devices, says so in the plan, and the run is exact; Adam's states too."""
    made = wide()
    plan = spindle.make_plan(made, f"1x{num_ranks}:cpu", time_limit_s=0.5)
    assert plan.shard_parameters == ("trunk",)
    reference = parity.run_reference(made, 3, optimizer=adam)
    with launched(prepare(made, plan), optimizer=adam, launcher="threads", timeout_s=30.0) as run:
        report = parity.compare(reference, parity.observed(run, 3), tolerance=EXACT)
    assert report.ok, str(report)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


@drawn(1, seed=SEEDS)
def test_fewer_ranks_than_there_are_may_keep_a_component(seed: int) -> None:
    """Two of three ranks keep the encoder between them; others run around it."""
    made = light()
    report = compared(made, planned(made, 3, seed, ("encoder",), keeps=2))
    assert report.ok, str(report)


class Adapted(nn.Module):
    """A frozen layer with a small trained one beside it (LoRA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = Residual(width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def blocks(made: Callable[[], nn.Module], **options: Any) -> spindle.Workload:
    """Four equal blocks, in two tasks."""
    torch.manual_seed(0)
    workload = spindle.Workload("blocks", **options)
    net = workload.component("net", Blocks(*(made() for _ in range(4))).double(), shard="parameters")
    head = workload.component("head", nn.Linear(8, 2).double())
    for name, seed in (("a", 1), ("b", 20)):
        rows = [{"x": floats(6, 8, seed=seed + n, dtype=torch.float64)} for n in range(2)]

        @workload.task(name, batch_size=6, data=rows)
        def task(batch: dict[str, Tensor]) -> Tensor:
            return head(net(batch["x"])).square().mean()  # type: ignore[no-any-return]

    return workload


@pytest.mark.parametrize("kind", ["adapters", "all frozen", "batch norm", "dropout"])
def test_kinds_of_layers(kind: str) -> None:
    """Frozen parameters beside trained ones, a frozen component, running statistics, random numbers."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "adapters": lambda: Adapted(8),
        "all frozen": lambda: Residual(8).requires_grad_(False),
        "batch norm": lambda: nn.Sequential(Residual(8), nn.LayerNorm(8)),
        "dropout": lambda: nn.Sequential(Residual(8), nn.Dropout(0.3)),
    }
    made = blocks(layers[kind])
    report = compared(made, planned(made, 3, 5, ("net",)))
    assert report.ok, str(report)


@pytest.mark.gloo
def test_processes_do_the_same() -> None:
    """Over gloo, where each process is sent its part alone."""
    made = workload(max_grad_norm=0.3)
    report = compared(made, planned(made, 3, 2), "processes")
    assert report.ok, str(report)


# -- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_no_more_than_two_layers_are_whole(recompute: bool) -> None:
    """Bytes of gathered parameters and of whole gradients, counted after each instruction of each rank: those of two
    layers at most, though every task uses eight of them; and what stays is a third.
    """
    made = blocks(lambda: Residual(8), recompute=["net"] if recompute else [])
    net = made.components["net"].module
    layer = sum(p.nbytes for p in next(iter(net.get_submodule("blocks").children())).parameters())
    found: dict[int, int] = {}
    carry_out = Executor.carry_out

    def counted(self: Executor, instruction: Instruction, spans: list[Timed], step: int) -> None:
        carry_out(self, instruction, spans, step)
        rows = self.flats.rows.values()
        there = sum(row.whole.untyped_storage().nbytes() for row in rows)
        graded = sum(given.nbytes for given in self.flats._given.values())
        graded += sum(given.nbytes for given, _, _ in self.flats._summing.values())
        found[self.rank] = max(found.get(self.rank, 0), there, graded)
        assert sum(row.own.nbytes for row in rows) < 4 * layer / 3 + 4 * 24

    with mock.patch.object(Executor, "carry_out", counted):
        report = compared(made, planned(made, 3, 5, ("net",)))
    assert report.ok, str(report)
    padding = 24
    assert all(layer < most <= 2 * (layer + padding) for most in found.values()), (layer, found)


def test_parameters_outside_of_a_gather_take_no_memory() -> None:
    """After a step the modules of a rank hold nothing of sharded parameters but its own part."""
    made = blocks(lambda: Residual(8))
    rows: list[Row] = []
    make = Row.take_over

    def kept(self: Row, *args: Any) -> Any:
        rows.append(self)
        return make(self, *args)

    with mock.patch.object(Row, "take_over", kept):
        compared(made, planned(made, 2, 5, ("net",)), steps=1)
    assert len(rows) == 2 * 4
    for row in rows:
        assert row.whole.untyped_storage().nbytes() == 0
        assert all(p.untyped_storage().nbytes() == 0 and p.grad is None for p in row.parameters.values())


# -- late messages ----------------------------------------------------------------------------------------------------


@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_late_messages_change_nothing(num_ranks: int, seed: int) -> None:
    made = light(max_grad_norm=0.3)
    with late():
        report = compared(made, planned(made, num_ranks, seed))
    assert report.ok, str(report)


def no_gather_wait(self: Flats, name: str) -> None:
    self._gathering.pop(name)


def no_scatter_wait(self: Flats, name: str) -> None:
    _, part, _ = self._summing.pop(name)
    gradient = self.rows[name].gradient
    assert gradient is not None
    gradient += part


def replaced(self: Flats, name: str) -> None:
    """What is added takes the place of what earlier backwards gave."""
    _, part, wait = self._summing.pop(name)
    wait()
    gradient = self.rows[name].gradient
    assert gradient is not None
    gradient.copy_(part)


@contextlib.contextmanager
def planted(method: str, faulty: Callable[..., None]) -> Iterator[None]:
    with mock.patch.object(Flats, method, faulty):
        yield


PLANTED = {
    "a gather that is not waited for": ("wait", no_gather_wait),
    "a sum that is not waited for": ("add", no_scatter_wait),
    "gradients of one task only": ("add", replaced),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    """The run ends with another result, or in an error."""
    method, faulty = PLANTED[name]
    made = light()
    with late(), planted(method, faulty):
        try:
            report = compared(made, planned(made, 3, 1), steps=1)
        except spindle.SpindleError:
            return
    assert not report.ok


# -- checkpoints ------------------------------------------------------------------------------------------------------


def resumed_under(made: spindle.Workload, plans: list[Plan], steps: int = 4) -> parity.ParityReport:
    reference = parity.run_reference(made, steps, optimizer=adam)
    prepared = [prepare(made, plan) for plan in plans]
    outcome = parity.run_planned(made, prepared, steps, optimizer=adam, launcher="threads", timeout_s=30.0)
    return parity.compare(reference, outcome, tolerance=EXACT)


@drawn(1, seed=SEEDS)
def test_any_plan_resumes_any_other(seed: int) -> None:
    """Sharded on four ranks, whole on three, sharded on two, another component on three."""
    made = light()
    metagraph = spindle.make_metagraph(made)
    plans = [
        planned(made, 4, seed),
        random_plan(metagraph, 3, seed),
        planned(made, 2, seed + 1, ("lm",)),
        planned(made, 3, seed + 2, ("encoder",)),
    ]
    report = resumed_under(made, plans)
    assert report.ok, str(report)


def test_tensor_parallel_layers_resume_sharded_ones() -> None:
    """Checkpoints hold ranges of one and pieces of the other; both are read as whole parameters."""
    whole, cut = encoder_and_language(degree=1), encoder_and_language(degree=4)
    sharded = planned(whole, 4, 3)
    reference = parity.run_reference(whole, 3, optimizer=momentum)
    for first, second, plans in (
        (whole, cut, (sharded, spread(cut, 4, 2))),
        (cut, whole, (spread(cut, 4, 4), sharded)),
    ):
        report = _handed_over(first, second, plans, reference)
        assert report.ok, str(report)


def _handed_over(
    first: spindle.Workload, second: spindle.Workload, plans: tuple[Plan, Plan], reference: Outcome
) -> parity.ParityReport:
    """One step of the first workload, two of the second one from its checkpoint."""
    options: dict[str, Any] = {"optimizer": momentum, "launcher": "threads", "timeout_s": 30.0, "saves": True}
    with tempfile.TemporaryDirectory() as folder, restored(first), restored(second):
        kept = Checkpoints(directory=Path(folder), every=3)
        with launched(prepare(first, plans[0]), **options) as run:
            begun = parity.observed(run, 1)
            run.save(kept, 1, 0)
        before = load_weights(second, path_of(kept.directory, 1))
        with launched(prepare(second, plans[1]), **options) as run:
            run.resume(before)
            rest = parity.observed(run, 2)
    outcome = Outcome(
        begun.losses + rest.losses, begun.gradients + rest.gradients, rest.values, rest.states, rest.learning_rates
    )
    return parity.compare(reference, outcome, tolerance=EXACT)


def test_modules_are_whole_after_training_and_exported(tmp_path: Path) -> None:
    """`state_dict` has all trained numbers, a checkpoint the parts of each rank, and export reads both."""
    made, alone = wide(), wide()
    plan = spindle.make_plan(made, "1x4:cpu", time_limit_s=0.5)
    result = spindle.train(
        made, plan, optimizer=adam, steps=3, launcher="threads", checkpoints=tmp_path / "kept", checkpoint_every=3
    )
    spindle.train(alone, widest_plan(spindle.make_metagraph(alone), 1), optimizer=adam, steps=3, launcher="threads")
    for (name, ours), theirs in zip(made.named_parameters(), dict(alone.named_parameters()).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
    assert result.checkpoint is not None
    held = sources_in(result.checkpoint)["trunk.stem.weight"]
    assert len(held.parts) > 1
    assert held.shape == (16, 5)
    assert torch.equal(held.read("trunk.stem.weight"), dict(made.named_parameters())["trunk.stem.weight"])
    fresh = wide()
    written = spindle.export(fresh, tmp_path / "out", checkpoint=result.checkpoint)
    assert (written["trunk"] / "model.safetensors").is_file()
    for name, value in fresh.components["trunk"].module.state_dict().items():
        assert torch.equal(value, made.components["trunk"].module.state_dict()[name])


def test_weights_are_read_by_range(tmp_path: Path) -> None:
    """A component on the meta device: each rank reads its numbers alone, and the run is that of one in memory."""
    torch.manual_seed(0)
    model: Any = language()
    folder = tmp_path / "lm"
    model.double().save_pretrained(folder)
    rows = [{"tokens": tokens(4, 6, seed)} for seed in range(2)]

    def made(empty: bool) -> spindle.Workload:
        workload = spindle.Workload("meta")
        options: dict[str, Any] = {"weights": folder} if empty else {}
        lm: Any = workload.component(
            "lm", (lambda: language().double()) if empty else model, shard="parameters", **options
        )

        @workload.task("t", batch_size=4, data=rows)
        def task(batch: dict[str, Tensor]) -> Tensor:
            return next_word(lm(input_ids=batch["tokens"]).logits, batch["tokens"])

        return workload

    plan = spindle.make_plan(made(False), "1x4:cpu", time_limit_s=0.5)
    asked: list[int] = []
    read = tensor_files._read_into

    def counted(handle: int, view: memoryview, offset: int) -> None:
        asked.append(len(view))
        read(handle, view, offset)

    with mock.patch.object(tensor_files, "_read_into", counted):
        result = spindle.train(
            made(True), plan, optimizer=momentum, steps=2, launcher="threads", checkpoints=tmp_path / "kept"
        )
    size = sum(p.nbytes for p in model.parameters())
    assert size <= sum(asked) <= 1.3 * size
    expected = made(False)
    spindle.train(expected, plan, optimizer=momentum, steps=2, launcher="threads")
    assert result.checkpoint is not None
    held = sources_in(result.checkpoint)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(held[name].read(name), value.detach(), rtol=1e-12, atol=1e-13)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_slices_on_other_devices_are_refused() -> None:
    """A plan whose tasks run a layer on other ranks each has no ranks that keep it."""
    made = light()
    plan = random_plan(spindle.make_metagraph(made), 3, 4)
    with pytest.raises(
        PlanError, match=r"component 'encoder' are sharded, but .* is used on devices .* run on the same"
    ):
        prepare(made, Plan(**{**vars(plan), "shard_parameters": ("encoder",)}))


@pytest.mark.parametrize("name", ["Muon", "Adafactor", "by shape"])
def test_optimizers_that_need_whole_matrices_are_refused(name: str) -> None:
    class ByShape(torch.optim.SGD):
        """Matrices get another rate than vectors, as no group tells."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            del closure
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter -= (0.1 if parameter.ndim > 1 else 0.2) * parameter.grad

    kinds: dict[str, Any] = {
        "Muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.1),
        "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
        "by shape": lambda parameters: ByShape(parameters, lr=0.1),
    }
    made = wide()
    plan = spindle.make_plan(made, "1x2:cpu", time_limit_s=0.5)
    with pytest.raises(WorkloadError, match=r"whole matrices, and the parameters of component 'trunk' are sharded"):
        spindle.train(made, plan, optimizer=kinds[name], steps=1, launcher="threads")


def test_a_task_that_writes_to_a_sharded_component_is_refused() -> None:
    """A target network that follows another is on no rank as a whole."""
    torch.manual_seed(0)
    made = spindle.Workload("follows")
    net = made.component("net", HandWritten(5, 8).double())
    target = made.component("target", HandWritten(5, 8).double().requires_grad_(False), shard="parameters")

    @made.task("t", batch_size=4, data=[{"x": floats(4, 5, seed=1, dtype=torch.float64)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), net.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
        return F.mse_loss(net(batch["x"]), target(batch["x"]).detach())

    plan = planned(made, 2, 1, ("target",))
    with pytest.raises(PlanError, match=r"writes to 'target\..*, and the parameters of component 'target' are sharded"):
        prepare(made, plan)


def test_shapes_of_the_choice() -> None:
    """What `shard` may be, and that it goes with no tensor parallelism."""
    made = spindle.Workload("w")
    with pytest.raises(WorkloadError, match=r"shard is 'weights'; give 'parameters', 'nothing', or None"):
        made.component("a", nn.Linear(2, 2), shard="weights")  # type: ignore[arg-type]
    with pytest.raises(WorkloadError, match=r"tensor_parallel is 2 and shard is 'parameters'; both divide"):
        made.component("a", nn.Linear(2, 2), shard="parameters", tensor_parallel=2)
