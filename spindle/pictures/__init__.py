"""Pictures: of a workload's graph, its scaling curves, plans for several sizes. Values in, SVG, PNG or Mermaid out.

    graph_svg(graph_of(metagraph), title="clip")

A module says what a picture shows (graph, curves), another draws it. Colors, words and PNG are those of
`spindle.timeline`, so that a component has the same color in all pictures.
"""

from pathlib import Path

from spindle.files.formats import write_bytes, write_text
from spindle.pictures.curves import panels_of
from spindle.pictures.curves_svg import curves_svg
from spindle.pictures.graph import graph_of
from spindle.pictures.graph_svg import graph_svg
from spindle.pictures.mermaid import graph_mermaid
from spindle.pictures.sizes_svg import sizes_svg
from spindle.timeline.png import to_png
from spindle.timeline.svg import FONT

__all__ = ["curves_svg", "graph_mermaid", "graph_of", "graph_svg", "panels_of", "sizes_svg", "write_picture"]


def write_picture(svg: str, file: Path | str) -> None:
    """Write an SVG text as it is, or as PNG where the file's name ends so.

    Raises FormatError where the file cannot be written, InputError where PNG lacks its package or a font.
    """
    if str(file).endswith(".png"):
        write_bytes(to_png(svg, font=FONT), file)
    else:
        write_text(svg, file)
