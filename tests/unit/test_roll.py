"""Rolls name the parts of consecutive nodes, and one that is not what its place says is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import document
from fastckpt.format.roll import NODES_MAX, decode_roll, make_rolls, roll_count
from fastckpt.format.tables import PartInfo, RollInfo

ATTEMPT = "000000000001-0123456789abcdef-000001"
NODES = 2 * NODES_MAX + 3
PARTS = [PartInfo(node, f"{node:064x}", 1000 + node) for node in range(NODES)]
LAST = make_rolls(ATTEMPT, PARTS)[-1]


def decoded(roll: Any, number: int = 2, nodes: int = NODES) -> list[PartInfo]:
    data = document.pack_table(roll)
    return decode_roll(data, RollInfo(document.digest(data), len(data)), ATTEMPT, number, nodes)


def test_all_parts_come_back_from_their_rolls() -> None:
    rolls = make_rolls(ATTEMPT, PARTS)
    assert len(rolls) == roll_count(NODES) == 3
    assert [info for number, roll in enumerate(rolls) for info in decoded(roll, number)] == PARTS


def test_few_nodes_have_no_rolls() -> None:
    assert make_rolls(ATTEMPT, PARTS[:NODES_MAX]) == []
    assert (roll_count(NODES_MAX), roll_count(NODES_MAX + 1)) == (0, 2)


BAD: dict[str, tuple[dict[str, Any], type[FormatError]]] = {
    "of another attempt": ({"attempt": ATTEMPT[:-1] + "2"}, FormatError),
    "that is another": ({"number": 1}, FormatError),
    "of too few digests": ({"digests": LAST.digests[:-1]}, FormatError),
    "of too many sizes": ({"sizes": LAST.sizes + bytes(4)}, FormatError),
    "of a part too large": ({"sizes": np.array([1, 2**32 - 1, 1], "<u4").tobytes()}, LimitExceeded),
}


@pytest.mark.parametrize("case", BAD)
def test_a_roll_that_breaks_one_rule_is_refused(case: str) -> None:
    changes, error = BAD[case]
    with pytest.raises(FormatError, match="roll-000002") as caught:
        decoded(msgspec.structs.replace(LAST, **changes))
    assert type(caught.value) is error


def test_a_roll_of_fewer_nodes_than_there_are_is_refused() -> None:
    with pytest.raises(FormatError, match="for each of 4 nodes"):
        decoded(LAST, nodes=NODES + 1)


def test_a_damaged_roll_is_refused() -> None:
    data = document.pack_table(LAST)
    info = RollInfo(document.digest(data), len(data))
    with pytest.raises(FormatError, match="damaged"):
        decode_roll(data[:-1] + b"\0", info, ATTEMPT, 2, NODES)
