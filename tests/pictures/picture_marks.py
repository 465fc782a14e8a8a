"""What an SVG text shows: its boxes, texts and paths, as a reader of XML finds them."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from spindle.pictures.canvas import BOLD, width_of

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Area:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Area") -> bool:
        """Whether both have a pixel in common; edges may touch."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def holds(self, other: "Area") -> bool:
        """Whether the other lies inside."""
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom


def root_of(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def page(svg: str) -> Area:
    _, _, width, height = map(float, root_of(svg).attrib["viewBox"].split())
    return Area(0, 0, width, height)


def words(svg: str) -> list[str]:
    return [element.text or "" for element in root_of(svg).iter(f"{SVG}text")]


def texts(svg: str) -> list[tuple[str, Area]]:
    """Texts that stand at a place of their own, with the room that they take at most."""
    found = []
    for element in root_of(svg).iter(f"{SVG}text"):
        text, size = element.text or "", float(element.get("font-size", 11))
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        wide = width_of(text, size * (BOLD if element.get("font-weight") else 1))
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[element.get("text-anchor", "start")]
        found.append((text, Area(left, y - 0.8 * size, left + wide, y + 0.2 * size)))
    return found


def boxes(svg: str) -> list[Area]:
    """The boxes of MetaOps."""
    found = [e for e in root_of(svg).iter(f"{SVG}rect") if e.get("rx") == "4"]
    sides = [[float(e.attrib[name]) for name in ("x", "y", "width", "height")] for e in found]
    return [Area(x, y, x + wide, y + high) for x, y, wide, high in sides]
