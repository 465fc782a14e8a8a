"""Names of operators: `task.component.layers.3` for a block, `task.component.pre` and `.post` for glue."""

from collections import Counter
from collections.abc import Mapping

from spindle.capture.blocks import Block


class Namer:
    """Gives every operator of a workload a name of its own, as short as is unique."""

    def __init__(self, blocks: list[Block]) -> None:
        """`blocks`: all blocks of the workload, their paths beginning with the component."""
        lists = {block.path.rpartition(".")[0] for block in blocks}
        self.label_by_list = {path: _label(path, lists) for path in lists}
        self.used: Counter[str] = Counter()

    def block(self, task: str, called: str, path: str) -> tuple[str, str]:
        """Component and name of a block; `called` tells which call of the component it belongs to."""
        container, _, index = path.rpartition(".")
        component = path.partition(".")[0]
        _, at, count = called.partition("@")
        if not container:  # the whole component
            return component, self._unique(f"{task}.{component}{at}{count}", "")
        base = ".".join(filter(None, (task, f"{component}{at}{count}", self.label_by_list[container])))
        return component, self._unique(base, index)

    def glue(self, task: str, component: str, role: str) -> str:
        """Name of a piece of glue."""
        return self._unique(f"{task}.{component}", role)

    def component(self, called: str, sizes: Mapping[str, int]) -> str:
        """The component that a group of glue counts to: the owner of most of its parameters, else the one that
        was called.
        """
        by_component: Counter[str] = Counter()
        for name, size in sizes.items():
            by_component[name.partition(".")[0]] += size
        if by_component:
            return by_component.most_common(1)[0][0]
        return called.partition("@")[0] or "glue"

    def _unique(self, base: str, last: str) -> str:
        name = f"{base}.{last}" if last else base
        self.used[name] += 1
        return (
            name
            if self.used[name] == 1
            else f"{name}-{self.used[name]}"
            if not last.isdigit()
            else (f"{base}@{self.used[name] - 1}.{last}")
        )


def _label(path: str, lists: set[str]) -> str:
    """The shortest tail of a list's path that no other list of its component has; where there are others it holds the
    parent: "visual.blocks" beside "language_model.layers".
    """
    component, _, inner = path.partition(".")
    parts = inner.split(".")
    rivals = [other for other in lists if other != path and other.partition(".")[0] == component]
    for count in range(min(2, len(parts)) if rivals else 1, len(parts) + 1):
        tail = ".".join(parts[-count:])
        if not any(other == tail or other.endswith(f".{tail}") for other in rivals):
            return tail
    return inner
