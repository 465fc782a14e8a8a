"""Graph as Mermaid: a flowchart that Markdown pages of GitHub and GitLab draw, a subgraph for each task."""

from spindle.pictures.graph import Graph, Node
from spindle.timeline.words import count, seconds, size


def graph_mermaid(graph: Graph) -> str:
    """The text of a .mmd file. MetaOps with shared parameters are rounded, those of one device have double sides."""
    lines = ["flowchart LR"]
    index = {node.name: f"m{i}" for i, node in enumerate(graph.nodes)}
    for number, task in enumerate(graph.tasks):
        lines.append(f'  subgraph t{number}["{_safe(task or "(no task)")}"]')
        lines.append("    direction LR")
        lines += [f"    {index[node.name]}{_shape(node)}" for node in graph.nodes if node.task == task]
        lines.append("  end")
    for edge in graph.edges:
        label = f"|{size(edge.num_bytes)}|" if edge.num_bytes else ""
        lines.append(f"  {index[edge.source]} -->{label} {index[edge.target]}")
    return "\n".join(lines) + "\n"


def _shape(node: Node) -> str:
    batch = f", batch {node.batch}" if node.batch else ""
    where = f" on {node.devices} devices" if node.devices > 1 else ""
    words = [node.name, f"{count(node.layers, 'layer')}{batch}", f"{seconds(node.time_s)}{where}"]
    if node.shared_with:
        words.append(f"parameters also in {', '.join(node.shared_with)}")
    if node.one_device:
        words.append("one device only")
    text = "<br/>".join(map(_safe, words))
    if node.one_device:
        return f'[["{text}"]]'
    return f'("{text}")' if node.shared_with else f'["{text}"]'


def _safe(text: str) -> str:
    """Text in quotes: letters and digits as they are, signs that Mermaid or HTML would read as entities."""
    plain = frozenset(" .,()-_/:%+")
    return "".join(c if c.isalnum() or c in plain else f"#{ord(c)};" for c in text)
