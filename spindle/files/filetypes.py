"""File types: what a number or a text in any file may be. Values further out are mistakes, or meant to do harm.

Ranges are wide enough for any training that exists, and narrow enough that sums, products and quotients of a few of
them are numbers, and that nothing that is counted out takes a day.
"""

from typing import Annotated

from pydantic import Field

from spindle.words.harmless import CONTROL

MOST_FILE_BYTES = 2**28  # of a JSON file: plans of 4096 devices take some MiB
MOST_YAML_BYTES = 2**22  # which people write

Text = Annotated[str, Field(max_length=10_000, pattern=f"^[^{CONTROL}]*$")]
"""A name, or a few words."""
Prose = Annotated[str, Field(max_length=20_000)]
"""Of several lines, for readers of the file; it is not printed."""
Count = Annotated[int, Field(ge=-(10**6), le=10**7)]
"""Things that are gone through one by one: layers, devices, waves, steps."""
Amount = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""Whole numbers that are only computed with: bytes, widths, tokens."""
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
"""What has no unit of its own."""
Seconds = Annotated[float, Field(ge=-1e9, le=1e9)]
"""Thirty years at most."""
Bytes = Annotated[float, Field(ge=-1e18, le=1e18)]
"""An exabyte at most."""
