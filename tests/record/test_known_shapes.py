"""KnownShapes: what it gives is what torch gives, and what could be another tensor each time runs each time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spindle.record.on_meta.known_shapes import KnownShapes


class Through(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """All operations go through KnownShapes; the names of operations that ran are in `ran`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes, self.ran = KnownShapes(), list[str]()
        self.counted: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in self.counted:

            def counted(*given: Any, **named: Any) -> Any:
                self.ran.append(func._schema.name)
                return func(*given, **named)

            self.counted[func] = counted
            self.counted[func]._schema, self.counted[func].namespace = func._schema, func.namespace
        return self.shapes.run(self.counted[func], args, kwargs or {})


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum of two types": lambda x, y: x + y.long(),
    "product": lambda x, y: x @ y.T,
    "norm, of several results": lambda x, y: torch.native_layer_norm(x.T, [x.shape[0]], None, None, 1e-5),
    "by a number": lambda x, y: (x * 2, x * 2.5, y > 0, x.sum(0), x.sum(1, keepdim=True), x.amax(-1)),
    "other strides": lambda x, y: (x.T + 1, x.T.contiguous() + 1, x[:, ::2] * y[:, ::2]),
    "list": lambda x, y: torch.cat([x, y, y], 1),
    "loss": lambda x, y: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long, device=x.device)),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
    "other type": lambda x, y: x.to(torch.bfloat16) + y.half(),
}


def told(result: Any) -> list[object]:
    """Shape, strides, type and gradient of each tensor."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """The first time, the second time, and for other shapes, with gradients."""
    run, through = OPERATIONS[name], Through()
    for rows in (4, 4, 3, 4):
        x, y = (torch.empty(rows, 6, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
        with through:
            found = run(x, y)
        assert told(found) == told(run(x, y))


def test_an_operation_runs_once_for_arguments_that_are_alike() -> None:
    through, x = Through(), torch.empty(4, 6, device="meta")
    with through:
        first, second, other = x * 2, x * 2, x * 3
    assert through.ran == ["aten::mul"] * 2
    assert first is not second
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert other.shape == first.shape


def test_views_writes_and_numbers_run_each_time() -> None:
    """A view lies in the memory of its base, a write bumps a version, and real numbers are computed."""
    through, x, real = Through(), torch.zeros(4, 6, device="meta"), torch.ones(2)
    with through:
        for _ in range(2):
            assert x.view(24)._base is x
            x.add_(1)
            assert torch.equal(real + real, torch.tensor([2.0, 2.0]))
    assert x._version == 2
    assert through.ran.count("aten::view") == through.ran.count("aten::add_") == 2
    assert through.ran.count("aten::add") == 2
