"""Faults: what finds a rank that hangs, fails, is slow or differs, and what goes on after it."""
