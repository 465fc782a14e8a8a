"""Operators: what was recorded of a task in; operators with names, code, shapes and costs out."""
