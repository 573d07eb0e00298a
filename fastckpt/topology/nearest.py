"""What may have been meant by a name that is unknown."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection
from typing import Final

COMPARED_MAX: Final = 1000
LISTED_MAX: Final = 12


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the known one that is most like it, or else what there is.

    Of many, only some of those that begin like it are looked at.
    """
    alike = [one for one in known if one[:3] == name[:3]] if len(known) > COMPARED_MAX else known
    close = difflib.get_close_matches(name[:100], itertools.islice(alike, COMPARED_MAX), 1)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(itertools.islice(known, LISTED_MAX))
    return f"known are {listed}{', ...' if len(known) > LISTED_MAX else ''}"
