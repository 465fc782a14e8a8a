"""The picture of a graph: nothing overlaps or leaves the page, and letters say what colors say."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.errors import GraphError
from spindle.pictures import graph_mermaid, graph_of, graph_svg
from spindle.pictures.canvas import cut, folded, width_of
from spindle.pictures.graph_svg import TALLEST
from spindle.values.metagraph import Flow, MetaGraph, MetaOp
from spindle.verbs.source import costed_source, load_source
from tests.pictures.picture_marks import boxes, page, texts, words
from tests.planner.planner_graphs import cluster, graph, metaop
from tests.printed.samples import SPEC

NAMES = st.sampled_from(["vision", "llm.embed", "a" * 60, "w" * 40, "<b>&", "\u6df1\u5c42\u6a21\u578b", "x y"])


@st.composite
def metagraphs(draw: st.DrawFn) -> MetaGraph:
    """Up to 60 MetaOps of several tasks, whose flows go from earlier to later ones, across tasks too."""
    number = draw(st.one_of(st.integers(1, 8), st.just(60)))
    metaops = [
        MetaOp(
            name=f"{(task := draw(st.sampled_from(('a', 'b', 'c' * 50))))}.{draw(NAMES)}{i}",
            task=task,
            component=draw(NAMES),
            layers=draw(st.integers(1, 10_000)),
            layer_time_s=((draw(st.sampled_from((1, 4))), draw(st.floats(1e-9, 1e4))),),
            output_bytes=draw(st.sampled_from((0.0, 5.0, 3e12))),
            parameters=draw(st.sampled_from(("", "p", "q"))),
        )
        for i in range(number)
    ]
    pairs = draw(st.sets(st.tuples(st.integers(0, number - 1), st.integers(0, number - 1)), max_size=90))
    flows = sorted((a, b) for a, b in pairs if a < b)
    return MetaGraph(tuple(metaops), tuple(Flow(metaops[a].name, metaops[b].name) for a, b in flows))


@settings(max_examples=25, deadline=None)
@given(metagraphs())
def test_nothing_overlaps(metagraph: MetaGraph) -> None:
    """Boxes lie apart; a text lies in one box or in none, and no two texts meet; all is on the page."""
    svg = graph_svg(graph_of(metagraph), title="t" * 200, notes=["a note of some words " * 12])
    whole, found, written = page(svg), boxes(svg), texts(svg)
    assert len(found) == len(metagraph)
    assert [box for box in found if not whole.holds(box)] == []
    assert [pair for pair in combinations(found, 2) if pair[0].meets(pair[1])] == []
    assert [text for text, area in written if not whole.holds(area)] == []
    assert [t for t, area in written for box in found if area.meets(box) and not box.holds(area)] == []
    assert [(a, b) for (a, one), (b, two) in combinations(written, 2) if one.meets(two)] == []


def test_an_edge_over_levels_crosses_no_box() -> None:
    """c waits for a, past b: the edge runs level beside b."""
    metagraph = graph(metaop("t.a"), metaop("t.b"), metaop("t.c"), flows="t.a>t.b t.b>t.c t.a>t.c")
    svg = graph_svg(graph_of(metagraph), title="t")
    middle = next(box for box in boxes(svg) if box.left == sorted(b.left for b in boxes(svg))[1])
    long = next(path for path in re.findall(r'd="(M[^"]*)"', svg) if path.count("C") == 2)
    level = float(re.findall(r" ([\d.]+)H", long)[0])
    assert not middle.top <= level <= middle.bottom


def test_what_a_box_says() -> None:
    """Layers, time, share; who shares its parameters; what runs on one device; and tensors."""
    metagraph = graph(
        metaop("a.vision", 3, parameters="v", output_bytes=2.0**20),
        metaop("b.vision", 1, parameters="v"),
        metaop("a.loss", 1, {1: 8.0}),
        flows="a.vision>a.loss",
    )
    shown = words(graph_svg(graph_of(metagraph), title="two tasks", notes=["on paper"]))
    assert shown[:2] == ["two tasks", "on paper"]
    assert {"level 1", "level 2", "a", "b", "vision", "3 layers", "24 s, 60.0 %", "also in b", "also in a"} <= set(
        shown
    )
    assert {"1 MiB", "loss", "one device only", "parameters are shared with these tasks"} <= set(shown)
    assert "has a time for one device only" in shown


def test_marks_stand_in_the_legend_only_where_they_are_drawn() -> None:
    shown = " ".join(words(graph_svg(graph_of(graph(metaop("a.vision"))), title="t")))
    assert "shared" not in shown
    assert "one device only" not in shown
    assert "tensor" not in shown


def test_boxes_are_as_high_as_their_time() -> None:
    """Three to one, where both are higher than their text; times on several devices count for each of these."""
    found = boxes(graph_svg(graph_of(graph(metaop("t.a", 3, {2: 4.0}), metaop("t.b", 1, {1: 12.0}))), title="t"))
    heights = sorted(box.bottom - box.top for box in found)
    assert heights == [pytest.approx(TALLEST / 2, abs=0.2), pytest.approx(TALLEST, abs=0.2)]


def test_what_mixes_samples(tmp_path: Path) -> None:
    """The contrastive loss of a spec runs on one device; its batch is known."""
    file = tmp_path / "small.yaml"
    file.write_text(SPEC)
    found = graph_of(costed_source(load_source(str(file)), cluster(1, 4)))
    assert [node.name for node in found.nodes if node.one_device] == ["match.loss"]
    assert {node.batch for node in found.nodes} == {8}
    assert "cannot be sharded over the batch" in words(graph_svg(found, title="small"))
    assert max(node.level for node in found.nodes) == found.levels - 1


def test_a_title_that_xml_cannot_hold() -> None:
    """Names of files may have control characters, and bytes that are no text."""
    svg = graph_svg(graph_of(graph(metaop("t.a"))), title="a\x1b\udcff<.yaml")
    assert words(svg)[0] == "a\\x1b?<.yaml"


def test_a_graph_without_times() -> None:
    with pytest.raises(GraphError, match=r"MetaOp 't.a' has no times to draw; fill in its costs"):
        graph_of(MetaGraph((MetaOp(name="t.a", task="t", component="a", layers=1),)))


MERMAID = """\
flowchart LR
  subgraph t0["a"]
    direction LR
    m0("a.vision<br/>3 layers<br/>24 s<br/>parameters also in b")
    m2[["a.loss<br/>1 layer<br/>8 s<br/>one device only"]]
  end
  subgraph t1["b"]
    direction LR
    m1("b.vision#quot;<br/>1 layer<br/>4 s on 2 devices<br/>parameters also in a")
  end
  m0 -->|1 MiB| m2
"""


def test_mermaid() -> None:
    """In full; a quote in a name ends no text."""
    metagraph = graph(
        metaop("a.vision", 3, parameters="v", output_bytes=2.0**20),
        metaop('b.vision"', 1, {2: 4.0}, parameters="v"),
        metaop("a.loss", 1, {1: 8.0}),
        flows="a.vision>a.loss",
    )
    assert graph_mermaid(graph_of(metagraph)) == MERMAID.replace("#quot;", "#34;")


@given(st.text(max_size=60), st.floats(20, 200))
def test_a_cut_text_fits(text: str, width: float) -> None:
    assert width_of(cut(text, width, 11), 11) <= width
    assert all(width_of(line, 11) <= width for line in folded(text, width, 11))
