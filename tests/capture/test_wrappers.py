"""Wrappers and types of numbers: plain modules are trained under plain names, what cannot be is refused by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from spindle.record.travel import dumped
from tests.plain_loops import WIDTH, Modules, Tasks, assert_same, looped, planned, rows, tower, workload
from tests.refusals import Refusal, check_refusal, each

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch.jit and dynamo


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module, backend="eager")
    return made  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": compiled,
    "both": lambda module: compiled(nn.parallel.DistributedDataParallel(module)),
}


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> tuple[spindle.Workload, dict[str, nn.Module]]:
    """A workload whose task calls wrappers of its components."""
    torch.manual_seed(0)
    made = spindle.Workload("wrapped")
    plain = {"stem": nn.Linear(WIDTH, WIDTH), "trunk": tower(), "head": nn.Linear(WIDTH, 3)}
    held: Any = {name: made.component(name, wrap(module.double())) for name, module in plain.items()}

    @made.task("t", batch_size=4, data=rows())
    def task(b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(held["head"](held["trunk"](held["stem"](b["x"]))), b["y"])

    return made, held


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_components_go_as_in_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Under the names that they have without the wrapper, in files too."""
    ours, _ = wrapped(WRAPPERS[name])
    theirs, _ = wrapped(lambda module: module)
    assert_same(planned(ours), looped(theirs))
    assert spindle.verify(ours, launcher="threads").ok
    folder = spindle.export(ours, tmp_path / "files")["stem"]
    assert load_file(next(folder.glob("*.safetensors"))).keys() == {"weight", "bias"}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_travel_as_what_they_wrap(name: str) -> None:
    """To processes that have no process group, with the attributes by which code reaches inside."""
    wrap = WRAPPERS[name](nn.Linear(2, 3))
    there = cloudpickle.loads(dumped({"module": wrap}))["module"]
    assert there(torch.ones(1, 2, device="meta")).shape == (1, 3)
    inner = there.module if name != "torch.compile" else there._orig_mod
    assert inner.weight is there.weight


def test_a_component_is_registered_once_wrapped_or_not() -> None:
    made, module = spindle.Workload("twice"), nn.Linear(2, 2)
    made.component("plain", module)
    with pytest.raises(WorkloadError, match="'wrapped' is the module of component 'plain'"):
        made.component("wrapped", compiled(module))


def through(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
    return {"t": lambda b: F.cross_entropy(head(trunk(stem(b["x"]))), b["y"])}


def holding(change: Callable[[Modules], None]) -> Callable[[], object]:
    """Planning of a workload whose components were changed."""

    def make() -> Modules:
        made: Modules = {"stem": nn.Linear(WIDTH, WIDTH), "trunk": tower(), "head": nn.Linear(WIDTH, 3)}
        for module in made.values():
            module.double()
        change(made)
        return made

    return lambda: capture(workload(make, through, as_made=True))


def first_layer(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Modules], None]:
    def change(made: Modules) -> None:
        made["trunk"][0] = wrap(made["trunk"][0])  # type: ignore[index, operator]

    return change


def whole(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Modules], None]:
    def change(made: Modules) -> None:
        made["trunk"] = wrap(made["trunk"])

    return change


def scripted(module: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.script(module)
    return made


def traced(module: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.trace(module, torch.randn(4, WIDTH, dtype=torch.float64), check_trace=False)  # type: ignore[no-untyped-call]
    return made


def sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module


def halved(module: nn.Module) -> nn.Module:
    return module.half()


DATA_PARALLEL = ("is wrapped in DataParallel", "spreads its batch", "register the plain module")
TABLE: dict[str, Refusal] = {
    "scripted": (holding(whole(scripted)), "component 'trunk' is compiled by torch.jit", "neither", "the plain module"),
    "traced": (holding(whole(traced)), "component 'trunk' is compiled by torch.jit", "neither", "the plain module"),
    "a scripted layer": (holding(first_layer(scripted)), "module '0'", "torch.jit", "the plain module"),
    "data-parallel": (holding(whole(nn.DataParallel)), *DATA_PARALLEL),
    "a data-parallel layer": (holding(first_layer(nn.DataParallel)), *DATA_PARALLEL),
    "a compiled layer": (holding(first_layer(compiled)), "module '0'", "adds '_orig_mod.'", "leave the layers"),
    "a distributed layer": (
        holding(first_layer(nn.parallel.DistributedDataParallel)),
        "module '0'",
        "adds 'module.'",
        "register the plain module",
    ),
    "a lazy layer": (
        holding(lambda made: made.update(stem=nn.LazyLinear(WIDTH))),
        "'stem.weight' has no size yet",
        "of a lazy module",
        "call the module once",
    ),
    "a kept tensor": (
        holding(lambda made: setattr(made["stem"], "kept", made["stem"](torch.ones(1, WIDTH, dtype=torch.float64)))),
        "component 'stem' keeps in 'kept' a tensor",
        "no copy of the module can have",
        "delete it before",
    ),
    "synchronized": (
        holding(lambda made: made.update(trunk=nn.SyncBatchNorm(WIDTH))),
        "component 'trunk' is a SyncBatchNorm",
        "waits for statistics of all processes",
        "leave out convert_sync_batchnorm",
    ),
    "sparse": (
        holding(lambda made: made.update(stem=nn.Sequential(nn.Embedding(3, WIDTH, sparse=True)))),
        "component 'stem': module '0' has sparse=True",
        "planned runs add up dense ones",
        "leave sparse out",
    ),
    "sharded": (holding(whole(sharded)), "FSDPModule", "holds parts of its parameters", "before it is sharded"),
    "float16": (
        holding(whole(halved)),
        "'trunk.0.norm.weight' is of float16",
        "which is not offered",
        "use bfloat16 (module.bfloat16()), or keep float32 and compute in bfloat16 by precision='bf16'",
    ),
    "a float16 buffer": (
        holding(lambda made: made["stem"].register_buffer("scale", torch.ones(1, dtype=torch.float16))),
        "'stem.scale' is of float16",
        "not offered",
        "bfloat16",
    ),
}


@pytest.mark.usefixtures("group")
@each(TABLE)
def test_what_no_run_can_be_planned_with_is_refused(refusal: Refusal) -> None:
    check_refusal(refusal, WorkloadError)
