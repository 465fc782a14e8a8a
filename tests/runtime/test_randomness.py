"""Randomness: what recompute needs so that dropout falls the same way twice."""

import pytest
import torch

from spindle.runtime.randomness import Randomness

CPU = torch.device("cpu")


def test_the_same_numbers_twice_and_the_present_goes_on() -> None:
    """Inside, what followed the kept state comes again; outside, the stream continues as if nothing had been drawn."""
    torch.manual_seed(1)
    kept = Randomness.now(CPU)
    first, second, third = (torch.rand(3) for _ in range(3))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), first)
    with kept.restored():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), second)
    with kept.restored():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), third)


def test_an_error_inside_leaves_the_present_too() -> None:
    torch.manual_seed(2)
    kept = Randomness.now(CPU)
    torch.rand(1)
    expected = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"), kept.restored():
        raise ValueError("inside")
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_kept_state_does_not_move() -> None:
    """Later draws do not change what was kept."""
    torch.manual_seed(3)
    kept = Randomness.now(CPU)
    before = kept.cpu.clone()
    torch.rand(100)
    with kept.restored():
        torch.rand(100)
    assert torch.equal(kept.cpu, before)
