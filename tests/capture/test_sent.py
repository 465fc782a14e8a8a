"""What capture makes can be sent to other processes: as code, not to be traced again there."""

import copy
from collections.abc import Mapping

import cloudpickle
import torch
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.capture.codes import OperatorCode


class Words(nn.Module):
    """An LSTM, whose first state is zeros of as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        value: Tensor = self.lstm(self.embed(words))[0]
        return value[:, -1]


def operators() -> Mapping[str, OperatorCode]:
    torch.manual_seed(0)
    workload = spindle.Workload("words")
    words = workload.component("words", Words())
    batches = [{"words": torch.randint(0, 11, (4, 5))}]

    @workload.task("t", batch_size=4, data=batches)
    def task(batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = words(batch["words"]).square().mean()
        return value

    return capture(workload).codes


def sent(module: nn.Module) -> nn.Module:
    arrived = cloudpickle.loads(cloudpickle.dumps(module))
    assert isinstance(arrived, nn.Module)
    return arrived


def test_sizes_from_the_number_of_samples_survive_the_journey_regression() -> None:
    """Twice, as from driver to worker and on; with its parameters, and equal results for another number of samples."""
    compared: list[str] = []
    for name, code in operators().items():
        arrived = sent(sent(code.module))
        assert [n for n, _ in arrived.named_parameters()] == [n for n, _ in code.module.named_parameters()], name
        assert all(map(torch.equal, arrived.parameters(), code.module.parameters())), name
        if [given.kind for given in code.inputs] == ["rows", "aux"]:
            compared.append(name)
            value = torch.randint(0, 11, (3, 5))
            assert torch.equal(arrived(3, value)[0], code.module(3, value)[0])
    assert compared


def test_a_sent_operator_can_be_copied_regression() -> None:
    """As the profiler does: parameters of their own, the same values."""
    for code in operators().values():
        arrived = sent(code.module)
        copied = copy.deepcopy(arrived)
        assert type(copied) is type(arrived)
        for one, other in zip(arrived.parameters(), copied.parameters(), strict=True):
            assert one is not other
            assert torch.equal(one, other)
