"""Runtime: a Plan and the captured operators in, a trained model and a Trace out. No solver."""

if __name__ != "spindle.runtime":
    raise ImportError(
        f"this package is named spindle.runtime, not {__name__!r}; write `import spindle.runtime` "
        "(the folder at the top of the repository is reached through the link spindle/runtime)"
    )
