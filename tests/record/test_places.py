"""Places: by which unit and dimension the values that operators send are cut; and they train as in one process."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from tests.random_plans import widest_plan
from tests.record.test_recording import BATCH, Batch, workload_of
from tests.tiny_workloads import VOCABULARY, WIDTH, Residual, floats, tokens


def places(workload: spindle.Workload) -> dict[str, list[tuple[tuple[int, ...], str, int]]]:
    """Shape, unit and dimension of what each operator sends."""
    return {
        op.name: [(tensor.shape, tensor.unit, tensor.row_dim) for tensor in op.outputs]
        for op in capture(workload).graph.operators
    }


def verified(workload: spindle.Workload, ranks: int = 3) -> None:
    plan = widest_plan(spindle.make_metagraph(workload), ranks)
    report = spindle.verify(workload, plan, launcher="threads")
    assert report.ok, str(report)


class Reader(nn.Module):
    """Words, layers, a head; `rows` are the states' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.words(ids)
        for layer in self.layers:
            y = layer(y)
        found: Tensor = self.head(y)
        return found


def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().double()


def _next_word(m: nn.Module, b: Batch) -> Tensor:
    return F.cross_entropy(m(b["ids"]).flatten(0, 1), b["ids"].flatten(), ignore_index=0)


def test_padded_text() -> None:
    """Each batch is as long as its longest text; states are cut by samples, losses by as many tokens each."""
    data = [{"ids": tokens(BATCH, length, length)} for length in (6, 9, 4)]
    for b in data:
        b["ids"][1, 2:] = 0
    workload = workload_of(_next_word, reader(), data)
    found = places(workload)
    assert found["t.m.layers.0"] == [((BATCH, 6, WIDTH), "samples", 0)]
    assert found["t.m.post"][0] == ((BATCH * 6,), "samples", 0)
    verified(workload)


def test_packed_text() -> None:
    """Texts follow each other in one row: states are cut along the second dimension, by tokens."""

    def packed(*lengths: int) -> Batch:
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {"ids": tokens(1, sum(lengths), sum(lengths)), "positions": positions[None]}

    def rows(b: Batch) -> dict[str, object]:
        starts = (b["positions"][0] == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([b["ids"].shape[1]]))
        return dict.fromkeys(b, (1, lengths))

    data = [packed(3, 5, 2, 4), packed(6, 1, 1, 3), packed(2, 9)]
    workload = workload_of(_next_word, reader(), data, rows=rows)
    found = places(workload)
    assert found["t.m.layers.0"] == [((1, 14, WIDTH), "ids", 1)]
    verified(workload)


def test_images_by_unit() -> None:
    """Patches of any number of images: a tower over patches is cut by patches, what it joins to by samples."""

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Linear(5, WIDTH)
            self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(2))
            self.words = nn.Embedding(VOCABULARY, WIDTH)

        def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
            seen = self.patch(patches)
            for layer in self.layers:
                seen = layer(seen)
            merged = seen.unflatten(0, (-1, 2)).mean(1)
            y: Tensor = self.words(ids)
            return y.masked_scatter((ids == 1)[..., None].expand_as(y), merged)

    def seen(*images: int) -> Batch:
        ids = tokens(len(images), 6, sum(images))
        for sample, count in enumerate(images):
            ids[sample, :count] = 1
        return {"ids": ids, "patches": floats(2 * sum(images), 5, seed=sum(images), dtype=torch.float64)}

    torch.manual_seed(0)
    workload = workload_of(
        lambda m, b: m(**b).square().mean(),
        Seeing().double(),
        [seen(1, 0, 3, 2), seen(2, 2, 0, 1), seen(1, 4, 1, 1)],
        rows=lambda b: {"patches": 2 * (b["ids"] == 1).sum(1)},
    )
    found = places(workload)
    assert found["t.m.layers.0"] == [((12, WIDTH), "patches", 0)]
    joined = [sent for name, sent in found.items() if name.startswith("t.m.post")]
    assert joined == [[((BATCH,), "samples", 0)]]
    verified(workload)
