"""Pictures: of a workload's graph, its scaling curves, plans for several sizes. Values in, SVG, PNG or Mermaid out.

    graph_svg(graph_of(metagraph), title="clip")

A module says what a picture shows (graph, curves), another draws it. Colors, words and PNG are those of
`spindle.timeline`, so that a component has the same color in all pictures.
"""

from spindle.pictures.curves import panels_of
from spindle.pictures.curves_svg import curves_svg
from spindle.pictures.graph import graph_of
from spindle.pictures.graph_svg import graph_svg
from spindle.pictures.mermaid import graph_mermaid
from spindle.pictures.sizes_svg import sizes_svg

__all__ = ["curves_svg", "graph_mermaid", "graph_of", "graph_svg", "panels_of", "sizes_svg"]
