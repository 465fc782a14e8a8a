"""Harmless: control characters, which a terminal would obey, found in texts that come from outside."""

import re

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
"""A class of regular expressions; characters that turn the direction of writing are among them."""
_HARMFUL = re.compile(f"[{CONTROL}]")


def harmless(text: str) -> str:
    """The text with its control characters written out; line breaks and tabs stay."""
    return _HARMFUL.sub(lambda c: c[0] if c[0] in "\n\t" else c[0].encode("unicode_escape").decode(), text)
