"""Flags beside messages of gradients: whether something led back to what a message carries.

A layer may make no use of an input in some steps. Then autograd has no gradient for it, and what computed it has none
either, so that an optimizer lets it rest. But a message that peers wait for must come: it carries zeros then, and
behind all messages from one rank to another follows a flag for each. Flags stay in main memory, so no device is waited
for.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from spindle.runtime.comms.transport import Post
from spindle.runtime.programs.program import Message


def flags_to(found: Sequence[tuple[int, bool]]) -> list[Post]:
    """The flags of the messages to each peer; `found` has the peer of each message, and whether something led back."""
    by_peer: dict[int, list[bool]] = {}
    for peer, is_led in found:
        by_peer.setdefault(peer, []).append(is_led)
    return [(peer, torch.tensor(flags, dtype=torch.uint8)) for peer, flags in by_peer.items()]


def flags_from(messages: Sequence[Message]) -> list[Post]:
    """Room for the flags of the messages that each peer sends."""
    counts = Counter(message.source for message in messages)
    return [(peer, torch.empty(count, dtype=torch.uint8)) for peer, count in counts.items()]


def with_gradients(pieces: Sequence[tuple[Message, Tensor]], flags: Sequence[Post]) -> list[tuple[Message, Tensor]]:
    """The messages that carry a gradient, once all have arrived."""
    by_peer = {peer: iter(values.tolist()) for peer, values in flags}
    return [(message, value) for message, value in pieces if next(by_peer[message.source])]
