"""Compiled layers: what one process gives uncompiled, to rounding, and one code for equal layers."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import spindle
from spindle.capture import capture
from spindle.capture.codes import OperatorModule
from spindle.cost.metaops import with_costs
from spindle.errors import SpindleWarning, WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.inputs.compilation import Compilation
from spindle.record.substitutes.patches import plain_modules
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.profiling.layer_bench import LayerBench
from spindle.runtime.steps.compiled import compile_layers
from spindle.values.contract import contract
from spindle.verbs.source import cost_options_of
from tests.plain_loops import WIDTH, Block, assert_same, looped, planned
from tests.refusals import Refusal, check_refusal, each
from tests.tiny_workloads import floats

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)  # of dynamo


class Graphs:
    """Counts what is compiled; `backend` is one of torch.compile that needs no compiler of C++."""

    def __init__(self) -> None:
        self.count = 0

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            self.count += 1
            return aot_eager(graph, inputs)

        self.backend = backend


class Dropping(Block):
    """A layer that draws."""

    def inner(self, x: Tensor) -> Tensor:
        return F.dropout(super().inner(F.dropout(x, 0.2, self.training)), 0.3, self.training)


class Checkpointed(Dropping):
    """One that computes again in backward what it draws."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + checkpoint(self.inner, x, use_reentrant=False)
        return y


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.1, batch_first=True)


def workload(
    compile: Any,
    layer: Callable[[], nn.Module] = Block,
    *,
    depth: int = 2,
    lengths: tuple[int, ...] = (5,),
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> spindle.Workload:
    """Layers and a head, on batches of four samples of some lengths."""
    torch.manual_seed(0)
    made = spindle.Workload("compiled", **options)
    trunk = nn.Sequential(*(layer() for _ in range(depth))).double()
    tower = made.component("tower", trunk, compile=compile, **(settings or {}))
    head = made.component("head", nn.Linear(WIDTH, 3).double())
    labels = torch.tensor([0, 1, 2, 1])
    rows = [{"x": floats(4, n, WIDTH, seed=n, dtype=torch.float64), "y": labels} for n in lengths]

    @made.task("t", batch_size=4, data=rows)
    def task(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(head(tower(batch["x"])).mean(1), batch["y"])

    return made


ALONE = {"layers": ["0"]}  # a layer that has no equal
SPREAD = {"tensor_parallel": 2, "tensor_plan": {"*.up": "colwise", "*.down": "rowwise"}}
TABLE: dict[str, dict[str, Any]] = {
    "sizes that change, batches in flight": {"layer": Dropping, "lengths": (5, 7), "accumulate": 4, "in_flight": 2},
    "attention that draws": {"layer": attention},
    "a checkpoint of its own that draws": {"layer": Checkpointed},
    "tensor parallelism, recompute": {"layer": Dropping, "settings": SPREAD, "recompute": ["tower"]},
    "sharded, recompute": {"layer": Dropping, "settings": {"shard": "parameters"}, "recompute": ["tower"]},
}


@pytest.mark.parametrize("options", TABLE.values(), ids=TABLE)
def test_compiled_layers_agree_with_one_process(options: dict[str, Any]) -> None:
    """Uncompiled, to rounding: whatever is computed again, cut, sharded, drawn, or changes in size."""
    graphs = Graphs()
    made = workload({"backend": graphs.backend}, **options)
    report = spindle.verify(made, num_workers=2, steps=2, launcher="threads")
    assert report.ok, str(report)
    assert graphs.count


def test_equal_layers_share_one_code() -> None:
    """Twelve of them: one code for the first, whose input needs no gradient, and one for the others; each for the first
    size, and for all other sizes.
    """
    graphs = Graphs()
    planned(workload({"backend": graphs.backend}, Dropping, depth=12, lengths=(5, 7, 6)), num_ranks=1)
    assert graphs.count == 4


def test_many_cases_of_a_layer_are_compiled() -> None:
    """More than the eight after which torch runs a function as it is; and kinds of layers do not count together."""
    graphs = Graphs()
    made = workload({"backend": graphs.backend, "dynamic": False})
    codes = capture(made).codes
    compile_layers(codes)
    for size in range(1, 13):
        for code in codes.values():
            if code.module.block is not None:
                code.module.block(floats(4, size, WIDTH, seed=0, dtype=torch.float64))
    assert graphs.count == 12


def test_layers_that_are_alike_but_for_their_code_keep_their_own() -> None:
    """Classes of one name, with parameters alike."""
    kinds = [type("Same", (Block,), {"forward": forward}) for forward in (Block.forward, lambda self, x: self.inner(x))]
    code = capture(workload({"backend": "eager"})).codes["t.tower.0"]
    layers = [kind().double() for kind in kinds]
    expected = [layer(torch.ones(2, WIDTH, dtype=torch.float64)) for layer in layers]
    compile_layers(
        {str(n): replace(code, module=OperatorModule(each, {}), parameters=()) for n, each in enumerate(layers)}
    )
    found = [layer(torch.ones(2, WIDTH, dtype=torch.float64)) for layer in layers]
    assert all(map(torch.equal, found, expected))


def test_as_in_a_plain_loop_that_compiles_its_layers() -> None:
    ours, theirs = workload({"backend": "aot_eager"}), workload(False)
    for layer in theirs.components["tower"].module.children():
        layer.compile(backend="aot_eager")
    assert_same(planned(ours), looped(theirs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile on a CPU, g++, is not here")
def test_with_the_compiler_that_is_usual() -> None:
    made = workload(True, depth=1, settings=ALONE)
    report = spindle.verify(made, num_workers=1, steps=2, launcher="threads", timeout_s=300.0)
    assert report.ok, str(report)


def test_an_evaluation_runs_them_compiled_too() -> None:
    """In eval mode and without gradients, which is a code of its own; the scores are those of the plain layers."""

    def scores(compile: Any) -> float:
        made = workload(compile, Dropping)
        tower, head = (made.components[name].module for name in ("tower", "head"))
        evaluation = spindle.Evaluation(made)

        @evaluation.task("e", batch_size=4, data=made.tasks["t"].data)
        def task(batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(head(tower(batch["x"])).mean(1), batch["y"])

        return spindle.evaluate(evaluation, launcher="threads")["e"]["loss"]

    graphs = Graphs()
    assert scores({"backend": graphs.backend}) == pytest.approx(scores(False), rel=1e-12)
    assert graphs.count == 1


# -- costs ------------------------------------------------------------------------------------------------------------


def test_compiled_layers_have_kinds_and_costs_of_their_own() -> None:
    """Quicker than the same ones uncompiled by the cost model; code between layers is as it was."""
    by_compile = {}
    for compile in (False, True):
        made = workload(compile)
        graph = contract(capture(made).graph)
        by_compile[compile] = with_costs(graph, parse_cluster("1x2:a100-80g"), cost_options=cost_options_of(made))
    plain, compiled = ({m.component: m for m in by_compile[c] if m.component} for c in (False, True))
    assert "compiled" in compiled["tower"].operators[0].kind.split()
    assert compiled["tower"].times[1] < plain["tower"].times[1]
    assert compiled["head"] == plain["head"]


def test_profiles_know_them_apart_and_measure_them_compiled() -> None:
    """What is known of layers uncompiled tells nothing of compiled ones, nor do those of another backend."""
    graphs, kinds = Graphs(), []
    for compile in (False, {"backend": "eager"}, {"backend": graphs.backend}):
        made = workload(compile, depth=1, settings=ALONE)
        found, batch = capture(made), made.tasks["t"].sampled(made.tasks["t"].first_batch())
        kinds.append({op.kind for op in found.graph if op.component == "tower"})
    assert len(set.union(*kinds)) == 3
    layers = LayerBench(found, Recipe.of(made, found), ["t.tower.0"], batch, 1, torch.device("cpu"))
    for recompute in (False, True):
        layers.begin(recompute=recompute)
        layers.forward()
        layers.backward()
    assert graphs.count == 2, "once to keep what backward needs, and once to keep the input alone"


# -- beside each other ------------------------------------------------------------------------------------------------


def test_code_that_is_recorded_is_not_compiled_while_other_threads_compile() -> None:
    graphs = Graphs()

    def plus(x: Tensor) -> Tensor:
        return x + 1

    compiled = torch.compile(plus, backend=graphs.backend)
    with plain_modules():
        compiled(torch.ones(2))
        assert graphs.count == 0
        other = threading.Thread(target=compiled, args=(torch.ones(2),))
        other.start()
        other.join(30.0)
    assert graphs.count == 1


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_component_without_layers_warns() -> None:
    made = spindle.Workload("none")
    head = made.component("head", nn.Linear(WIDTH, 1), compile=True)

    @made.task("t", batch_size=2, data=[{"x": torch.ones(2, WIDTH)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = head(batch["x"]).mean()
        return loss

    with pytest.warns(SpindleWarning, match="'head' has compile=, but none of its code is a layer"):
        capture(made)


def component(compile: Any) -> Callable[[], object]:
    return lambda: spindle.Workload("refused").component("tower", nn.Linear(2, 2), compile=compile)


def misaligned() -> None:
    """Sharded parameters, three and four numbers in a row, where memory is no CPU's."""
    row = torch.empty(7, device="meta")
    layer = nn.Module()
    layer.first, layer.second = (nn.Parameter(row[low:high]) for low, high in ((0, 3), (3, 7)))
    layer.forward = lambda x: x
    code = capture(workload(True)).codes["t.tower.0"]
    names = (("block.first", "tower.0.first"), ("block.second", "tower.0.second"))
    compile_layers({"t.tower.0": replace(code, module=OperatorModule(layer, {}), parameters=names)})


REFUSED: dict[str, Refusal] = {
    "a text": (component("yes"), "compile is 'yes'", "give True, or a dict", "backend"),
    "another key": (component({"level": 3}), "has 'level'", "keys are those of torch.compile", "mode, dynamic"),
    "dynamic": (component({"dynamic": "yes"}), "dynamic is 'yes'", "what torch.compile takes", ""),
    "backend": (component({"backend": 3}), "backend is 3", "the name of one", "or a function"),
    "both": (component({"mode": "default", "options": {"a": 1}}), "mode and options", "takes one of the two", ""),
    "CUDA graphs": (component({"mode": "max-autotune"}), "'max-autotune'", "replays CUDA graphs", "no-cudagraphs"),
    "the option": (component({"options": {"triton.cudagraphs": True}}), "cudagraphs", "overwrite", "leave it out"),
    "misaligned": (misaligned, "'tower.0.second' stands 12 bytes", "no multiple of 16", "shard='nothing'"),
}


@each(REFUSED)
def test_what_cannot_be_compiled_is_refused(refusal: Refusal) -> None:
    check_refusal(refusal, WorkloadError)


def test_a_compilation_reads_the_same_in_every_process() -> None:
    def backend(graph: Any, inputs: Any) -> None: ...

    assert str(Compilation(backend=backend)).startswith("test_a_compilation_reads")
    assert Compilation.of("tower", True) == Compilation()
    assert Compilation.of("tower", False) is None
