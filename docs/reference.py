"""The reference pages: docs/cli.md and docs/api.md, whose text below a mark is rendered from the code.

    python docs/reference.py

writes both anew after a change of a command or a docstring; a test compares.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WIDTH = 100
MARK = "<!-- rendered from the code by docs/reference.py -->"


def main() -> None:
    """Write the pages anew."""
    for name, render in PAGES.items():
        page = Path(__file__).with_name(name)
        page.write_text(rendered(page.read_text(encoding="utf-8"), render), encoding="utf-8")


def rendered(page: str, render: Callable[[], str]) -> str:
    """The page with the text below its mark made anew."""
    above, mark, _ = page.partition(MARK)
    assert mark, f"the page has no line {MARK}; put it where the rendered text begins"
    return f"{above}{mark}\n\n{render()}\n"


def commands() -> str:
    """Help of every command, as a terminal shows it."""
    from click.testing import CliRunner

    from spindle.cli import cli

    def shown(*words: str) -> str:
        text = CliRunner().invoke(cli, [*words, "--help"], prog_name="spindle", terminal_width=WIDTH).output
        return f"```text\n{text.rstrip()}\n```"

    return "\n\n".join([shown(), *(f"## spindle {name}\n\n{shown(name)}" for name in cli.commands)])


def api() -> str:
    """Signature and docstring of every public name, and of the public methods of its classes."""
    import spindle

    parts = []
    for name in spindle.__all__:
        value = getattr(spindle, name)
        if name == "__version__":
            continue
        parts.append(f"## spindle.{name}\n\n{_entry(name, value)}")
        for method, inner in sorted(vars(value).items()) if inspect.isclass(value) else ():
            what = inner.fget if isinstance(inner, property) else inner
            if not method.startswith("_") and inspect.isfunction(what) and what.__doc__:
                shown = _entry(method, what, is_property=isinstance(inner, property))
                parts.append(f"### {name}.{method}\n\n{shown}")
    return "\n\n".join(parts)


def _entry(name: str, value: Any, *, is_property: bool = False) -> str:
    doc = inspect.getdoc(value) or ""
    if inspect.isclass(value) and value.__init__.__doc__ and "__init__" in vars(value):
        initial = inspect.getdoc(value.__init__) or ""
        doc = doc if initial.startswith("Initialize self") else f"{doc}\n\n{initial}"
    if is_property:
        return f"```text\n{name}\n```\n\n{_paragraphs(doc)}"
    return f"```text\n{_signature(name, value)}\n```\n\n{_paragraphs(doc)}"


def _signature(name: str, value: Any) -> str:
    """How it is called, on one line where that fits."""
    try:
        given = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = list(given.parameters.values())
    shown = [_parameter(each) for each in parameters]
    starred = next((i for i, each in enumerate(parameters) if each.kind is each.KEYWORD_ONLY), None)
    if starred is not None and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        shown.insert(starred, "*")
    result = "" if given.return_annotation in (given.empty, None) else f" -> {_annotation(given.return_annotation)}"
    one_line = f"{name}({', '.join(shown)}){result}"
    if len(one_line) <= WIDTH:
        return one_line
    return "\n".join([f"{name}(", *(f"    {each}," for each in shown), f"){result}"])


def _parameter(given: inspect.Parameter) -> str:
    stars = {given.VAR_POSITIONAL: "*", given.VAR_KEYWORD: "**"}.get(given.kind, "")
    kind = "" if given.annotation is given.empty else f": {_annotation(given.annotation)}"
    if given.default is given.empty:
        return f"{stars}{given.name}{kind}"
    default = given.default.__name__ if inspect.isroutine(given.default) else repr(given.default)
    return f"{stars}{given.name}{kind}{' = ' if kind else '='}{default}"


def _annotation(kind: Any) -> str:
    """A type without the modules that its names are from."""
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def _paragraphs(doc: str) -> str:
    """A docstring as Markdown: aligned tables of fields stay as they are."""
    parts = doc.split("\n\n")
    return "\n\n".join(
        f"```text\n{p}\n```" if re.search(r"^\S+   +\S|^    |^>>>", p, re.MULTILINE) else p for p in parts
    )


PAGES: Mapping[str, Callable[[], str]] = {"cli.md": commands, "api.md": api}

if __name__ == "__main__":
    main()
