"""The site's own steps: the CLI and API pages are rendered from the code, and the navigation from the pages there are.

- `[[commands]]` in a page becomes the help of every command, `[[api]]` every public name with signature and docstring.
- A page that is not in SECTIONS comes last, under "More", so that a new one shows without an edit here.
"""

import inspect
import re
from pathlib import Path
from typing import Any

SECTIONS = {
    "Start": ("index", "quickstart", "concepts", "wrapping", "packed", "models"),
    "Use": (
        "reading-a-plan",
        "timeline",
        "tuning",
        "training",
        "large_models",
        "metrics",
        "cluster",
        "reliability",
        "elastic",
        "interop",
    ),
    "Examples": ("gallery/index",),
    "Reference": ("cli", "api", "faq"),
    "How it works": ("capture", "planner", "cost-model", "design", "benchmarks"),
}
WIDTH = 100


def on_config(config: Any) -> Any:
    """Make the navigation of the pages that there are."""
    docs = Path(config["docs_dir"])
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    named = {title: [name for name in names if name in pages] for title, names in SECTIONS.items()}
    rest = pages - {name for names in named.values() for name in names}
    named["Examples"] += sorted(name for name in rest if name.startswith("gallery/"))
    named["Decisions"] = sorted(name for name in rest if name.startswith("decisions/"))
    named["More"] = sorted(rest - {*named["Decisions"], *named["Examples"]})
    config["nav"] = [{title: [f"{name}.md" for name in names]} for title, names in named.items() if names]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is rendered from the code, and drop the marks that only the test of the pages reads."""
    for mark, render in (("[[commands]]", commands), ("[[api]]", api)):
        if mark in markdown:
            markdown = markdown.replace(mark, render())
    return re.sub(r"<!-- (?:setup|not run|file).*?-->\n?", "", markdown, flags=re.DOTALL)


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
    try:
        given = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    one_line = f"{name}{given}".replace("'", "")
    if len(one_line) <= WIDTH:
        return one_line
    lines = [f"    {parameter}," for parameter in given.parameters.values()]
    starred = next((i for i, p in enumerate(given.parameters.values()) if p.kind is p.KEYWORD_ONLY), None)
    if starred is not None and not any(p.kind is p.VAR_POSITIONAL for p in given.parameters.values()):
        lines.insert(starred, "    *,")
    result = "" if given.return_annotation is given.empty else f" -> {given.return_annotation}"
    return "\n".join([f"{name}(", *lines, f"){result}"]).replace("'", "")


def _paragraphs(doc: str) -> str:
    """A docstring as Markdown: aligned tables of fields stay as they are."""
    parts = doc.split("\n\n")
    return "\n\n".join(f"```text\n{p}\n```" if re.search(r"^\S+   +\S|^    ", p, re.MULTILINE) else p for p in parts)
