"""Draws: a random number is a function of its place in training, so every part of a batch gets its part."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spindle.errors import WorkloadError
from spindle.record.substitutes.draws import Draw, Site, Stream, draw, drawing_from
from spindle.record.substitutes.randomness import Drawing

CPU = torch.device("cpu")
FILLS = [("bernoulli_", (0.3,)), ("uniform_", (0.0, 1.0)), ("normal_", (0.0, 1.0)), ("random_", (0.0, 9.0))]


def drawn(fill: str, numbers: tuple[float, ...], shape: tuple[int, ...], site: Site, stream: Stream) -> Tensor:
    with drawing_from(stream):
        return draw(Draw(fill, numbers, shape, torch.float64, CPU), "block", 0, site)


@settings(max_examples=60, deadline=None)
@given(
    fill=st.sampled_from(FILLS),
    samples=st.integers(1, 40),
    per_sample=st.integers(1, 3),
    others=st.lists(st.sampled_from([1, 3, 50]), max_size=2),
    dim=st.integers(0, 2),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
def test_parts_of_a_batch_get_their_parts_of_the_whole(
    fill: tuple[str, tuple[float, ...]],
    samples: int,
    per_sample: int,
    others: list[int],
    dim: int,
    cuts: list[int],
) -> None:
    """However a batch is cut, along whatever dimension samples lie, the parts are those of the whole batch."""
    dim = min(dim, len(others))
    site = Site(dim, per_sample)

    def part(low: int, high: int) -> Tensor:
        shape = [*others[:dim], (high - low) * per_sample, *others[dim:]]
        return drawn(*fill, tuple(shape), site, Stream(step=3, low=low))

    bounds = sorted({0, samples, *(cut for cut in cuts if cut < samples)})
    parts = [part(low, high) for low, high in pairwise(bounds)]
    assert torch.equal(torch.cat(parts, dim), part(0, samples))


def test_every_place_has_numbers_of_its_own() -> None:
    """Seed, step, batch, task, scope, call and sample: change one, and the numbers are others."""
    streams = [Stream(), Stream(seed=1), Stream(step=1), Stream(batch=1), Stream(task="a"), Stream(low=1)]
    found = [drawn("uniform_", (0.0, 1.0), (4, 8), Site(0, 1), stream) for stream in streams]
    with drawing_from(Stream()):
        what = Draw("uniform_", (0.0, 1.0), (4, 8), torch.float64, CPU)
        found += [draw(what, "other block", 0, Site(0, 1)), draw(what, "block", 1, Site(0, 1))]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    rows = found[0]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_a_draw_that_is_not_made_of_samples_is_the_same_for_all() -> None:
    """A mask that all samples share is the same on every part."""
    shared = [drawn("bernoulli_", (0.5,), (1, 64), Site(-1, 0), Stream(low=low)) for low in (0, 7)]
    assert torch.equal(*shared)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_right(rate: float) -> None:
    """Of a million numbers as many are dropped as a binomial law allows (five sigma), and the mean stays."""
    x = torch.ones(1000, 1000, dtype=torch.float64)
    with Drawing("", None):
        y = F.dropout(x, rate)
    dropped, sigma = int((y == 0).sum()), math.sqrt(1e6 * rate * (1 - rate))
    assert abs(dropped - 1e6 * rate) < 5 * sigma
    assert sorted(set(y[:10].flatten().tolist())) == pytest.approx([0, 1 / (1 - rate)])
    by_row, by_column = (y == 0).double().mean(1), (y == 0).double().mean(0)
    for means in (by_row, by_column):  # no row or column stands out, so neither samples nor channels go together
        assert float((means - rate).abs().max()) < 6 * math.sqrt(rate * (1 - rate) / 1000)


DROPOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.dropout1d(x[0], 0.5),
    lambda x: F.dropout2d(x, 0.5),
    lambda x: F.dropout3d(x[..., None], 0.5)[..., 0],
    lambda x: torch.feature_dropout(x, 0.5, True),
]


@pytest.mark.parametrize("function", DROPOUTS)
def test_dropout_of_channels_drops_them_whole(function: Callable[[Tensor], Tensor]) -> None:
    with Drawing("", None):
        y = function(torch.ones(6, 40, 3, 3))
    channels = y.reshape(-1, y[0, 0].numel())
    assert set(channels.mean(1).tolist()) == {0.0, 2.0}


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))
    with Drawing("", None):
        y = F.alpha_dropout(x, 0.3, training=True)
    assert float(y.mean()) == pytest.approx(0, abs=0.02)
    assert float(y.var()) == pytest.approx(1, abs=0.03)


def test_dropout_off_passes_its_input_through() -> None:
    x = torch.ones(3)
    with Drawing("", None) as drawing:
        assert F.dropout(x, 0.5, training=False) is x
        assert F.dropout(x, 0.0) is x
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(3))
    assert len(drawing.shapes) == 0


def test_dropout_in_place() -> None:
    x = torch.ones(1000)
    with Drawing("", None):
        y = F.dropout(x, 0.5, inplace=True)
    assert y is x
    assert set(x.tolist()) == {0.0, 2.0}


FUNCTIONS: dict[str, tuple[Callable[[], Tensor], tuple[int, ...], torch.dtype]] = {
    "rand": (lambda: torch.rand(2, 3), (2, 3), torch.float32),
    "rand size": (lambda: torch.rand((2, 3), dtype=torch.float64), (2, 3), torch.float64),
    "randn": (lambda: torch.randn(size=(4,)), (4,), torch.float32),
    "rand_like": (lambda: torch.rand_like(torch.ones(2, dtype=torch.float64)), (2,), torch.float64),
    "randn_like": (lambda: torch.randn_like(torch.ones(2), dtype=torch.float64), (2,), torch.float64),
    "randint": (lambda: torch.randint(5, (3,)), (3,), torch.int64),
    "randint low": (lambda: torch.randint(2, 5, size=(3,)), (3,), torch.int64),
    "randint named": (lambda: torch.randint(low=2, high=5, size=(3,)), (3,), torch.int64),
    "randint_like": (lambda: torch.randint_like(torch.ones(3), 2, 5), (3,), torch.float32),
    "bernoulli": (lambda: torch.bernoulli(torch.full((4,), 0.5)), (4,), torch.float32),
    "bernoulli_": (lambda: torch.empty(4).bernoulli_(0.5), (4,), torch.float32),
    "bernoulli_ tensor": (lambda: torch.empty(4).bernoulli_(torch.full((4,), 0.5)), (4,), torch.float32),
    "normal": (lambda: torch.normal(torch.zeros(4), 1.0), (4,), torch.float32),
    "normal size": (lambda: torch.normal(0.0, 1.0, (4,)), (4,), torch.float32),
    "uniform_": (lambda: torch.empty(4).uniform_(2, 5), (4,), torch.float32),
    "normal_": (lambda: torch.empty(4).normal_(std=2.0), (4,), torch.float32),
    "exponential_": (lambda: torch.empty(4).exponential_(), (4,), torch.float32),
    "gumbel": (lambda: F.gumbel_softmax(torch.zeros(2, 3)), (2, 3), torch.float32),
    "geometric_": (lambda: torch.empty(4).geometric_(0.5), (4,), torch.float32),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_functions_draw_from_the_stream(name: str) -> None:
    """Shape and type are torch's own; the same place gives the same numbers; torch's generator does not move."""
    function, shape, dtype = FUNCTIONS[name]
    before = torch.get_rng_state()
    found = []
    for step in (0, 0, 1):
        with drawing_from(Stream(step=step)), Drawing("", None) as drawing:
            found.append(function())
        assert len(drawing.shapes) == 1
    assert (tuple(found[0].shape), found[0].dtype) == (shape, dtype)
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert bool(found[0].isfinite().all())
    if name in ("randint low", "randint named", "uniform_"):
        assert bool(((found[0] >= 2) & (found[0] <= 5)).all())


ATTENTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_written_out_is_attention(name: str) -> None:
    """With next to no dropout it gives what the fused kernel gives, gradients too."""
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2) if name == "grouped" else (4, 4, 4)
    tensors = [torch.randn(2, h, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True) for h in heads]
    settings_ = ATTENTIONS[name]
    expected = F.scaled_dot_product_attention(*tensors, **settings_)  # type: ignore[arg-type]
    with Drawing("", None) as drawing:
        found = F.scaled_dot_product_attention(*tensors, **(settings_ | {"dropout_p": 1e-9}))  # type: ignore[arg-type]
    assert drawing.writes_out_attention
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


def test_a_query_that_may_look_at_nothing_gets_zeros() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    q = torch.ones(1, 1, 2, 4)
    with Drawing("", None):
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.2)
    assert torch.equal(y[0, 0, 1], torch.zeros(4))


def test_more_draws_than_were_captured_are_refused() -> None:
    with (
        Drawing("m.layers.0", [Site(0, 1)]),
        pytest.raises(WorkloadError, match=r"m.layers.0 draws random numbers 2 times, but did 1 times"),
    ):
        F.dropout(F.dropout(torch.ones(3)))


def test_dropout_rate_out_of_bounds() -> None:
    with Drawing("", None), pytest.raises(ValueError, match=r"dropout probability is 1.5"):
        F.dropout(torch.ones(3), 1.5)
