"""Which object names a store accepts; the rule itself stands in ``Store``. What the names mean is format's business."""

from __future__ import annotations

import re

_COMPONENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_IS_COMPONENT = re.compile(_COMPONENT).fullmatch
_IS_NAME = re.compile(f"{_COMPONENT}(/{_COMPONENT})*").fullmatch


def is_component(text: str) -> bool:
    """Whether ``text`` may stand between two slashes of a name. Anything else found in a store is not an object."""
    return _IS_COMPONENT(text) is not None


def check_name(name: str) -> None:
    """``ValueError`` if no object may be called ``name``."""
    if _IS_NAME(name) is None:
        raise ValueError(
            f"not an object name: {name[:300]!r}; components of A-Z a-z 0-9 . _ - joined by '/', "
            "none starting with a dot or longer than 200 bytes"
        )


def check_prefix(prefix: str) -> None:
    """``ValueError`` if ``prefix`` is neither a name nor empty."""
    if prefix:
        check_name(prefix)
