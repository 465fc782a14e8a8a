"""Heuristics: how a simulation of the cluster decides. The beam draws many, since none is best everywhere."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heuristics:
    """How a simulation decides; the beam draws many.

    early       finish waves this share of time before they end
    slack       layers by which a target may be missed
    grow        idle devices go to who saves at least this share of what ideal scaling would
    rule        who chooses first
    late        steps of the curve beyond the LP's largest count that a late MetaOp may take
    two_pass    first all get the LP's smallest count, then what they want
    noise       chance to want a neighboring count instead
    patience    a MetaOp waits rather than run on less than this share of what it wants
    stick       a change of count may cost this share of what it saves
    """

    early: float = 0.0
    slack: float = 0.3
    grow: float = 0.5
    rule: int = 0
    late: int = 1
    two_pass: bool = False
    noise: float = 0.0
    patience: float = 0.0
    stick: float = 0.5


RULES = 6


def draw_heuristics(rng: random.Random) -> Heuristics:
    """A random heuristics; the middle ones more often."""
    return Heuristics(
        early=rng.choice((0.0, 0.0, -0.01, 0.01)),
        slack=rng.choice((0.0, 0.3, 0.5)),
        grow=rng.choice((0.3, 0.5, 1.1)),
        rule=rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5)),
        late=rng.choice((0, 1, 1, 2)),
        two_pass=rng.random() < 0.3,
        noise=0.1 if rng.random() < 0.25 else 0.0,
        patience=rng.choice((0.0, 0.0, 0.3, 0.6)),
        stick=rng.choice((0.1, 0.3, 0.6)),
    )
