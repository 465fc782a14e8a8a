"""What capture makes can be sent to other processes: as code, not to be traced again there."""

import cloudpickle
import torch
from torch import Tensor, nn

import spindle
from spindle.capture import capture


class Words(nn.Module):
    """An LSTM, whose first state is zeros of as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        value: Tensor = self.lstm(self.embed(words))[0]
        return value[:, -1]


def test_sizes_from_the_number_of_samples_survive_the_journey_regression() -> None:
    """Twice, as from driver to worker and on; with its parameters, and equal results for another number of samples."""
    torch.manual_seed(0)
    workload = spindle.Workload("words")
    words = workload.component("words", Words())
    batches = [{"words": torch.randint(0, 11, (4, 5))}]

    @workload.task("t", batch_size=4, data=batches)
    def task(batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = words(batch["words"]).square().mean()
        return value

    compared: list[str] = []
    for name, code in capture(workload).codes.items():
        sent = cloudpickle.loads(cloudpickle.dumps(cloudpickle.loads(cloudpickle.dumps(code.module))))
        assert [n for n, _ in sent.named_parameters()] == [n for n, _ in code.module.named_parameters()], name
        assert all(map(torch.equal, sent.parameters(), code.module.parameters())), name
        if [given.kind for given in code.inputs] == ["rows", "aux"]:
            compared.append(name)
            value = torch.randint(0, 11, (3, 5))
            assert torch.equal(sent(3, value)[0], code.module(3, value)[0])
    assert compared
