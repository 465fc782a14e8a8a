"""Planner: a MetaGraph with costs and a cluster in, a checked Plan out. No torch, no ray."""

if __name__ != "spindle.planner":
    raise ImportError(
        f"this package is named spindle.planner, not {__name__!r}; write `import spindle.planner` "
        "(the folder at the top of the repository is reached through the link spindle/planner)"
    )
