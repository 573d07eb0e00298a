"""Values of others in messages about them."""

from __future__ import annotations

from typing import Any, Final

CHARACTERS_MAX: Final = 60


def shown(value: Any) -> str:
    """A value, in a few characters: of what is not built in only its type, since its ``repr`` may be long or fail."""
    if isinstance(value, list | tuple):
        listed = [_shown(each) for each in value[:CHARACTERS_MAX]]
        return _shortened(f"[{', '.join(listed)}]")
    return _shortened(_shown(value))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(str(value[: CHARACTERS_MAX + 1]))
    if isinstance(value, int) and abs(value) > 10**20:  # printing it may not be allowed
        return "a number beyond 10^20"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _shortened(text: str) -> str:
    return text if len(text) <= CHARACTERS_MAX else text[: CHARACTERS_MAX - 3] + "..."
