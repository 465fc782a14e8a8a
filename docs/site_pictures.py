"""The site's pictures, drawn by Spindle itself while the site is built, so that none can be stale.

- `pictures/NAME.svg` in a page is the picture of that name here. Plans stop their search after LIMIT_S.
- On a narrow screen a picture keeps its size and is moved sideways; a click opens it alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICK = "docs/examples/quick/model.py:workload"
COTRAIN = "benchmarks/workloads/vla_cotrain.yaml"
LIMIT_S = 3.0
STEPS = 20


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the files of the site."""
    from mkdocs.structure.files import File

    for name, svg in (*of_quickstart(), *of_cotraining()):
        files.append(File.generated(config, f"pictures/{name}.svg", content=svg))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Let pictures be moved and opened: the style sheet knows them by their class."""
    return re.sub(
        r'<p>(<img [^>]*src="([^"]+\.svg)"[^>]*>)</p>', r'<p class="picture"><a href="\2">\1</a></p>', html, flags=re.S
    )


def of_quickstart() -> Iterator[tuple[str, str]]:
    """The graph of the quickstart's model, and a run of it beside its plan."""
    import torch

    from spindle.files.clusterfile import parse_cluster
    from spindle.pictures import graph_of, graph_svg
    from spindle.planner.simulate import simulate
    from spindle.timeline import render_svg
    from spindle.verbs.planning import plan_source
    from spindle.verbs.source import costed_source, load_workload, source_of
    from spindle.verbs.training import train

    cluster = parse_cluster("1x2:cpu")
    workload, _ = load_workload(str(ROOT / QUICK))
    source = source_of(workload)
    graph = graph_of(costed_source(source, cluster))
    yield "quick-graph", graph_svg(graph, title="model.py:workload", notes=["On two CPU devices; times are predicted."])
    plan, _ = plan_source(source, cluster, time_limit_s=LIMIT_S)
    run = train(workload, plan, optimizer=torch.optim.AdamW, steps=STEPS, launcher="threads")
    title = "model.py:workload on two CPU devices"
    yield "quick-run", render_svg(plan, predicted=simulate(plan), measured=run.trace, title=title)


def of_cotraining() -> Iterator[tuple[str, str]]:
    """The curves and the waves of the workload that the page on plans reads; its graph is kept, for the README."""
    from spindle.cost.sources import cost_sources
    from spindle.files.clusterfile import parse_cluster
    from spindle.pictures import curves_svg, panels_of
    from spindle.planner.simulate import simulate
    from spindle.timeline import render_svg
    from spindle.verbs.planning import plan_source
    from spindle.verbs.source import costed_source, load_source

    cluster = parse_cluster("1x8:a100-80g")
    source = load_source(str(ROOT / COTRAIN))
    costed = costed_source(source, cluster)
    panels = panels_of(costed, cost_sources(costed), num_devices=cluster.num_devices)
    notes = ["Seconds of one layer, forward and backward, on up to eight A100; times are predicted."]
    yield "cotrain-curves", curves_svg(panels, num_devices=cluster.num_devices, title="vla_cotrain.yaml", notes=notes)
    plan, _ = plan_source(source, cluster, time_limit_s=LIMIT_S)
    yield "cotrain-waves", render_svg(plan, predicted=simulate(plan), title="vla_cotrain.yaml on eight A100")
