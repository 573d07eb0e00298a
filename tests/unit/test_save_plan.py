"""Planning a save: what is bundled, what is compared, and what is refused by key and rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fastckpt.errors import LimitExceeded
from fastckpt.format.chunk import CHUNK_BYTES_MAX, CHUNKS_MAX
from fastckpt.format.families import mesh_of
from fastckpt.format.tables import SHARED, Chunks, Layout, check_layout
from fastckpt.plan.save_plan import (
    COMPARED,
    KNOWN,
    LOWEST,
    OWN,
    Comparison,
    Offer,
    RankOffer,
    auto_chunk_bytes,
    offered_bytes,
    plan_save,
)

WHOLE = "whole"


def offer(
    key: str,
    shape: Sequence[int] = (8,),
    boxes: Sequence[tuple[list[int], list[int]]] | str = WHOLE,
    *,
    dtype: str = "float32",
    sharing: int = COMPARED,
    among: int = 0,
    alias: str = "",
) -> Offer:
    held = [([0] * len(shape), list(shape))] if boxes == WHOLE else list(boxes)
    return Offer(key, dtype, list(shape), held, sharing, among, alias)  # type: ignore[arg-type]


def plan(
    *ranks: list[Offer],
    digests: dict[int, dict[str, bytes]] | None = None,
    groups: list[list[int]] | None = None,
    chunk_bytes: int = 4096,
) -> tuple[Layout, list[Comparison]]:
    offers = {rank: RankOffer(tensors, groups or []) for rank, tensors in enumerate(ranks)}
    same = {rank: {tensor.key: b"same" for tensor in tensors} for rank, tensors in enumerate(ranks)}
    layout, comparisons = plan_save(offers, same if digests is None else digests, [0] * len(ranks), chunk_bytes)
    check_layout(layout, "x")
    return layout, comparisons


def refused(*ranks: list[Offer], digests: dict[int, dict[str, bytes]] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        plan(*ranks, digests=digests)
    return str(caught.value)


def test_more_chunks_than_allowed_are_refused_listed_ones_and_those_of_meshes_together() -> None:
    tensors = [Offer("a", "float32", [4096], [], KNOWN, 0, "", 0, [(0, 0)]), offer("b", [4096], sharing=KNOWN)]
    offers = dict.fromkeys(range(2), RankOffer(tensors, [[0, 1]], [mesh_of(np.arange(2))]))
    layout, _ = plan_save(offers, {}, [0, 0], 4096, chunks_max=8)
    assert len(check_layout(layout, "x")) == 8
    with pytest.raises(LimitExceeded, match="more than 7 chunks of up to 4096 bytes"):
        plan_save(offers, {}, [0, 0], 4096, chunks_max=7)


def writers_of(layout: Layout, key: str) -> set[int]:
    chunks = Chunks(layout)
    return {
        rank
        for rank in range(len(layout.rank_nodes))
        for _, pieces in chunks.of_rank(rank)
        if any(layout.keys[layout.shard_key(piece.shard)] == key for piece in pieces)
    }


def test_tiny_shards_are_bundled_in_key_order_and_others_stand_alone() -> None:
    layout, _ = plan([offer("c", (4,)), offer("b", (1000,)), offer("a", ()), offer("d", (17,))])
    keys = [[layout.keys[layout.shard_keys[shard]] for shard in unit] for unit in layout.units]
    assert sorted(keys) == [["a", "c"], ["b"], ["d"]]


def test_a_bundle_that_is_full_is_followed_by_another() -> None:
    layout, _ = plan([offer(f"{number:03}", (16,)) for number in range(40)])  # 64 bytes each, 1024 to a bundle
    assert [len(unit) for unit in layout.units] == [16, 16, 8]
    assert len(Chunks(layout)) == 3


def test_nothing_at_all_is_a_layout_too() -> None:
    layout, comparisons = plan([], [])
    assert (layout.keys, layout.units, layout.writers, comparisons) == ([], [], [], [])
    assert layout.rank_nodes == [0, 0]


def test_a_tensor_without_elements_is_kept_as_a_key() -> None:
    layout, _ = plan([offer("a", (0, 3), [])], [offer("a", (0, 3), [])])
    assert layout.keys == ["a"]
    assert layout.shapes == [[0, 3]]
    assert layout.shard_keys == []


def test_a_replica_that_is_known_to_be_equal_is_split_between_its_holders() -> None:
    layout, _ = plan(*[[offer("a", (8, 1024), sharing=KNOWN)]] * 4, groups=[[0, 1, 2, 3]])
    assert layout.writers == [(0, 2), (1, 2), (2, 2), (3, 2)]


def test_a_replica_that_was_only_found_equal_is_written_whole_by_the_lowest_rank_and_never_mixed() -> None:
    layout, comparisons = plan(*[[offer("a", (8, 1024))]] * 4)
    assert layout.writers == [(0, 8)]
    assert comparisons == [Comparison([(0, 4)], ["a"])]
    assert [rank for rank in range(6) if comparisons[0].has(rank)] == [0, 1, 2, 3]


def test_a_buffer_is_written_whole_by_the_lowest_rank_even_if_ranks_differ() -> None:
    big = offer("a", (8, 1024), sharing=LOWEST)
    layout, comparisons = plan([], [big], [big], digests={})
    assert layout.writers == [(1, 8)]
    assert comparisons == []


def test_known_replicas_need_no_digest_and_no_comparison() -> None:
    known = offer("a", (8, 1024), sharing=KNOWN)
    layout, comparisons = plan([known], [known], digests={}, groups=[[0, 1]])
    assert layout.writers == [(0, 4), (1, 4)]
    assert comparisons == []


def test_ranks_outside_the_known_group_are_not_taken_on_trust() -> None:
    known = offer("a", sharing=KNOWN)
    with pytest.raises(ValueError, match=r"^a: differs between ranks \(ranks 0, 1, 2\)"):
        plan([known], [known], [known], digests={0: {}, 1: {}, 2: {}}, groups=[[0, 1]])


def test_compared_keys_are_listed_by_the_ranks_that_share_them() -> None:
    a, b, c, d = offer("a"), offer("b"), offer("c"), offer("d", sharing=OWN)
    _, comparisons = plan([a, b, d], [a, b, d], [b, c])
    assert comparisons == [Comparison([(0, 2)], ["a", "d"]), Comparison([(0, 3)], ["b"])]


def test_own_tensors_that_are_equal_are_stored_once() -> None:
    layout, _ = plan([offer("a", sharing=OWN)], [offer("a", sharing=OWN)])
    assert list(zip(layout.keys, layout.owners, strict=True)) == [("a", SHARED)]


def test_own_tensors_that_differ_are_kept_for_each_rank_by_that_rank() -> None:
    own = offer("a", (2048,), sharing=OWN)
    layout, comparisons = plan([own], [own], digests={0: {"a": b"0"}, 1: {"a": b"1"}})
    assert list(zip(layout.keys, layout.owners, strict=True)) == [("a", 0), ("a", 1)]
    assert layout.writers == [(0, 2), (1, 2)]
    assert [layout.label(number) for number in range(2)] == ["a@0", "a@1"]
    assert comparisons == []


def test_own_tensors_may_differ_in_shape_and_dtype() -> None:
    layout, _ = plan([offer("a", (3,), sharing=OWN)], [offer("a", (4,), sharing=OWN, dtype="int8")])
    assert layout.shapes == [[3], [4]]
    assert layout.dtypes == ["float32", "int8"]


def test_tied_tensors_are_stored_once() -> None:
    layout, _ = plan([offer("a", (1024,)), offer("b", (1024,), alias="a")])
    assert layout.aliases == [(1, 0)]
    assert layout.shard_keys == [0]


def test_own_tensors_may_be_tied_on_some_ranks_only() -> None:
    """The rank where they are tied holds one tensor twice, the other holds two tensors of equal content."""
    tied = [offer("a", sharing=OWN), offer("b", sharing=OWN, alias="a")]
    apart = [offer("a", sharing=OWN), offer("b", sharing=OWN)]
    try:
        layout, _ = plan(tied, apart)
    except ValueError as refusal:
        assert "b" in str(refusal)  # noqa: PT017 - refusing it by key would be as good
    else:
        assert {"a", "b"} <= set(layout.keys)


def test_different_content_is_refused_naming_the_key_and_which_ranks_agree() -> None:
    message = refused(*[[offer("w")]] * 3, digests={0: {"w": b"x"}, 1: {"w": b"y"}, 2: {"w": b"x"}})
    assert message.startswith("w: differs between ranks (ranks 0, 2 from rank 1)")
    assert "fastckpt.Shard(tensor, offsets, shape)" in message


@pytest.mark.parametrize("other", [offer("w", (9,)), offer("w", dtype="float64")], ids=["shape", "dtype"])
def test_different_forms_are_refused_naming_the_key_and_both_forms(other: Offer) -> None:
    message = refused([offer("w")], [other], [offer("w")])
    assert message.startswith("w: ranks hold tensors of different shape or dtype")
    assert "float32 [8] on ranks 0, 2" in message
    assert f"{other.dtype} {other.shape} on rank 1" in message


def test_overlapping_boxes_are_refused_naming_the_ranks_and_boxes() -> None:
    message = refused([offer("w", (8,), [([0], [5])])], [offer("w", (8,), [([4], [4])])])
    assert message.startswith("w: rank 0 and rank 1 hold overlapping but different boxes [0:5] and [4:8]")


def test_a_hole_is_refused_naming_who_holds_what() -> None:
    message = refused([offer("w", (8,), [([0], [3])])], [offer("w", (8,), [([4], [4])])])
    assert message.startswith("w: ranks hold 7 of the 8 elements of shape [8]: [0:3] on rank 0, [4:8] on rank 1; ")
    assert "of shape [8]: nothing; " in refused([offer("w", (8,), [])])


def test_different_kinds_are_refused_naming_the_key_and_ranks() -> None:
    message = refused([offer("w", sharing=COMPARED)], [offer("w", sharing=LOWEST)])
    assert message.startswith("w: ")
    assert "rank 0" in message


def test_a_tensor_tied_on_some_ranks_only_is_refused_naming_the_key_and_ranks() -> None:
    message = refused([offer("a"), offer("b", alias="a")], [offer("a"), offer("b")])
    assert message.startswith("b: ")
    assert "rank 0" in message


def test_a_tensor_of_which_one_kind_is_own_and_another_is_not_is_refused_whichever_rank_has_which() -> None:
    own, compared = [offer("w", sharing=OWN)], [offer("w", sharing=COMPARED)]
    assert refused(compared, own).startswith("w: ranks hold different kinds of things")
    assert refused(own, compared).startswith("w: ranks hold different kinds of things")


def test_a_tensor_shared_across_keys_of_different_dtypes_counts_each_key_once() -> None:
    ranks = {
        0: RankOffer([offer("a", (2, 3)), offer("b", (), dtype="int8")], []),
        1: RankOffer([offer("a", (2, 3))], []),
    }
    assert offered_bytes(ranks) == 25


@pytest.mark.parametrize("state_bytes", [0, 1, 8 * 10**12, 9 * 10**12, 10**14, 6 * 10**14, 10**18])
def test_the_chunk_size_is_a_power_of_two_that_keeps_a_snapshot_below_the_limit(state_bytes: int) -> None:
    size = auto_chunk_bytes(state_bytes)
    assert size.bit_count() == 1
    assert 4 * 2**20 <= size <= CHUNK_BYTES_MAX
    assert state_bytes // size < CHUNKS_MAX or size == CHUNK_BYTES_MAX
    assert size == 4 * 2**20 or state_bytes > size // 2 * 2_000_000, "no larger than it must be"
