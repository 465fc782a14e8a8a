"""What happens after a step: a user's functions of parameters, and a running average of the weights."""

import copy
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spindle
from spindle.errors import CheckpointError, InputError, SpindleWarning, WorkloadError
from spindle.runtime.checkpoints.checkpoint import path_of
from spindle.values.plan import Plan
from tests.parity.test_tensor_parallel import OWN_PLAN, Encoder, laid_out
from tests.random_plans import random_plan, widest_plan
from tests.state.test_masters import shifts
from tests.tiny_workloads import HandWritten, floats

Batch = dict[str, Tensor]
STEPS = 4
sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)


class Scaled(nn.Module):
    """Towers' similarity with a temperature that is learned, as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale.exp()


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "encoder": HandWritten(5, 8).double(),
        "norm": nn.BatchNorm1d(8).double(),
        "scale": Scaled(),
        "head": nn.Linear(8, 3).double(),
    }


ROWS = [{"x": floats(6, 5, seed=n, dtype=torch.float64), "y": (torch.arange(6) + n) % 3} for n in range(3)]


def losses(modules: dict[str, nn.Module]) -> dict[str, Any]:
    encoder, norm, scale, head = modules.values()

    def match(batch: Batch) -> Tensor:
        y = F.normalize(encoder(batch["x"]), dim=-1)
        return F.cross_entropy(scale(y @ y.T), torch.arange(len(y)))

    def tell(batch: Batch) -> Tensor:
        return F.cross_entropy(head(norm(encoder(batch["x"]))), batch["y"])

    return {"match": match, "tell": tell}


def workload(modules: dict[str, nn.Module], **options: Any) -> spindle.Workload:
    """`tell` takes part in every other step, so that its head rests in between."""
    made = spindle.Workload("after", **options)
    shard = options.pop("shard", None)
    for name, module in modules.items():
        made.component(name, module, shard=shard)
    for name, function in losses(modules).items():
        made.task(name, batch_size=6, data=ROWS, every=2 if name == "tell" else 1)(function)
    return made


def clamp(scale: Tensor) -> None:
    scale.clamp_(0, math.log(40))


def spectral(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(weight, 2)
    return weight / norm.clamp(min=1.0)


def rules(made: spindle.Workload) -> spindle.Workload:
    made.after_step("scale.logit_scale")(clamp)
    made.after_step("encoder.blocks.*.weight", "head.weight")(lambda w: spectral(w) if w.ndim > 1 else None)
    return made


def looped(modules: dict[str, nn.Module], average: AveragedModel | None = None, **options: Any) -> None:
    """What anyone would write."""
    own = nn.ModuleDict(modules)
    optimizer = sgd(list(own.parameters()))
    read = {"match": 0, "tell": 0}
    for step in range(STEPS):
        optimizer.zero_grad()
        for name, function in losses(modules).items():
            if name == "match" or step % 2 == 0:
                function(dict(ROWS[read[name] % len(ROWS)])).backward()
                read[name] += 1
        stepped = [name for name, p in own.named_parameters() if p.grad is not None]
        optimizer.step()
        with torch.no_grad():
            for name, p in own.named_parameters():
                if name == "scale.logit_scale":
                    clamp(p)
                elif p.ndim > 1 and (".blocks." in name or name == "head.weight") and name in stepped:
                    p.copy_(spectral(p))
        if average is not None and step >= options.get("start", 0):
            average.update_parameters(own)


def averaged(modules: dict[str, nn.Module], decay: float, *, use_buffers: bool = False) -> AveragedModel:
    own = nn.ModuleDict(modules)
    return AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)  # type: ignore[no-untyped-call]


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], **tolerance: Any) -> None:
    assert ours.keys() <= theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


def trained(made: spindle.Workload, plan: Plan, **options: Any) -> Any:
    settings: dict[str, Any] = {"optimizer": sgd, "steps": STEPS, "launcher": "threads", "timeout_s": 30.0}
    return spindle.train(made, plan, **settings | options)


OPTIONS: list[dict[str, Any]] = [{}, {"shard_optimizer": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_functions_and_the_average_are_those_of_a_plain_loop(seed: int | None, options: dict[str, Any]) -> None:
    """A clamp, a spectral norm, torch's own AveragedModel; parameters that rest are let be, and averaged."""
    modules = parts()
    made = rules(workload(modules, ema=0.6, **options))
    metagraph = spindle.make_metagraph(made)
    plan = widest_plan(metagraph, 1) if seed is None else random_plan(metagraph, 2 + seed, seed)
    result = trained(made, plan)
    plain = parts()
    average = averaged(plain, 0.6)
    looped(plain, average)
    assert_close(nn.ModuleDict(modules).state_dict(), nn.ModuleDict(plain).state_dict())
    expected: dict[str, Tensor] = dict(average.module.named_parameters())
    assert set(result.ema) == set(expected)
    assert_close(dict(result.ema), expected)
    assert float(modules["scale"].state_dict()["logit_scale"]) <= math.log(40) < 4.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_verify_compares_both(seed: int, buffers: Any) -> None:
    """Over a save and a resume under another plan, with a start and gaps."""
    made = rules(workload(parts(), ema=spindle.EMA(0.6, start=1, every=2, buffers=buffers)))
    plan = random_plan(spindle.make_metagraph(made), 3, seed)
    report = spindle.verify(made, plan, steps=4, resume_under=2, optimizer=sgd, launcher="threads")
    assert report.ok, str(report)
    names = {row.name for row in report.rows if row.quantity == "average"}
    assert "ema:scale.logit_scale" in names
    assert ("ema:norm.running_mean" in names) == (buffers == "average")


def test_buffers_are_averaged_as_torch_does(tmp_path: Path) -> None:
    """Those that are floating point; a count is as it stands."""
    modules = parts()
    made = rules(workload(modules, ema=spindle.EMA(0.6, start=2, buffers="average")))
    result = trained(made, widest_plan(spindle.make_metagraph(made), 1))
    plain = parts()
    average = averaged(plain, 0.6, use_buffers=True)
    looped(plain, average, start=2)
    expected: dict[str, Tensor] = dict(average.module.named_parameters()) | {
        n: b for n, b in average.module.named_buffers() if b.is_floating_point()
    }
    assert set(result.ema) == set(expected)
    assert_close(dict(result.ema), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_on_sharded_bfloat16_parameters_each_rank_averages_the_masters_of_its_range(ranks: int) -> None:
    """Bit for bit: sums of these layers are exact. An average in bfloat16 would stand still."""
    results = []
    for plan_ranks, on_all in ((1, ()), (ranks, ("trunk", "head"))):
        made = shifts(ema=0.99)

        @made.after_step("trunk.*")
        def within(weight: Tensor) -> Tensor:
            return weight.clamp(-0.9, 0.9)

        plan = random_plan(spindle.make_metagraph(made), plan_ranks, 1, on_all=on_all)
        slow = functools.partial(torch.optim.AdamW, lr=1e-4)
        result = trained(made, plan, optimizer=slow)
        results.append({f"{n}:average": v for n, v in result.ema.items()} | dict(made.named_parameters()))
    one, many = results
    for name, value in one.items():
        assert torch.equal(many[name], value), name
    assert many["trunk.0.weight:average"].dtype == torch.float32
    assert float(many["trunk.0.weight:average"].abs().max()) <= 0.9


def cut(**options: Any) -> tuple[spindle.Workload, Plan]:
    torch.manual_seed(0)
    made = spindle.Workload("cut", **options)
    encoder = made.component("encoder", Encoder().double(), tensor_parallel=4, tensor_plan=OWN_PLAN)

    @made.task("fit", batch_size=4, data=[{"x": floats(4, 3, 5, seed=n, dtype=torch.float64)} for n in range(2)])
    def fit(batch: Batch) -> Tensor:
        loss: Tensor = encoder(batch["x"]).square().mean()
        return loss

    return made, laid_out(made, 4, lambda _: (2, 2))


def test_under_tensor_parallelism_pieces_are_treated_where_that_is_the_same() -> None:
    made, plan = cut(ema=0.5)
    made.after_step("encoder.layers.*.up.weight")(lambda w: w.clamp_(-0.2, 0.2))
    report = spindle.verify(made, plan, steps=3, optimizer=sgd, launcher="threads")
    assert report.ok, str(report)


def no_norm_beyond(weight: Tensor) -> Tensor:
    """Elementwise on small weights, and not on large ones."""
    norm = weight.norm()
    return weight * (100 / norm) if norm > 100 else weight


@pytest.mark.parametrize("function", [spectral, no_norm_beyond])
def test_what_needs_a_whole_parameter_that_no_device_has_is_refused(function: Any) -> None:
    made, plan = cut()
    made.after_step("encoder.layers.1.up.weight")(function)
    words = r"computes with the whole of 'encoder.layers.1.up.weight', .* are cut by tensor parallelism, so that no dev"
    with pytest.raises(WorkloadError, match=words):
        trained(made, plan)
    sharded = workload(parts())
    sharded.after_step("encoder.head.weight")(function)
    plan = random_plan(spindle.make_metagraph(sharded), 2, 1, on_all=("encoder",))
    with pytest.raises(WorkloadError, match=r"component 'encoder' are sharded, .*shard='nothing', and plan again"):
        trained(sharded, plan)


def test_a_planner_does_not_shard_what_a_function_needs_whole() -> None:
    from spindle.verbs.source import source_of

    made = workload(parts())
    made.after_step("head.weight")(spectral)
    made.after_step("scale.*")(clamp)
    assert source_of(made).cost_options.never_sharded == ("head",)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no such parameter": (
        "clip.logit_scale",
        clamp,
        r"no parameter is called 'clip.logit_scale'; names are .*'scale.lo",
    ),
    "frozen": ("norm.weight", clamp, "'norm.weight' is frozen, so that no step changes it; change it before you train"),
    "random": ("head.weight", lambda w: w + torch.randn(()), "draws random numbers, and each device would draw others"),
    "another shape": ("head.weight", lambda w: w.sum(0), r"returned a tensor of shape \(8,\) for a parameter of shape"),
    "no tensor": ("head.weight", lambda w: 3, r"returned 3 for a parameter of shape \(3, 8\); change the parameter in"),
    "raises": ("head.weight", lambda w: w.no, "raised AttributeError: 'Tensor' object has no attribute 'no'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_would_not_be_the_same_everywhere_is_refused(name: str) -> None:
    where, function, words = REFUSED[name]
    modules = parts()
    modules["norm"].requires_grad_(False)
    made = workload(modules)
    made.after_step(where)(function)
    with pytest.raises(WorkloadError, match=words):
        trained(made, widest_plan(spindle.make_metagraph(made), 2))


def test_a_function_may_hold_numbers_of_the_parameters_own_shape() -> None:
    """All rows but one are put back after each step, as textual inversion does; no device may have a part then."""
    made = workload(parts())
    head = dict(made.named_parameters())["head.weight"]
    first, keeps = head.detach().clone(), torch.tensor([True, False, True])

    @made.after_step("head.weight")
    def put_back(weight: Tensor) -> None:
        weight[keeps] = first[keeps]

    trained(made, widest_plan(spindle.make_metagraph(made), 2))
    assert head.ne(first).any(1).tolist() == [False, True, False]


def test_a_function_that_counts_or_uses_the_model_is_refused() -> None:
    modules, calls = parts(), [0]
    head = modules["head"]

    def counts(weight: Tensor) -> Tensor:
        calls[0] += 1
        return weight * calls[0]

    for function, words in (
        (counts, "gives something else in a second call with the same parameter"),
        (lambda w: w - head.bias.mean(), "uses 'head' of the model, of which each device has a copy of its own"),  # type: ignore[operator]
    ):
        made = workload(modules)
        made.after_step("head.weight")(function)
        with pytest.raises(WorkloadError, match=words):
            trained(made, widest_plan(spindle.make_metagraph(made), 2))
    with pytest.raises(WorkloadError, match=r"after_step is given \(\); give names of parameters"):
        workload(parts()).after_step()


def test_an_average_is_saved_resumed_and_exported(tmp_path: Path) -> None:
    """Under three plans, as one that never stopped; `export` and `load_checkpoint` give it when they are asked."""
    runs: dict[str, Any] = {"checkpoints": tmp_path / "runs"}
    modules = parts()
    made = rules(workload(modules, ema=0.6))
    metagraph = spindle.make_metagraph(made)
    trained(made, random_plan(metagraph, 3, 1), steps=1, **runs)
    trained(made, random_plan(metagraph, 2, 2), steps=2, resume=True, **runs)
    result = trained(made, widest_plan(metagraph, 1), resume=True, **runs)
    assert result.ema == {}, "the checkpoint has it"
    plain = parts()
    average = averaged(plain, 0.6)
    looped(plain, average)
    path = path_of(tmp_path / "runs", STEPS)
    weights = copy.deepcopy(nn.ModuleDict(modules).state_dict())
    spindle.export(made, tmp_path / "plain", checkpoint=path)
    spindle.export(made, tmp_path / "ema", checkpoint=path, ema=True)
    for name in modules:
        own = {f"{name}.{key}": v for key, v in load_file(tmp_path / "ema" / name / "model.safetensors").items()}
        expected: dict[str, Tensor] = dict(average.module.named_parameters()) | dict(
            nn.ModuleDict(plain).named_buffers()
        )
        assert_close(own, expected)
        own = {f"{name}.{key}": v for key, v in load_file(tmp_path / "plain" / name / "model.safetensors").items()}
        assert_close(own, weights, rtol=0, atol=0)
    assert spindle.load_checkpoint(made, path, ema=True) == STEPS
    assert_close(dict(nn.ModuleDict(modules).named_parameters()), dict(average.module.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_a_model_on_the_meta_device_the_average_goes_from_file_to_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """In the type of the model; bfloat16 ones have masters, and averages of these."""
    torch.manual_seed(0)
    encoder = HandWritten(5, 8).to(dtype)
    (tmp_path / "files").mkdir()
    save_file(encoder.state_dict(), tmp_path / "files" / "model.safetensors")
    rows, found = [{"x": batch["x"].to(dtype)} for batch in ROWS], []
    builds: list[Any] = [encoder, lambda: HandWritten(5, 8).to(dtype)]
    for number, built in enumerate(builds):
        made = spindle.Workload("empty", ema=0.5)
        own = made.component("encoder", built, weights=tmp_path / "files" if number else None)

        def fit(batch: Batch, own: nn.Module = own) -> Tensor:
            loss: Tensor = own(batch["x"]).float().square().mean()
            return loss

        made.task("fit", batch_size=6, data=rows)(fit)
        plan = random_plan(spindle.make_metagraph(made), 2, 1, on_all=("encoder",))
        result = trained(made, plan, checkpoints=tmp_path / f"runs{number}")
        spindle.export(made, tmp_path / f"out{number}", checkpoint=result.checkpoint, ema=True)
        found.append(load_file(tmp_path / f"out{number}" / "encoder" / "model.safetensors"))
    assert {value.dtype for value in found[1].values()} == {dtype}
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_run_that_began_without_an_average_begins_one(tmp_path: Path) -> None:
    """From its own weights; one that goes on without says that it is lost."""
    runs: dict[str, Any] = {"checkpoints": tmp_path, "optimizer": sgd}
    bare, kept = workload(parts()), workload(parts(), ema=spindle.EMA(0.5, start=3))
    plan = widest_plan(spindle.make_metagraph(bare), 2)
    trained(bare, plan, steps=1, **runs)
    with pytest.raises(CheckpointError, match="is of a run that kept no average of its weights; leave ema out"):
        spindle.load_checkpoint(bare, path_of(tmp_path, 1), ema=True)
    with pytest.raises(InputError, match="ema is asked for without a checkpoint, which holds it"):
        spindle.export(bare, tmp_path / "out", ema=True)
    trained(kept, plan, steps=2, resume=True, **runs)
    other = workload(parts())
    assert spindle.load_checkpoint(other, path_of(tmp_path, 2), ema=True) == 2  # no step counted: it is the weights
    assert_close(dict(other.named_parameters()), dict(kept.named_parameters()), rtol=0, atol=0)
    trained(kept, plan, steps=4, resume=True, **runs)
    with pytest.warns(SpindleWarning, match="the checkpoint holds an average of the weights, which this run"):
        trained(bare, plan, steps=5, resume=True, **runs)


def test_a_step_that_is_skipped_leaves_no_trace_in_the_average() -> None:
    """Nor in its count: the average is that of a run without this step."""
    spoiled = {"x": torch.full((6, 5), math.nan, dtype=torch.float64)}
    rows, seen = [{"x": batch["x"]} for batch in ROWS], []
    for data in ([rows[0], spoiled, rows[1]], rows[:2]):
        encoder = parts()["encoder"]

        def fit(batch: Batch, encoder: nn.Module = encoder) -> Tensor:
            loss: Tensor = encoder(batch["x"]).square().mean()
            return loss

        made = spindle.Workload("skips", ema=0.5)
        made.component("encoder", encoder)
        made.task("fit", batch_size=6, data=data)(fit)
        plan = widest_plan(spindle.make_metagraph(made), 2)
        seen.append(trained(made, plan, steps=len(data), not_finite="skip").ema)
    assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (1.0, "decay is 1.0; give a number from 0 up and below 1, such as 0.999"),
        ("0.9", "ema is '0.9'; give a decay such as 0.999, or spindle.EMA"),
        (True, "ema is True; give a decay"),
    ],
)
def test_settings_that_make_no_average_are_refused(given: Any, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        spindle.Workload("w", ema=given)
    with pytest.raises(WorkloadError, match="start is -1, every 1; give whole numbers, from 0 and from 1 up"):
        spindle.EMA(start=-1)
    with pytest.raises(WorkloadError, match="buffers is 'no'; choose one of copy, average"):
        spindle.EMA(buffers="no")  # type: ignore[arg-type]


def test_planned_memory_counts_the_average() -> None:
    from spindle.cost.memory import state_bytes
    from spindle.verbs.source import cost_options_of

    made, averaging = shifts(), shifts(ema=0.9)
    operators = [op for metaop in spindle.make_metagraph(made) for op in metaop.operators]
    more = [sum(state_bytes(operators, cost_options_of(each))) for each in (made, averaging)]
    assert more[1] - more[0] == 4 * 32
