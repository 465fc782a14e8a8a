"""Graph as SVG: levels are columns, tasks are lanes, boxes are as high as their time and colored by component.

What a color says stands there in letters too: a box has the name of its component, marks have words.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from spindle.pictures.canvas import BOLD, MARGIN, cut, folded, heading, legend, svg
from spindle.pictures.graph import Edge, Graph, Node
from spindle.pictures.layout import Box, Places, place
from spindle.timeline.colors import fills, text_on
from spindle.timeline.page.data import sorted_names
from spindle.timeline.svg import text_at
from spindle.timeline.words import count, percent, seconds, size

WIDTH, BETWEEN = 160.0, 76.0  # of a box, and of the space between two columns
LEAST_WIDTH = 560.0  # of the picture, so that its notes have room
INSIDE = WIDTH - 16
LINE, PAD = 14.0, 6.0
TALLEST = 190.0
PORT = 13.0  # between the ends of two edges, so that their labels do not meet
HEAD = 24.0  # of a lane
LEVEL = 44.0  # what an edge runs level before its end, under its label
MOST_LINES = 2  # of the names of tasks in a box

SHARED = (
    '<g fill="none" stroke="{0}" stroke-width="1.4"><circle cx="4" cy="7" r="3"/><circle cx="8.5" cy="7" r="3"/></g>'
)
INDENT = "<g/>"
ONE = (
    '<g fill="none" stroke="{0}" stroke-width="1.2"><rect x="1" y="2" width="10" height="10"/>'
    '<path d="M4.5 5.5L6.5 4V10.5"/></g>'
)


@dataclass(frozen=True, slots=True)
class _Card:
    """A node with what stands in its box: (mark, text) by line."""

    node: Node
    lines: tuple[tuple[str, str], ...]
    height: float


def graph_svg(graph: Graph, *, title: str, notes: Sequence[str] = ()) -> str:
    """The picture as the text of an SVG file; `notes` are lines below its title."""
    width = max(LEAST_WIDTH, 2 * MARGIN + graph.levels * (WIDTH + BETWEEN) - BETWEEN)
    parts, y = heading(title, notes, width=width)
    cards = _cards(graph)
    lane_of = {task: lane for lane, task in enumerate(graph.tasks)}
    boxes = [Box(name=n, lane=lane_of[c.node.task], level=c.node.level, height=c.height) for n, c in cards.items()]
    places = place(boxes, [(e.source, e.target) for e in graph.edges], top=y + 22, head=HEAD)
    for level in range(graph.levels):
        parts.append(text_at(_left(level) + WIDTH / 2, y + 12, f"level {level + 1}", anchor="middle", opacity=0.7))
    parts += _lanes(graph, places, width)
    parts += _edges(graph, cards, places)
    components = sorted_names(node.component for node in graph.nodes)
    color_of = dict(zip(components, fills(len(components)), strict=True))
    for name, card in cards.items():
        parts += _box(card, places.middle[name], color_of.get(card.node.component, "#d5dbe1"))
    drawn, bottom = legend(_entries(graph, color_of), places.lanes[-1][1] + 8, width=width)
    words = f"{count(len(graph.nodes), 'MetaOp')} of {count(len(graph.tasks), 'task')}, by level from left to right"
    return svg([*parts, *drawn], width=width, height=bottom, title=title, description=words)


def _left(level: int) -> float:
    return MARGIN + level * (WIDTH + BETWEEN)


def _cards(graph: Graph) -> dict[str, _Card]:
    longest_s = max(node.device_s for node in graph.nodes)
    total_s = sum(node.device_s for node in graph.nodes)
    found = {}
    for node in graph.nodes:
        lines = tuple(_lines(node, node.device_s / total_s))
        ends = sum(edge.target == node.name for edge in graph.edges)
        least = max(2 * PAD + LINE * len(lines), PORT * ends + 2 * PAD)
        found[node.name] = _Card(node, lines, max(least, TALLEST * node.device_s / longest_s))
    return found


def _lines(node: Node, share: float) -> Iterator[tuple[str, str]]:
    yield "", cut(node.name.removeprefix(f"{node.task}."), INSIDE, 11 * BOLD)
    batch = f", batch {node.batch}" if node.batch else ""
    where = f" on {node.devices} devices" if node.devices > 1 else ""
    part = percent(share) if share >= 0.0005 else "< 0.1 %"
    for text in (f"{count(node.layers, 'layer')}{batch}", f"{seconds(node.time_s)}{where}, {part}"):
        yield from (("", line) for line in folded(text, INSIDE, 10))
    if node.shared_with:
        names = folded(f"also in {', '.join(node.shared_with)}", INSIDE - 18, 10)
        shown = names if len(names) <= MOST_LINES else [f"also in {len(node.shared_with)} other tasks"]
        yield from ((SHARED if line == shown[0] else INDENT, line) for line in shown)
    if node.one_device:
        yield ONE, "one device only"


def _box(card: _Card, middle: float, fill: str) -> Iterator[str]:
    x, y = _left(card.node.level), middle - card.height / 2
    ink = text_on(fill)
    dashes = ' stroke-dasharray="5 3"' if card.node.one_device else ""
    yield f"<g><title>{escape(_whole(card.node))}</title>"
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH:g}" height="{card.height:.1f}" rx="4" fill="{fill}" '
        f'stroke="currentColor" stroke-width="1.2"{dashes}/>'
    )
    for row, (mark, text) in enumerate(card.lines):
        line_y = y + PAD + LINE * row
        if mark:
            yield f'<g transform="translate({x + 8:.1f} {line_y:.1f})">{mark.format(ink)}</g>'
        font = 'font-weight="600"' if row == 0 else 'font-size="10"'
        at = f'x="{x + (26 if mark else 8):.1f}" y="{line_y + 10.5:.1f}"'
        yield f'<text {at} fill="{ink}" {font}>{escape(text)}</text>'
    yield "</g>"


def _whole(node: Node) -> str:
    """All that is known of a MetaOp, for the pointer that rests on it."""
    shared = f"; parameters also used by {', '.join(node.shared_with)}" if node.shared_with else ""
    alone = f"; {_why_alone(node)}" if node.one_device else ""
    return f"{node.name}: {count(node.layers, 'layer')}, {seconds(node.time_s)}{shared}{alone}"


def _why_alone(node: Node) -> str:
    """A MetaGraph file says no batch, and only for which numbers of devices there are times."""
    return "cannot be sharded over the batch" if node.batch else "has a time for one device only"


def _lanes(graph: Graph, places: Places, width: float) -> Iterator[str]:
    for task, (top, _) in zip(graph.tasks, places.lanes, strict=True):
        yield f'<path d="M{MARGIN:g} {top:.1f}H{width - MARGIN:g}" stroke="currentColor" stroke-opacity="0.2"/>'
        name = cut(task or "(no task)", width - 2 * MARGIN, 11 * BOLD)
        yield text_at(MARGIN, top + 15, name, weight="600", opacity=0.8)


def _edges(graph: Graph, cards: Mapping[str, _Card], places: Places) -> Iterator[str]:
    """Curves first, then all labels, each at its edge's end on a ground of its own."""
    labels = []
    for target in cards:
        into = [edge for edge in graph.edges if edge.target == target]
        into.sort(key=lambda edge: _last_y(edge, places))
        for index, edge in enumerate(into):
            end_y = places.middle[target] + (index - (len(into) - 1) / 2) * PORT
            yield _curve(edge, cards, places, end_y)
            label = size(edge.num_bytes) if edge.num_bytes else ""
            if label:
                x = _left(cards[target].node.level) - 10
                labels.append(
                    f'<text x="{x:.1f}" y="{end_y - 2.5:.1f}" text-anchor="end" font-size="9" fill="currentColor" '
                    f'stroke="#ffffff" stroke-width="3" paint-order="stroke">{label}</text>'
                )
    yield from labels


def _last_y(edge: Edge, places: Places) -> float:
    bends = places.bends[edge.source, edge.target]
    return bends[-1][1] if bends else places.middle[edge.source]


def _curve(edge: Edge, cards: Mapping[str, _Card], places: Places, end_y: float) -> str:
    x, y = _left(cards[edge.source].node.level) + WIDTH, places.middle[edge.source]
    path = f"M{x:.1f} {y:.1f}"
    bends = places.bends[edge.source, edge.target]
    stops = [(_left(level), at, WIDTH) for level, at in bends]
    stops.append((_left(cards[edge.target].node.level) - LEVEL, end_y, LEVEL))
    for left, at, along in stops:
        half = (left - x) / 2
        path += f"C{x + half:.1f} {y:.1f} {left - half:.1f} {at:.1f} {left:.1f} {at:.1f}H{left + along:.1f}"
        x, y = left + along, at
    tip = f'<path d="M{x:.1f} {y:.1f}l-7 -3.5v7z" fill="currentColor"/>'
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.55" stroke-width="1.2"/>{tip}'


def _entries(graph: Graph, color_of: Mapping[str, str]) -> list[tuple[str, str]]:
    """What the marks of the picture mean."""
    swatch = '<rect y="1" width="14" height="12" rx="2" fill="{0}" stroke="currentColor"/>'
    found = [(swatch.format(color), name) for name, color in color_of.items()]
    bar = '<path d="M4 1H10M7 1V13M4 13H10" fill="none" stroke="currentColor" stroke-width="1.4"/>'
    where = "one device" if all(node.devices == 1 for node in graph.nodes) else "the fewest devices"
    found.append((bar, f"height and share: time on {where} (no box is lower than its text)"))
    if any(node.shared_with for node in graph.nodes):
        found.append((SHARED.format("currentColor"), "parameters are shared with these tasks"))
    for why in dict.fromkeys(_why_alone(node) for node in graph.nodes if node.one_device):
        found.append((ONE.format("currentColor"), why))
    if any(edge.num_bytes for edge in graph.edges):
        arrow = '<path d="M0 7H8" stroke="currentColor"/><path d="M14 7l-7 -3.5v7z" fill="currentColor"/>'
        found.append((arrow, "tensor of the whole batch"))
    return found
