"""Recordings: what a task computes from parameters, noted on tensors without numbers, gives the same when executed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from spindle.record.lazy import LazyRead, Refused, Stranger
from spindle.record.recording import Recording, execute
from spindle.record.run import Failure, record
from spindle.record.sites import Sites
from spindle.record.skeleton import Skeleton
from spindle.record.substitutes.draws import Stream
from tests.tiny_workloads import floats

Batch = dict[str, Tensor]
Task = Callable[[nn.Module, Batch], Any]
CPU = torch.device("cpu")
BATCH = 4


def linear(outputs: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, outputs).double()


def batch(**more: Tensor) -> Batch:
    return {"x": floats(BATCH, 5, seed=0, dtype=torch.float64), **more}


def recorded(task: Task, module: nn.Module, fields: Batch) -> Recording:
    """What a task's call comes to; its failures are raised as they are."""
    skeleton = Skeleton({"m": module}, [])
    fields = {name: value.clone() for name, value in fields.items()}
    try:
        return record(skeleton, lambda given: task(module, given), fields, stream=Stream()).recording
    except Failure as failure:
        raise failure.error from None


def executed(recording: Recording, module: nn.Module) -> Tensor:
    named = {f"m.{name}": value for name, value in (*module.named_parameters(), *module.named_buffers())}
    values: dict[int, Tensor] = {}
    execute(
        recording.nodes,
        values,
        aux=recording.aux.__getitem__,
        leaf=named.__getitem__,
        leaves=recording.leaves,
        blocks={},
        device=CPU,
    )
    return values[recording.loss]


def exact(task: Task, module: nn.Module, fields: Batch) -> Recording:
    """Loss and gradients of what is recorded are those of a plain call."""
    recording = recorded(task, module, fields)
    parameters = list(module.parameters())
    plain = task(module, {name: value.clone() for name, value in fields.items()})
    found = executed(recording, module)
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    return recording


# -- writes -----------------------------------------------------------------------------------------------------------


def _in_place(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    y.mul_(2)
    y += b["x"][:, :1]
    y[:, 0] = 3.0
    y[1:, 2:4] = y[:-1, 2:4] * 2
    torch.relu_(y)
    return y.square().sum()


def _to_views(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    y[:, :2].mul_(3)
    y.T[0].add_(1)
    y.view(-1)[::2] = 0.5
    first = y[:, :3]
    first.add_(y[:, 3:])
    return (first.sum() + y).square().mean()


def _to_a_view_of_a_view(m: nn.Module, b: Batch) -> Tensor:
    y = torch.stack([m(b["x"]), m(b["x"] * 2)], 1)
    y[:, 1][:, 0].fill_(2.0)
    row = y[0]
    row[0].zero_()
    return y.square().mean()


def _into_a_real_tensor(m: nn.Module, b: Batch) -> Tensor:
    """The tensor was made from the batch alone; afterwards it depends on parameters."""
    y: Tensor = m(b["x"])
    held = torch.zeros(BATCH, 6, dtype=y.dtype)
    held[:, 1] = y[:, 0]
    held[0] = y[1]
    return (held * held).sum() + held.max()


def _into_a_real_tensor_by_name(m: nn.Module, b: Batch) -> Tensor:
    held = torch.ones(BATCH, 6, dtype=b["x"].dtype)
    held += m(b["x"])
    return F.mse_loss(input=held, target=torch.zeros(BATCH, 6, dtype=held.dtype))


def _into_a_view_of_a_real_tensor(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    held = torch.ones(BATCH, 6, dtype=y.dtype)
    held[:, 1].copy_(y[:, 0])
    held[:, 2].mul_(y[:, 1])
    return held.square().sum()


def _into_a_view_of_a_changed_tensor(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    held = torch.ones(BATCH, 6, dtype=y.dtype)
    held[:, 0] = y[:, 3]
    held[:, 1].copy_(y[:, 0])
    held[1][2:4].mul_(y[0, 2:4])
    return held.square().sum()


def _real_between_reads(m: nn.Module, b: Batch) -> Tensor:
    """A tensor of the batch's that changes after it was read."""
    positions = torch.arange(6, dtype=b["x"].dtype)
    y: Tensor = m(b["x"]) + positions
    positions += 1
    positions[2:].mul_(3)
    return (y * positions).square().sum()


def _new_of_its_sizes(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    return (y * y.new(y.shape).fill_(2.0)).sum()


def _out(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"]).detach()
    held = torch.empty(0, dtype=y.dtype)
    torch.mul(y, 2, out=held)
    loss: Tensor = held.sum() * m(b["x"]).mean()
    return loss


def _new_data(x: Tensor) -> None:
    x.data = 2 * x


def _by_numpy(x: Tensor) -> None:
    x.numpy()[0] = 5.0


UNSEEN: dict[str, Callable[[Tensor], object]] = {
    "by inplace=": lambda x: F.relu(x, inplace=True),
    "as one of a list": lambda x: torch._foreach_mul_([x], 2.0),
    "by one out= of two": lambda x: torch.sort(x.clone(), out=(x, torch.empty(0, dtype=torch.long))),
    "through .data": lambda x: x.data.mul_(2),
    "as new .data": _new_data,
    "in numpy": _by_numpy,
    "by name": lambda x: nn.init.constant_(tensor=x, val=1.0),
}


@pytest.mark.parametrize("how", UNSEEN)
def test_a_call_has_read_what_a_real_tensor_held_then(how: str) -> None:
    """However it changes afterwards, and is read once more."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        x = b["x"].clone()
        y = m(b["x"]) + x
        UNSEEN[how](x)
        found: Tensor = (y + 2 * x).square().mean()
        return found

    exact(task, linear(5), batch())


WRITES: dict[str, Task] = {
    "in place": _in_place,
    "to views": _to_views,
    "to a view of a view": _to_a_view_of_a_view,
    "into a real tensor": _into_a_real_tensor,
    "into a real tensor, read by name": _into_a_real_tensor_by_name,
    "into a view of a real tensor": _into_a_view_of_a_real_tensor,
    "into a view of a changed tensor": _into_a_view_of_a_changed_tensor,
    "into a real tensor between two reads": _real_between_reads,
    "by out=": _out,
    "into a new tensor of its sizes": _new_of_its_sizes,
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    """Each gives a new value, so that every value has one maker; the result is that of a plain call."""
    recording = exact(WRITES[name], linear(), batch())
    made = [out for n in recording.nodes for out in n.outs if out >= 0]
    assert len(made) == len(set(made))


def _old_view(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    view = y[:, 0]
    y.mul_(2)
    return view.sum()


def _neighbor(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    left, right = y[:, :3], y[:, 2:]
    left.zero_()
    return right.sum()


def _part_of_a_view(m: nn.Module, b: Batch) -> Tensor:
    """The value is itself a view, of what the layer gave."""
    y: Tensor = m(b["x"]).unflatten(1, (2, 3))
    y[:, 1].fill_(2.0)
    return y.sum()


def _detached(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    twin = y.detach()
    y.mul_(2)
    return (twin * y).sum()


def _view_of_a_real_tensor(m: nn.Module, b: Batch) -> Tensor:
    held = torch.zeros(BATCH, 6, dtype=b["x"].dtype)
    view = held[:, 0]
    held[:, 0] = m(b["x"])[:, 0]
    return view.sum()


def _view_beside_a_value(m: nn.Module, b: Batch) -> Tensor:
    held = torch.zeros(BATCH, 6, dtype=b["x"].dtype)
    view = held[:, 0]
    y: Tensor = m(b["x"])
    held[:, 0] = y[:, 0]
    return (view + y[:, 1]).sum()


def _changed_view_of_a_real_tensor(m: nn.Module, b: Batch) -> Tensor:
    y: Tensor = m(b["x"])
    held = torch.zeros(BATCH, 6, dtype=y.dtype)
    view = held[:, 0]
    view.copy_(y[:, 0])
    held.mul_(y)
    return view.sum()


STALE: dict[str, Task] = {
    "a view": _old_view,
    "a view that overlaps": _neighbor,
    "a view, through a part of it": _part_of_a_view,
    "detached": _detached,
    "a view of a real tensor": _view_of_a_real_tensor,
    "a view of a real tensor, beside a value of the model": _view_beside_a_value,
    "a changed view of a real tensor": _changed_view_of_a_real_tensor,
}


@pytest.mark.parametrize("name", STALE)
def test_a_tensor_whose_memory_has_changed_is_refused(name: str) -> None:
    """Values have no memory in common, so what another view of it holds is not known."""
    with pytest.raises(Refused, match=r"is read after .* write to a clone"):
        recorded(STALE[name], linear(), batch())


# -- sizes that the batch decides -------------------------------------------------------------------------------------


def test_a_boolean_mask_from_the_batch_picks_rows() -> None:
    """As indices: their number is known, and the indices are real."""
    mask = torch.tensor([True, False, True, True])

    def task(m: nn.Module, b: Batch) -> Tensor:
        y = m(b["x"])
        picked = y[b["mask"]]
        assert picked.shape == (3, 6)
        y[~b["mask"], 1] = 2.0
        y[:, 2].masked_fill_(b["mask"], 0.0)
        loss: Tensor = picked.sum() + y.square().sum() + y.masked_select(b["mask"][:, None]).sum()
        return loss

    recording = exact(task, linear(), batch(mask=mask))
    assert any(torch.equal(value, torch.tensor([0, 2, 3])) for value in recording.aux)


def test_masks_scatter_as_rows() -> None:
    """A mask that covers whole vectors is kept as one index a vector, not one an entry."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        words = m(b["x"])
        images = m(b["images"])
        mask = (b["ids"] == 1)[:, None].expand_as(words)
        loss: Tensor = words.masked_scatter(mask, images).square().sum()
        return loss

    fields = batch(ids=torch.tensor([1, 0, 1, 0]), images=floats(2, 5, seed=1, dtype=torch.float64))
    recording = exact(task, linear(), fields)
    (where,) = (value for value in recording.aux if value.dtype == torch.int64)
    assert where.tolist() == [0, 2]


@pytest.mark.parametrize("dim", [None, 0])
def test_repeats_that_the_batch_decides(dim: int | None) -> None:
    def task(m: nn.Module, b: Batch) -> Tensor:
        y = m(b["x"])[:, 0]
        repeated = torch.repeat_interleave(y, b["counts"], dim) if dim is not None else y.repeat_interleave(b["counts"])
        assert repeated.shape == (6,)
        weights: Tensor = torch.arange(6.0, dtype=y.dtype)
        return (repeated * weights).sum()

    exact(task, linear(), batch(counts=torch.tensor([2, 0, 3, 1])))


def test_what_depends_on_the_batch_alone_is_computed() -> None:
    """Python may read it: sizes, lists, branches, other libraries' arrays."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        lengths = b["lengths"].tolist()
        assert b["lengths"].numpy().max() == 3
        y = m(b["x"])
        parts = [part.mean(0) for part in y.split(lengths)]
        total: Tensor = torch.stack(parts).square().sum()
        return total * 2 if bool((b["lengths"] > 2).any()) else total

    recording = exact(task, linear(), batch(lengths=torch.tensor([1, 3])))
    assert len(recording.aux) == 1  # x alone is read by what depends on parameters


def test_indices_from_the_batch_may_be_given_by_a_value_s_shape() -> None:
    """Shape, type, device and number of dimensions of a value are known; it says that it is on the CPU."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        y = m(b["x"])
        assert (y.device, y.is_meta, y.ndim, len(y), y.dtype) == (CPU, False, 2, BATCH, torch.float64)
        positions = torch.arange(y.shape[1], device=y.device, dtype=y.dtype)
        loss: Tensor = (y.to(positions.device) * positions).sum()
        return loss

    exact(task, linear(), batch())


# -- modes ------------------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Passes its input through; its gradient counts tenfold."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 10


def test_an_autograd_function_keeps_its_own_backward() -> None:
    """It is one call."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        found: Tensor = Doubled.apply(m(b["x"]))  # type: ignore[no-untyped-call]
        return found.square().sum()

    module = linear()
    recording = exact(task, module, batch())
    plain = torch.autograd.grad(module(batch()["x"]).square().sum(), list(module.parameters()))
    found = torch.autograd.grad(executed(recording, module), list(module.parameters()))
    torch.testing.assert_close(found, tuple(10 * gradient for gradient in plain))


def test_a_region_without_gradients() -> None:
    def task(m: nn.Module, b: Batch) -> Tensor:
        y = m(b["x"])
        with torch.no_grad():
            scale = y.abs().mean(0)
        loss: Tensor = (y / scale + y.detach()).square().mean()
        return loss

    recording = exact(task, linear(), batch())
    assert [n.grad for n in recording.nodes].count(False) == 2


def test_a_region_of_autocast() -> None:
    """A call keeps the autocast that it was made under, where that is not the workload's."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        y = m(b["x"])
        with torch.autocast("cpu", torch.bfloat16):
            z = y @ y.T
            assert z.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            z = z.float()
        loss: Tensor = z.square().mean() + y.mean()
        return loss

    torch.manual_seed(0)
    recording = exact(task, nn.Linear(5, 6), {"x": floats(BATCH, 5, seed=0, dtype=torch.float32)})
    marked = [n.autocast for n in recording.nodes if n.autocast is not None]
    assert [(mark.enabled, mark.dtype) for mark in marked] == [(True, torch.bfloat16)] * 2


def test_a_checkpoint_outside_of_layers_is_a_plain_call() -> None:
    """Activations are kept or computed again as the plan says."""
    from torch.utils.checkpoint import checkpoint

    def task(m: nn.Module, b: Batch) -> Tensor:
        found: Tensor = checkpoint(m, b["x"], use_reentrant=False)
        return found.square().mean()

    exact(task, linear(), batch())


def test_sums_go_row_by_row_first() -> None:
    """So that one number a row is gathered where a sum is over rows of several devices."""
    recording = exact(lambda m, b: m(b["x"]).square().mean(), linear(), batch())
    assert [recording.shapes[out] for n in recording.nodes[-2:] for out in n.outs] == [(BATCH,), ()]
    assert len({n.site for n in recording.nodes}) == len(recording.nodes)


# -- what cannot be known ---------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Tensor], object]] = {
    "if": lambda y: bool(y.sum() > 0),
    "int": lambda y: int(y.sum()),
    "item": lambda y: y.sum().item(),
    "list": lambda y: y.tolist(),
    "array": lambda y: y.detach().numpy(),
    "while": lambda y: [0 for _ in iter(lambda: bool(y.any()), False)],
    "index": lambda y: [1, 2, 3][y.argmax()],
    "equal": lambda y: torch.equal(y, y),
    "assertion": lambda y: torch.allclose(y, y),
}


@pytest.mark.parametrize("name", READS)
def test_reading_a_value_s_number_is_refused(name: str) -> None:
    def task(m: nn.Module, b: Batch) -> Tensor:
        y: Tensor = m(b["x"])
        READS[name](y)
        return y.sum()

    with pytest.raises(LazyRead):
        recorded(task, linear(), batch())


def test_printing_a_value_works(capsys: pytest.CaptureFixture[str]) -> None:
    """As a note of what it is; its numbers are not known."""

    def task(m: nn.Module, b: Batch) -> Tensor:
        y: Tensor = m(b["x"])
        print(y, f"{y}", repr(y))
        return y.sum()

    recorded(task, linear(), batch())
    assert capsys.readouterr().out.split("\n")[0] == " ".join(["<value of the model, shape (4, 6)>"] * 3)


OPENS: dict[str, Callable[[Any], object]] = {
    "backward": lambda loss: loss.backward(),
    "grad": lambda loss: torch.autograd.grad(loss, [loss]),
    "hook": lambda loss: loss.register_hook(lambda gradient: gradient * 2),
    "retain": lambda loss: loss.retain_grad(),
}


@pytest.mark.parametrize("name", OPENS)
def test_gradients_in_a_task_are_refused(name: str) -> None:
    def task(m: nn.Module, b: Batch) -> Tensor:
        loss: Tensor = m(b["x"]).sum()
        OPENS[name](loss)
        return loss

    with pytest.raises(Refused, match=r"on a value of the model; return the loss, its gradients are computed"):
        recorded(task, linear(), batch())


def test_a_parameter_of_no_component_is_refused() -> None:
    own = nn.Linear(6, 2).double()
    with pytest.raises(Stranger, match="2 x 6"):
        recorded(lambda m, b: own(m(b["x"])).sum(), linear(), batch())
    with pytest.raises(Stranger, match="2 x 6"):
        recorded(lambda m, b: own(b["more"]).sum() + m(b["x"]).sum(), linear(), batch(more=torch.zeros(1, 6)))
    own.requires_grad_(False)
    exact(lambda m, b: own(m(b["x"])).sum(), linear(), batch())


def workload_of(task: Task, module: nn.Module, data: list[Batch], **options: object) -> spindle.Workload:
    workload = spindle.Workload("w")
    workload.component("m", module)
    workload.task("t", batch_size=BATCH, data=data, **options)(lambda b: task(module, b))  # type: ignore[arg-type]
    return workload


REFUSED: dict[str, tuple[Task, str]] = {
    "a branch": (
        lambda m, b: m(b["x"]).sum() if m(b["x"]).sum() > 0 else m(b["x"]).mean(),
        r"it branches on a value computed from parameters \(if, while, int\(\), \.item\(\)\); use torch\.where",
    ),
    "backward": (
        lambda m, b: m(b["x"]).sum().backward(),
        r"it calls backward on a value of the model; return the loss",
    ),
    "a stale view": (_old_view, r"a tensor is read after its memory was written to through another view"),
    "a stranger": (lambda m, b: nn.Linear(6, 2).double()(m(b["x"])).sum(), r"a trainable parameter \(2 x 6\) of no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_task_and_line(name: str) -> None:
    task, message = REFUSED[name]
    with pytest.raises(WorkloadError, match=rf"task 't', line \d+ of test_recording\.py:? ?.*{message}"):
        capture(workload_of(task, linear(), [batch()]))


def test_a_place_stays_the_same_when_python_specializes_its_code() -> None:
    """After some calls Python 3.11 calls a builtin by another instruction than at first."""
    sites = Sites()

    def run() -> int:
        return sum(sites.here(start.__code__) for _ in (0,))

    def start() -> int:
        return run()

    assert len({start() for _ in range(300)}) == 1


def test_memory_that_is_taken_unset_is_alike_in_each_recording() -> None:
    """It holds what was there before, until it is written to: two recordings of a batch would not be the same."""

    def task(module: nn.Module, fields: Batch) -> Tensor:
        found = torch.empty(BATCH, 6, dtype=torch.float64)
        found[:, :3] = module(fields["x"])[:, :3]
        found[:, 3:] = torch.empty_like(found[:, 3:]).copy_(fields["x"][:, :3])
        return found.sum() + fields["x"].new_empty(3).fill_(1.0).sum()

    whole = recorded(task, linear(), batch())
    again = recorded(task, linear(), batch())
    assert whole.aux
    assert all(torch.equal(a, b) for a, b in zip(whole.aux, again.aux, strict=True))
    assert all(bool((each.abs() < 1e3).all()) for each in whole.aux if each.is_floating_point())
