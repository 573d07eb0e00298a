"""What differs between two environments: named, weighed, in bounded text, whatever the records are."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.job.environment import environment
from fastckpt.repository.drift import (
    FACTS_MAX,
    LINES_MAX,
    SEVERITIES,
    Difference,
    describe,
    differences,
    fact_text,
    facts,
)

RECORD: dict[str, Any] = {
    "python": "3.11.7",
    "torch": {"version": "2.13.0", "git_version": "abc", "cuda": "12.8", "cudnn": 91000, "nccl": "2.27.3"},
    "distributions": {"fastckpt-torch": "0.1.0", "numpy": "2.4.0"},
    "platform": {"system": "Linux", "release": "6.1", "machine": "x86_64", "cpus": 64, "memory_bytes": 10},
    "code": {"commit": "1" * 40, "dirty": False},
    "world_size": 8,
    "ranks_per_node": [8],
    "mesh": {"shape": [8], "dim_names": ["dp"]},
    "accelerator": {"type": "cuda", "count": 8, "name": "A", "driver": "570"},
    "determinism": {
        "deterministic_algorithms": True,
        "deterministic_warn_only": False,
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
        "float32_matmul_precision": "highest",
        "default_dtype": "float32",
        "threads": 8,
    },
}
ABSENT = object()


def changed(**facts: Any) -> dict[str, Any]:
    """The record with other facts; ``torch__cuda`` stands for ``torch.cuda``."""
    record = copy.deepcopy(RECORD)
    for name, value in facts.items():
        *parents, last = name.split("__")
        at = record
        for parent in parents:
            at = at[parent]
        if value is ABSENT:
            del at[last]
        else:
            at[last] = value
    return record


def found(saved: Any, now: Any) -> dict[str, str]:
    """Name to severity."""
    return {one.name: one.severity for one in differences(saved, now)}


def test_equal_records_do_not_differ_and_nor_does_what_this_process_records_twice() -> None:
    assert differences(RECORD, copy.deepcopy(RECORD)) == []
    assert differences(json.loads(json.dumps(environment())), environment()) == []


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"platform__release": "6.2"}, {"platform.release": "info"}),
        ({"platform__memory_bytes": 11}, {"platform.memory_bytes": "info"}),
        ({"distributions__fastckpt-torch": "0.2.0"}, {"distributions.fastckpt-torch": "info"}),
        ({"host": "b"}, {}),
        ({"python": "3.12.0"}, {"python": "numerics"}),
        ({"torch__nccl": "2.28"}, {"torch.nccl": "numerics"}),
        ({"distributions__numpy": "2.5.0"}, {"distributions.numpy": "numerics"}),
        ({"platform__machine": "aarch64"}, {"platform.machine": "numerics"}),
        (
            {"mesh": {"shape": [2, 4], "dim_names": ["dp", "tp"]}},
            {"mesh.shape": "numerics", "mesh.dim_names": "numerics"},
        ),
        ({"accelerator__name": "B"}, {"accelerator.name": "numerics"}),
        ({"accelerator__driver": "580"}, {"accelerator.driver": "numerics"}),
        ({"determinism__threads": 4}, {"determinism.threads": "numerics"}),
        ({"determinism__cudnn_benchmark": True}, {"determinism.cudnn_benchmark": "numerics"}),
        ({"determinism__float32_matmul_precision": "high"}, {"determinism.float32_matmul_precision": "training"}),
        ({"determinism__default_dtype": "bfloat16"}, {"determinism.default_dtype": "training"}),
        ({"code__commit": "2" * 40}, {"code.commit": "training"}),
        ({"code__dirty": True}, {"code.dirty": "training"}),
        ({"world_size": 4}, {"world_size": "training"}),
    ],
)
def test_each_kind_of_fact_has_its_severity(facts: dict[str, Any], expected: dict[str, str]) -> None:
    assert found(RECORD, changed(**facts)) == expected
    assert found(changed(**facts), RECORD) == expected


def test_giving_determinism_up_is_graver_than_taking_it_on() -> None:
    for name, loose in (("deterministic_algorithms", False), ("deterministic_warn_only", True)):
        record = changed(**{f"determinism__{name}": loose})
        assert found(RECORD, record) == {f"determinism.{name}": "training"}
        assert found(record, RECORD) == {f"determinism.{name}": "numerics"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"accelerator": ABSENT}, {"accelerator.type": "numerics"}),
        ({"mesh": ABSENT}, {"mesh.shape": "numerics"}),
        ({"code": ABSENT}, {"code.commit": "training"}),
        ({"torch__cuda": ABSENT, "torch__cudnn": ABSENT, "torch__nccl": ABSENT}, {"torch.cuda": "numerics"}),
        ({"distributions__numpy": ABSENT}, {"distributions.numpy": "numerics"}),
        ({"determinism": ABSENT}, {}),
        ({"platform": ABSENT, "python": ABSENT, "world_size": ABSENT, "ranks_per_node": ABSENT}, {}),
        ({"torch__cuda": None}, {"torch.cuda": "numerics"}),
    ],
)
def test_what_is_absent_differs_only_where_absence_says_that_there_is_none(
    facts: dict[str, Any], expected: dict[str, str]
) -> None:
    assert found(RECORD, changed(**facts)) == expected
    assert found(changed(**facts), RECORD) == expected


def test_a_record_that_no_training_job_made_says_nothing_by_what_it_lacks() -> None:
    assert found({"imported_from": "torch", "torch": "2.5.1"}, RECORD) == {}
    assert found({}, RECORD) == {}
    assert found({"imported_from": "torch", "world_size": 1}, RECORD) == {"world_size": "training"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"torch__version": "2.14.0", "torch__git_version": "def"}, ["torch.version"]),
        ({"torch__git_version": "def"}, ["torch.git_version"]),
        ({"world_size": 16, "ranks_per_node": [8, 8]}, ["world_size"]),
        ({"ranks_per_node": [4, 4]}, ["ranks_per_node"]),
        ({"code__commit": "2" * 40, "code__dirty": True}, ["code.commit"]),
        ({"accelerator": {"type": "xpu", "count": 4, "name": "X", "driver": "1"}}, ["accelerator.type"]),
    ],
)
def test_what_follows_from_another_difference_is_not_named_beside_it(
    facts: dict[str, Any], expected: list[str]
) -> None:
    assert list(found(RECORD, changed(**facts))) == expected


def test_the_same_commit_changed_both_times_may_or_may_not_be_the_same_code_and_that_is_said() -> None:
    dirty = changed(code__dirty=True)
    (one,) = differences(dirty, copy.deepcopy(dirty))
    assert (one.name, one.saved, one.present, one.severity) == ("code.dirty", True, True, "training")
    assert "is not recorded" in str(one)
    assert found(dirty, changed(code__dirty=True, code__commit="2" * 40)) == {"code.commit": "training"}


def test_the_gravest_come_first_and_a_log_has_a_line_for_each_but_one_for_all_that_is_only_info() -> None:
    now = changed(platform__release="6.2", platform__cpus=32, torch__version="2.14.0", world_size=4)
    lines = describe(differences(RECORD, now))
    assert lines == [
        ("training", "world_size was 8, is 4"),
        ("numerics", "torch.version was 2.13.0, is 2.14.0"),
        ("info", "platform.release was 6.1, is 6.2; platform.cpus was 64, is 32"),
    ]
    assert describe([]) == []


def test_a_log_is_bounded_in_lines_and_characters_and_says_what_it_leaves_out() -> None:
    saved = {f"{number}\x1b{'x' * 999}": "\x1b" * 999 for number in range(900)}
    other = {name: ["\u202e" * 999] * 999 for name in saved}
    lines = describe(differences(saved, other))
    assert len(lines) == LINES_MAX + 1
    assert lines[-1] == ("numerics", f"{900 - LINES_MAX} more differences")
    platforms = [{"platform": record} for record in (saved, other)]
    lines += describe(differences(*platforms))
    assert lines[-1][0] == "info"
    assert lines[-1][1].endswith(f"; {900 - LINES_MAX} more differences")
    assert all(text.isprintable() and len(text) < 12_000 for _, text in lines)


def test_facts_beyond_the_limit_are_not_compared() -> None:
    many = {f"{number:05}": 1 for number in range(FACTS_MAX + 5)}
    assert len(differences(many, dict.fromkeys(many, 2))) == FACTS_MAX
    torch = {"torch": {"version": "2.13.0"}}
    for a, b in ((torch, {**torch, "distributions": many}), ({**torch, "distributions": many}, torch)):
        assert len(differences(a, b)) == FACTS_MAX - 1


def test_a_fact_without_a_name_hides_no_other() -> None:
    assert found({"": 1, "world_size": 1}, {"": 2, "world_size": 2}) == {"world_size": "training", "": "numerics"}


@pytest.mark.parametrize(("a", "b"), [(True, 1), (0, False), ([1], [True]), ("1", 1), ([1], [1, 1]), ([], "")])
def test_values_of_different_json_types_differ(a: Any, b: Any) -> None:
    assert found({"x": a}, {"x": b}) == {"x": "numerics"}
    assert found({"x": 1.0}, {"x": 1}) == {}


def test_facts_have_dotted_names_and_lists_are_facts_unless_they_hold_more() -> None:
    record = {"a": {"b": [1, 2], "c": [{"d": None, "e": 1}, 5]}, "f": {}, "g": []}
    assert list(facts(record)) == [("a.b", [1, 2]), ("a.c.0.e", 1), ("a.c.1", 5), ("g", [])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (1.5, "1.5"),
        ("a b", "a b"),
        (["dp", None, 2], "[dp, null, 2]"),
        ([1] * 20, "[" + "1, " * 16 + "... 20 in all]"),
        ("a\nb", r"a\nb"),
        pytest.param(10**5000, "an int of 16610 bits", id="huge"),
    ],
)
def test_a_fact_is_shown_in_one_printable_line(value: Any, text: str) -> None:
    assert fact_text(value) == text


def deep(levels: int) -> Any:
    record: Any = 1
    for level in range(levels):
        record = {"x": record} if level % 2 else [record, {}]
    return record


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
NAMES = ["", ".", "torch", "torch.version", "code", "commit", "dirty", "mesh", "world_size", "accelerator", "type"]
HOSTILE = st.dictionaries(st.sampled_from(NAMES), JSON | st.dictionaries(st.sampled_from(NAMES), JSON), max_size=6)


@given(JSON | HOSTILE, JSON | HOSTILE)
def test_no_record_raises_and_what_it_says_is_printable(saved: Any, now: Any) -> None:
    for a, b in ((saved, now), (now, RECORD), (RECORD, now)):
        for one in differences(a, b):
            assert one.severity in SEVERITIES
            assert isinstance(one, Difference)
        assert all(text.isprintable() for _, text in describe(differences(a, b)))


def test_a_record_deeper_than_any_stack_is_compared_as_far_as_facts_go() -> None:
    hostile = {"torch": {"version": "1"}, "x": deep(100_000)}
    assert found(hostile, {"torch": {"version": "2"}, "x": deep(50_000)}) == {"torch.version": "numerics"}
    del hostile
