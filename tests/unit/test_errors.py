"""Errors cross processes whole, and are caught by the names that the tree promises."""

from __future__ import annotations

import copy
import pickle

import pytest

from fastckpt import errors
from fastckpt.errors import (
    AnotherWriter,
    CommitTimeout,
    FastckptError,
    FormatError,
    LimitExceeded,
    ObjectNotFound,
    OutOfSpace,
    RankFailed,
    RepositoryNotFound,
    RestoreError,
    SaveError,
    SnapshotDamaged,
    StorageError,
    UnsupportedVersion,
)

ERRORS = [
    RankFailed("ranks 3, 4 failed", {3: ValueError("full"), 4: CommitTimeout("late", [7])}),
    CommitTimeout("missing", range(2)),
    SnapshotDamaged("damaged", key="w", shard="[0:4]", object="packs/x", offset=17),
    StorageError("reset", transient=True),
    OutOfSpace("full"),
    AnotherWriter("fenced"),
    LimitExceeded("too many"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_an_error_crosses_with_its_message_and_fields(error: FastckptError, again: object) -> None:
    back = again(error)  # type: ignore[operator]
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert repr(vars(back)) == repr(vars(error))


def test_an_error_inside_an_error_crosses_too() -> None:
    back = pickle.loads(pickle.dumps(ERRORS[0]))
    assert type(back.failures[3]) is ValueError
    assert back.failures[4].missing_ranks == (7,)


def test_an_error_that_was_given_notes_keeps_them() -> None:
    error = SnapshotDamaged("damaged", key="w")
    error.add_note("while restoring step 5")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while restoring step 5"]


def test_fields_that_are_not_known_are_there_and_empty() -> None:
    assert RankFailed("x").failures == {}
    assert CommitTimeout("x").missing_ranks == ()
    assert vars(SnapshotDamaged("x")) == {"key": None, "shard": None, "object": None, "offset": None}
    assert StorageError("x").transient is False


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (RankFailed, SaveError),
        (AnotherWriter, SaveError),
        (SnapshotDamaged, RestoreError),
        (RepositoryNotFound, FormatError),
        (UnsupportedVersion, FormatError),
        (LimitExceeded, FormatError),
        (ObjectNotFound, StorageError),
        (StorageError, FastckptError),
        (FastckptError, Exception),
    ],
)
def test_an_error_is_caught_by_the_family_it_belongs_to(kind: type, base: type) -> None:
    assert issubclass(kind, base)


def test_no_error_is_taken_for_one_of_pythons_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FastckptError)]
    assert not any(issubclass(kind, ValueError | TypeError | OSError | RuntimeError) for kind in kinds)
