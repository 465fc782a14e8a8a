"""Pieces of task code: what users write between a model's output and its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from spindle.workload import Batch

FEATURES, IMAGE, WORDS = 5, 2, "words"
"""Numbers of each vector of a batch; the token that an image's features replace; the unit of unpadded tokens."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a piece may use beside the hidden states `h`: the batch, extra modules, and one more call of the towers."""

    batch: Batch
    extras: Any
    again: Callable[[], Tensor]
    kind: str

    @property
    def mask(self) -> Tensor:
        """Which vectors of `h` count; bool, of its shape without the last dimension."""
        mask: Tensor = self.batch["mask"]
        return mask

    @property
    def vector(self) -> Tensor:
        """A trained vector as wide as `h`."""
        found: Tensor = self.extras.vector
        return found

    def gate(self, h: Tensor) -> Tensor:
        """A linear layer from vectors of `h` to such."""
        found: Tensor = self.extras.gate(h)
        return found

    def norm(self, rows: Tensor) -> Tensor:
        """Batch norm of rows."""
        found: Tensor = self.extras.norm(rows)
        return found

    def head(self, h: Tensor) -> Tensor:
        """Logits of tokens."""
        found: Tensor = self.extras.head(h)
        return found

    def answer(self, h: Tensor) -> Tensor:
        """Logits of three classes."""
        found: Tensor = self.extras.answer(h)
        return found

    @property
    def lengths(self) -> list[int]:
        """Tokens of each padded text."""
        found: list[int] = self.batch["lengths"].tolist()
        return found


def by_sample(values: Tensor, h: Tensor) -> Tensor:
    """A number for each sample, of as many dimensions as `h`."""
    return values.view(-1, *(1,) * (h.ndim - 1)).to(h.dtype)


Piece = Callable[[Tensor, Given], Tensor]

# -- any shape --------------------------------------------------------------------------------------------------------


def gated(h: Tensor, given: Given) -> Tensor:
    return h + torch.tanh(given.gate(h))


def flattened(h: Tensor, given: Given) -> Tensor:
    return given.gate(h.reshape(-1, h.shape[-1])).view(h.shape) * 0.7


def masked_out(h: Tensor, given: Given) -> Tensor:
    return h * given.mask[..., None]


def filled(h: Tensor, given: Given) -> Tensor:
    return h.masked_fill(~given.mask[..., None], 0.25)


def where(h: Tensor, given: Given) -> Tensor:
    return torch.where(given.mask[..., None], h, given.vector)


def written_mask(h: Tensor, given: Given) -> Tensor:
    h = h * 1.5
    h[given.mask] += 0.25
    return h


def written_rows(h: Tensor, given: Given) -> Tensor:
    h = h.clone()
    h[given.mask] = given.gate(h[given.mask])
    return h


def written_view(h: Tensor, given: Given) -> Tensor:
    h = h.clone()
    h[..., :3].mul_(given.vector[:3])
    return h


def selected(h: Tensor, given: Given) -> Tensor:
    out = torch.zeros_like(h)
    out[given.mask] = torch.relu(h[given.mask])
    return out + h


def scattered(h: Tensor, given: Given) -> Tensor:
    return h.masked_scatter(given.mask[..., None].expand_as(h), given.gate(h[given.mask]))


def index_put(h: Tensor, given: Given) -> Tensor:
    return h.index_put((given.mask,), given.vector, accumulate=True)


def dropped(h: Tensor, given: Given) -> Tensor:
    return F.dropout(h, 0.3)


def noisy(h: Tensor, given: Given) -> Tensor:
    return h + 0.1 * torch.randn_like(h)


def no_gradient(h: Tensor, given: Given) -> Tensor:
    with torch.no_grad():
        size = 1 + given.gate(h).norm(dim=-1, keepdim=True)
    found: Tensor = h / size
    return found


def detached(h: Tensor, given: Given) -> Tensor:
    return h + h.detach().mean(-1, keepdim=True)


def checkpointed(h: Tensor, given: Given) -> Tensor:
    found: Tensor = checkpoint(given.gate, h, use_reentrant=False)
    return found


def normed(h: Tensor, given: Given) -> Tensor:
    return given.norm(h.flatten(0, -2)).reshape(h.shape)


def factored(h: Tensor, given: Given) -> Tensor:
    found: Tensor = h * given.batch["factor"] + given.batch["settings"]["scale"]
    return found


def twice(h: Tensor, given: Given) -> Tensor:
    return h + 0.5 * given.again()


def chunked(h: Tensor, given: Given) -> Tensor:
    first, second = h.chunk(2, -1)
    return torch.cat([second, first * torch.sigmoid(second)], -1)


def einsum(h: Tensor, given: Given) -> Tensor:
    return torch.einsum("...i,oi->...o", h, given.extras.gate.weight)


def masked_mean(h: Tensor, given: Given) -> Tensor:
    mask = given.mask[..., None].to(h.dtype)
    found: Tensor = h - (h * mask).sum() / mask.sum().clamp(min=1)
    return found


def random_mask(h: Tensor, given: Given) -> Tensor:
    return torch.where((torch.rand(given.mask.shape) < 0.3)[..., None], given.vector, h)


# -- a row for each sample --------------------------------------------------------------------------------------------


def rolled(h: Tensor, given: Given) -> Tensor:
    return h + 0.5 * h.roll(1, 0)


def centered(h: Tensor, given: Given) -> Tensor:
    return h - h.mean(0, keepdim=True)


def ordered(h: Tensor, given: Given) -> Tensor:
    order = given.batch["score"].argsort()
    h = h[order]
    h = h * by_sample(torch.linspace(1, 2, len(h)), h)
    return h.index_select(0, order.argsort())


def grouped(h: Tensor, given: Given) -> Tensor:
    groups, owner = given.batch["group"].unique(return_inverse=True)
    sums = h.new_zeros(len(groups), *h.shape[1:]).index_add(0, owner, h)
    return h + sums[owner] / len(groups)


def uniform(h: Tensor, given: Given) -> Tensor:
    return h * by_sample(torch.rand(len(h), dtype=torch.float64), h)


def beta(h: Tensor, given: Given) -> Tensor:
    share = torch.distributions.Beta(2.0, 3.0).sample((len(h),))
    return h * by_sample(share, h)


def mixed_up(h: Tensor, given: Given) -> Tensor:
    order = torch.randperm(len(h))
    return 0.7 * h + 0.3 * h[order]


def named(h: Tensor, given: Given) -> Tensor:
    return h * by_sample(torch.tensor([float(len(name)) for name in given.batch["names"]]), h) / 2


def named_loop(h: Tensor, given: Given) -> Tensor:
    return torch.stack([x * len(name) for x, name in zip(h, given.batch["names"], strict=True)]) / 2


def repeated(h: Tensor, given: Given) -> Tensor:
    twofold = torch.tanh(h.repeat_interleave(2, 0))
    return twofold.view(len(h), 2, *h.shape[1:]).sum(1)


def some_samples(h: Tensor, given: Given) -> Tensor:
    chosen = (given.batch["y"] == 1).nonzero()[:, 0]
    return h.index_add(0, chosen, torch.tanh(h[chosen]))


def by_class(h: Tensor, given: Given) -> Tensor:
    return h * by_sample(given.vector[given.batch["y"]], h)


def sampled_class(h: Tensor, given: Given) -> Tensor:
    shares = torch.stack([given.batch["weight"], given.batch["score"] + 0.1], 1)
    return h * by_sample(1.0 + torch.multinomial(shares, 1)[:, 0], h)


# -- padded texts -----------------------------------------------------------------------------------------------------


def over_length(h: Tensor, given: Given) -> Tensor:
    return h / h.shape[1] + h.mean(1, keepdim=True)


def last_position(h: Tensor, given: Given) -> Tensor:
    return h + h[:, h.shape[1] - 1 :]


def last_token(h: Tensor, given: Given) -> Tensor:
    return h + h[torch.arange(len(h)), given.batch["lengths"] - 1][:, None]


def gathered(h: Tensor, given: Given) -> Tensor:
    index = (given.batch["lengths"] - 1)[:, None, None].expand(-1, 1, h.shape[-1])
    return h - 0.5 * h.gather(1, index)


def written_first(h: Tensor, given: Given) -> Tensor:
    h = h.clone()
    h[:, 0] = given.vector
    return h


def written_last(h: Tensor, given: Given) -> Tensor:
    h = h * 2.0
    for number, length in enumerate(given.lengths):
        h[number, length - 1] += given.vector
    return h


def stacked(h: Tensor, given: Given) -> Tensor:
    return h + torch.stack([h[i, :n].mean(0) for i, n in enumerate(given.lengths)])[:, None]


def unpadded(h: Tensor, given: Given) -> Tensor:
    flat = given.gate(torch.cat([h[i, :n] for i, n in enumerate(given.lengths)]))
    texts = torch.split(flat, given.lengths)
    return torch.stack([F.pad(text, (0, 0, 0, h.shape[1] - len(text))) for text in texts])


def padded_anew(h: Tensor, given: Given) -> Tensor:
    texts = pad_sequence([h[i, :n] for i, n in enumerate(given.lengths)], batch_first=True)
    return h + texts.mean(1, keepdim=True)


def attended(h: Tensor, given: Given) -> Tensor:
    scores = (h @ given.vector).masked_fill(~given.mask, float("-inf")).softmax(1)
    return h + (scores[..., None] * h).sum(1, keepdim=True)


def peaked(h: Tensor, given: Given) -> Tensor:
    return h + h[torch.arange(len(h)), (h @ given.vector).argmax(1)][:, None]


def prefixed(h: Tensor, given: Given) -> Tensor:
    prefix = given.vector.expand(len(h), 1, -1)
    return torch.cat([prefix, h[:, :-1]], 1).cumsum(1)


def sequence_first(h: Tensor, given: Given) -> Tensor:
    h = h.transpose(0, 1).contiguous()
    h = h * torch.arange(len(h))[:, None, None]
    return given.gate(h).transpose(0, 1)


def chosen_tokens(h: Tensor, given: Given) -> Tensor:
    picked = torch.multinomial(given.mask.double(), 2, replacement=True)
    return h + h.gather(1, picked[..., None].expand(-1, -1, h.shape[-1])).sum(1, keepdim=True)


def normed_tokens(h: Tensor, given: Given) -> Tensor:
    h = h.clone()
    h[given.mask] = given.norm(h[given.mask])
    return h


# -- packed texts -----------------------------------------------------------------------------------------------------


def of_text(given: Given) -> Tensor:
    """The text of each token of packed ones, from 0 up."""
    found: Tensor = (given.batch["places"][0] == 0).cumsum(0) - 1
    return found


def pooled_texts(h: Tensor, given: Given) -> Tensor:
    owner = of_text(given)
    sums = h.new_zeros(int(owner[-1]) + 1, h.shape[-1]).index_add(0, owner, h[0])
    return h + (sums / owner.bincount()[:, None])[owner][None]


def split_texts(h: Tensor, given: Given) -> Tensor:
    return torch.cat([text - text.mean(0) for text in torch.split(h[0], of_text(given).bincount().tolist())])[None]


# -- by name ----------------------------------------------------------------------------------------------------------

_ANY: tuple[Piece, ...] = (
    gated,
    flattened,
    masked_out,
    filled,
    where,
    written_mask,
    written_rows,
    written_view,
    selected,
    scattered,
)
_ANY += (index_put, dropped, noisy, no_gradient, detached, checkpointed, normed, factored, twice, chunked, einsum)
_ANY += (masked_mean, random_mask)
_SAMPLES: tuple[Piece, ...] = (
    rolled,
    centered,
    ordered,
    grouped,
    uniform,
    beta,
    mixed_up,
    named,
    named_loop,
    repeated,
    some_samples,
)
_SAMPLES += (by_class, sampled_class)
_TEXTS: tuple[Piece, ...] = (
    over_length,
    last_position,
    last_token,
    gathered,
    written_first,
    written_last,
    stacked,
    unpadded,
    padded_anew,
)
_TEXTS += (attended, peaked, prefixed, sequence_first, chosen_tokens, normed_tokens)
_PACKED = (pooled_texts, split_texts)


def names_of(functions: tuple[Piece, ...]) -> list[str]:
    """Names of pieces, as cases hold them."""
    return [function.__name__ for function in functions]


PIECES: dict[str, Piece] = {f.__name__: f for f in (*_ANY, *_SAMPLES, *_TEXTS, *_PACKED)}
VECTOR_PIECES, PACKED_PIECES = names_of(_ANY + _SAMPLES), names_of(_ANY + _PACKED)
TEXT_PIECES = names_of(_ANY + _SAMPLES + _TEXTS)
