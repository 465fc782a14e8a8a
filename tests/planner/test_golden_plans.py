"""Golden plans: the text of whole plans; run with UPDATE_GOLDEN=1 to write them anew, then read the difference."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from spindle.planner.report.render import render, table
from spindle.planner.solve import solve
from tests.planner.planner_graphs import cluster, graph, metaop

GOLDEN = Path(__file__).parent.parent / "golden"


def hyperbola(alpha_s: float, beta_s: float) -> dict[int, float]:
    return {n: round(alpha_s + beta_s / n, 6) for n in (1, 2, 4, 8)}


# the workload of the paper's Fig. 3: an audio-language task and a vision task with two resolutions
FIG_3 = graph(
    metaop("al.audio", 3, hyperbola(0.004, 0.040), output_bytes=0.0004),
    metaop("al.text", 2, hyperbola(0.004, 0.012), output_bytes=0.0004, parameters="text", layer_param_bytes=0.0002),
    metaop("al.lm", 3, hyperbola(0.004, 0.090), output_bytes=0.0004, parameters="lm", layer_param_bytes=0.0004),
    metaop("vl.text", 2, hyperbola(0.004, 0.006), output_bytes=0.0004, parameters="text", layer_param_bytes=0.0002),
    metaop("vl.vision257", 2, hyperbola(0.004, 0.022), output_bytes=0.0004, parameters="vision"),
    metaop("vl.vision197", 2, hyperbola(0.004, 0.016), output_bytes=0.0004, parameters="vision"),
    metaop("vl.lm", 3, hyperbola(0.004, 0.045), output_bytes=0.0004, parameters="lm", layer_param_bytes=0.0004),
    flows="al.audio>al.lm al.text>al.lm vl.text>vl.lm vl.vision257>vl.lm vl.vision197>vl.lm",
)


@pytest.mark.parametrize("method", ["lp", "paper", "sequential", "task_split", "component_split"])
def test_figure_3_on_two_nodes_of_four(method: str) -> None:
    """The paper's example workload, planned in each of the baselines."""
    plan = replace(solve(FIG_3, cluster(2, 4), method=method), planner_s=0.0)
    text = f"{render(plan)}\n\n{table(plan)}\n"
    path = GOLDEN / f"figure3-{method}.plan.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
