"""Losses of random tasks: sums and means over samples, tokens or pairs, as users write them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ragged.ragged_pieces import Given, Piece, names_of, of_text
from tests.tiny_workloads import contrastive


def squares(h: Tensor, given: Given) -> Tensor:
    return h.square().mean()


def summed(h: Tensor, given: Given) -> Tensor:
    return 0.01 * torch.tanh(h).square().sum()


def masked(h: Tensor, given: Given) -> Tensor:
    mask = given.mask.to(h.dtype)
    return (h.square().mean(-1) * mask).sum() / mask.sum().clamp(min=1)


def over_batch(h: Tensor, given: Given) -> Tensor:
    return torch.tanh(h).square().flatten(1).sum(1).sum() / h.shape[0] / h.shape[-2]


def tokens(h: Tensor, given: Given) -> Tensor:
    logits = given.head(h)
    return F.cross_entropy(logits.flatten(0, 1), given.batch["labels"].flatten(), ignore_index=-100)


def shifted(h: Tensor, given: Given) -> Tensor:
    labels = F.pad(given.batch["labels"], (0, 1), value=-100)[:, 1:]
    each = F.cross_entropy(given.head(h).transpose(1, 2), labels, reduction="none")
    return each.sum() / (labels != -100).sum().clamp(min=1)


def counted(h: Tensor, given: Given) -> Tensor:
    keep = given.batch["labels"] != -100
    return F.cross_entropy(given.head(h[keep]), given.batch["labels"][keep])


def smoothed(h: Tensor, given: Given) -> Tensor:
    weight = torch.linspace(0.5, 1.5, 23, dtype=torch.float64)
    logits = given.head(h).flatten(0, 1)
    return F.cross_entropy(logits, given.batch["labels"].flatten(), weight=weight, label_smoothing=0.1)


def answers(h: Tensor, given: Given) -> Tensor:
    return F.cross_entropy(given.answer(_pooled(h)), given.batch["y"])


def last_answers(h: Tensor, given: Given) -> Tensor:
    last = h[torch.arange(len(h)), given.batch["lengths"] - 1]
    return F.cross_entropy(given.answer(last), given.batch["y"])


def weighted(h: Tensor, given: Given) -> Tensor:
    each = F.mse_loss(_pooled(h), given.batch["target"], reduction="none").mean(-1)
    found: Tensor = (each * given.batch["weight"]).sum() / given.batch["weight"].sum()
    return found


def contrasted(h: Tensor, given: Given) -> Tensor:
    return contrastive(_pooled(h), given.gate(given.batch["target"]))


def looped(h: Tensor, given: Given) -> Tensor:
    total = h.new_zeros(())
    for x, target in zip(_pooled(h), given.batch["target"], strict=True):
        total = total + F.mse_loss(x, target)
    return total / len(h)


def looped_texts(h: Tensor, given: Given) -> Tensor:
    labels, logits = given.batch["labels"], given.head(h)
    each = [F.cross_entropy(logits[i, :n], labels[i, :n], reduction="sum") for i, n in enumerate(given.lengths)]
    found: Tensor = torch.stack(each).sum() / (labels != -100).sum()
    return found


def hardest(h: Tensor, given: Given) -> Tensor:
    each = F.cross_entropy(given.answer(_pooled(h)), given.batch["y"], reduction="none")
    return each.topk(max(1, len(each) // 2)).values.mean()


def text_answers(h: Tensor, given: Given) -> Tensor:
    owner = of_text(given)
    sums = h.new_zeros(len(given.batch["y"]), h.shape[-1]).index_add(0, owner, h[0])
    return F.cross_entropy(given.answer(sums), given.batch["y"])


def text_ends(h: Tensor, given: Given) -> Tensor:
    ends = of_text(given).bincount().cumsum(0) - 1
    return F.mse_loss(h[0, ends], given.batch["target"])


def _pooled(h: Tensor) -> Tensor:
    return h.mean(1) if h.ndim == 3 else h


# -- by name ----------------------------------------------------------------------------------------------------------

_ALL_LOSSES = (squares, summed, masked, over_batch)
_SAMPLE_LOSSES = (answers, weighted, contrasted, looped, hardest)
_TOKEN_LOSSES = (tokens, shifted, counted, smoothed)
_TEXT_LOSSES = (last_answers, looped_texts)
_PACKED_ANSWERS = (text_answers, text_ends)


_EVERY = (*_ALL_LOSSES, *_SAMPLE_LOSSES, *_TOKEN_LOSSES, *_TEXT_LOSSES, *_PACKED_ANSWERS)
LOSSES: dict[str, Piece] = {f.__name__: f for f in _EVERY}
VECTOR_LOSSES = names_of(_ALL_LOSSES + _SAMPLE_LOSSES)
PACKED_LOSSES = names_of(_ALL_LOSSES + _TOKEN_LOSSES + _PACKED_ANSWERS)
TEXT_LOSSES = names_of(_ALL_LOSSES + _SAMPLE_LOSSES + _TOKEN_LOSSES + _TEXT_LOSSES)
HEADS = frozenset(names_of((*_TOKEN_LOSSES, *_TEXT_LOSSES, answers, contrasted, hardest, text_answers)))
"""Losses that train a module of their own, so that the towers before them may be frozen."""
