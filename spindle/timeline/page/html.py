"""Page: a plan and its views in, one HTML page out that needs nothing else.

- Everything a user named is escaped. The page forbids itself the network, and runs no script but its own.
- Without JavaScript it shows the summary and a static picture; in print too.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

from spindle.timeline.items import View
from spindle.timeline.page.data import Json
from spindle.timeline.page.legend import legend
from spindle.timeline.page.summary import accounts, baselines, memory_table, subtitle, tiles, turns, verdict
from spindle.values.plan import Plan

SCRIPTS = (
    "page_data.js",
    "page_words.js",
    "page_layout.js",
    "page_draw.js",
    "page_axis.js",
    "page_tables.js",
    "page_view.js",
)


def page(plan: Plan, views: Sequence[View], data: dict[str, Json], *, picture: str, title: str) -> str:
    """The HTML text. `picture`: the static SVG; `data`: what the script draws."""
    name = escape(title or "Spindle timeline")
    style, script = _style(), _script()
    memory = bool(data["views"]) and plan.metagraph is not None and any(m.memory_bytes for m in plan.metagraph)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
{subtitle(plan)}
{tiles(plan, views)}
{verdict(plan)}{turns(plan)}
</header>
<main>
<section class="card timeline" aria-label="timeline">
<p id="failure" hidden></p>
<div id="controls"></div>
{_chart(memory=memory, both=len(views) > 1)}
{picture}
{legend(views)}
</section>
<div class="cards">
{_table_card("accounts", "Where the time of a device goes", accounts(views))}
<div class="column">
{_table_card("waves", "Waves that missed their prediction", '<p class="quiet">This table needs JavaScript.</p>')}
{memory_table(plan, views)}{baselines(plan)}
</div>
</div>
</main>
<footer>{_HELP}<span id="left-out"></span></footer>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="timeline-data">{embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""


_HELP = (
    '<span class="screen-only">Wheel: zoom. Drag: pan. Click: pin. Double click: zoom to a slice, or out. '
    "Names in the legend light up what they name.</span> "
)


def _table_card(name: str, title: str, inside: str) -> str:
    return f'<section class="card"><h2>{title}</h2><div id="{name}">{inside}</div></section>'


def _chart(*, memory: bool, both: bool) -> str:
    title = "Memory of a device as the plan expects it: range over all devices, mean in gray"
    title += ", laid over the measured times (highest over the planned ones dashed)" if both else ""
    below = f'<p class="memory-title quiet">{title}</p><canvas id="memory"></canvas>' if memory else ""
    return (
        '<div id="chart" tabindex="0" role="img" aria-label="Timeline: a row for each device; arrow keys pan, plus and '
        'minus zoom"><p id="scales" class="quiet"></p><canvas id="axis"></canvas><div class="stack">'
        f'<canvas id="rows"></canvas><canvas id="overlay"></canvas></div>{below}</div>'
    )


def embedded(data: Json) -> str:
    """JSON that can stand inside a script element: no tag, comment or entity can begin in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _style() -> str:
    return _read("page.css")


@cache
def _script() -> str:
    return '"use strict";(() => {\n' + "\n".join(_read(name) for name in SCRIPTS) + "})();"


def _read(name: str) -> str:
    return files("spindle.timeline.page").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """No network, no frames, no forms; only this style sheet and this script."""
    sources = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    return f"{sources}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
