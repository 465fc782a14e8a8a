"""PNG: an SVG text in, a picture of points out, by resvg (the extra `png`)."""

from spindle.errors import InputError

ZOOM = 2.0  # 2240 points wide: sharp on a page of two columns and on dense screens


def to_png(svg: str, *, font: str, zoom: float = ZOOM) -> bytes:
    """The picture on white. `font`: the families that the SVG names, of which one must be installed."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise InputError(
            "PNG needs the package resvg_py, which is not installed; pip install 'spindle[png]', or write an SVG file"
        ) from None
    if svg_to_bytes(svg_string=_probe(font, "a")) == svg_to_bytes(svg_string=_probe(font, "")):
        raise InputError(
            f"PNG needs one of the fonts {font}, and none is installed; install one (Debian: apt install "
            "fonts-dejavu-core), or write an SVG file"
        )
    return bytes(svg_to_bytes(svg_string=svg, background="#ffffff", zoom=zoom))


def _probe(font: str, text: str) -> str:
    """A small picture of a text; resvg leaves text without a font out, and says nothing."""
    head = 'xmlns="http://www.w3.org/2000/svg" width="20" height="20"'
    return f'<svg {head}><text y="15" font-family="{font}">{text}</text></svg>'
