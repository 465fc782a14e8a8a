"""What capture makes can be sent to other processes, which record batches of any size and compute the same."""

import copy

import cloudpickle
import torch
from torch import Tensor, nn

import spindle
from spindle.capture import Captured, capture
from spindle.capture.codes import OnDevice
from spindle.capture.operators.parts import TaskPart, divide
from spindle.inputs.batch import SampledBatch
from spindle.record.run import record
from spindle.record.substitutes.draws import Stream
from spindle.runtime.loading.recordings import Recipe

CPU = torch.device("cpu")


class Words(nn.Module):
    """An LSTM, whose first state is zeros of as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        value: Tensor = self.lstm(self.embed(words))[0]
        return value[:, -1]


def reading() -> spindle.Workload:
    torch.manual_seed(0)
    workload = spindle.Workload("words")
    words = workload.component("words", Words())
    batches = [{"words": torch.randint(0, 11, (4, 5))}]

    @workload.task("t", batch_size=4, data=batches)
    def task(batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = words(batch["words"]).square().mean()
        return value

    return workload


def sent(module: nn.Module) -> nn.Module:
    arrived = cloudpickle.loads(cloudpickle.dumps(module))
    assert isinstance(arrived, nn.Module)
    return arrived


def recorded(recipe: Recipe, batch: SampledBatch) -> TaskPart:
    """A whole batch as a recipe records it."""
    bounds = (0, batch.units.num_samples)
    stream = Stream(task="t", high=bounds[1], units=batch.units)
    found = record(recipe.skeleton, recipe.functions["t"], batch.part(*bounds), stream=stream, sites=())
    return divide(recipe.codes["t"], found, bounds, batch.units, OnDevice(CPU), "task 't'")


def loss(captured: Captured, part: TaskPart, modules: dict[str, nn.Module]) -> Tensor:
    """The loss as the operators compute it, one after another."""
    values: dict[str, Tensor] = {}
    for operator in captured.graph.operators:
        code = captured.codes[operator.name]
        outputs = modules[code.name](part.operators[code.name], *(values[name] for name in code.inputs))
        values.update(zip(code.outputs, outputs, strict=True))
    return values[captured.losses["t"]]


def test_what_is_sent_computes_the_same_for_any_number_of_samples() -> None:
    """Twice, as from driver to worker and on: the recipe without weights, the modules with theirs."""
    workload = reading()
    captured = capture(workload)
    recipe = Recipe.of(workload, captured)
    arrived: Recipe = cloudpickle.loads(cloudpickle.dumps(cloudpickle.loads(cloudpickle.dumps(recipe))))
    modules = {name: sent(sent(code.module)) for name, code in captured.codes.items()}
    for name, code in captured.codes.items():
        assert [n for n, _ in modules[name].named_parameters()] == [n for n, _ in code.module.named_parameters()]
        assert all(map(torch.equal, modules[name].parameters(), code.module.parameters()))
    assert all(p.is_meta for module in arrived.skeleton.components.values() for p in module.parameters())
    task = workload.tasks["t"]
    for samples in (1, 3, 4, 9):
        batch = task.sampled({"words": torch.randint(0, 11, (samples, 2 + samples))})
        found = loss(captured, recorded(arrived, batch), modules)
        torch.testing.assert_close(found, task.function(dict(batch.fields)))


def test_places_in_the_code_are_the_same_in_another_process() -> None:
    """A recipe that arrived, whose modules are others, records the same operators and values."""
    workload = reading()
    captured = capture(workload)
    recipe = Recipe.of(workload, captured)
    batch = workload.tasks["t"].sampled({"words": torch.randint(0, 11, (3, 5))})
    here, there = recorded(recipe, batch), recorded(recipe.apart(), batch)
    assert here.shapes == there.shapes
    assert {name: len(part.nodes) for name, part in here.operators.items()} == {
        name: len(part.nodes) for name, part in there.operators.items()
    }


def test_a_sent_operator_can_be_copied_regression() -> None:
    """As the profiler does: parameters of their own, the same values."""
    for code in capture(reading()).codes.values():
        arrived = sent(code.module)
        copied = copy.deepcopy(arrived)
        assert type(copied) is type(arrived)
        for one, other in zip(arrived.parameters(), copied.parameters(), strict=True):
            assert one is not other
            assert torch.equal(one, other)
