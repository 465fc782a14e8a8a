"""Substitutes: what stands in place of functions of torch, and of attributes of modules, while a task is recorded."""
