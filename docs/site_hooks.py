"""The site's own steps: the navigation is made of the pages that there are.

A page that is not in SECTIONS comes last, under "More", so that a new one shows without an edit here.
"""

import re
from pathlib import Path
from typing import Any

SECTIONS = {
    "Start": ("index", "quickstart", "concepts", "wrapping", "packed", "coming_from", "from_trainer", "models"),
    "Use": (
        "reading-a-plan",
        "timeline",
        "tuning",
        "training",
        "large_models",
        "metrics",
        "cluster",
        "ray",
        "reliability",
        "elastic",
        "interop",
    ),
    "Examples": ("gallery/index",),
    "Reference": ("cli", "api", "faq"),
    "How it works": ("capture", "runtime", "planner", "cost-model", "design", "benchmarks"),
}


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
    """Drop the marks that only tests read."""
    return re.sub(r"<!-- (?:setup|not run|file|rendered).*?-->\n?", "", markdown, flags=re.DOTALL)
