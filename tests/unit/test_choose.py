"""Which snapshot a restore takes: the newest that is whole and has every key asked for; the log says what was not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from fastckpt.errors import SnapshotDamaged
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.storage.memory import MemoryStore
from tests.crash.numpy_job import Spec, save_alone, tiny_spec

SPEC = tiny_spec(1)
OLD = {key: SPEC[key] for key in ("w", "b")}


class CountingStore(MemoryStore):
    """Counts how often the size of a pack is asked for."""

    sizes = 0

    def size(self, name: str) -> int:
        self.sizes += name.startswith("packs/")
        return super().size(name)


def saved(*specs: Spec) -> CountingStore:
    store = CountingStore("choose")
    for step, spec in enumerate(specs, 1):
        save_alone(store, step, spec)
    store.sizes = 0
    return store


def lacks(*keys: str) -> Callable[[Snapshot], list[str]]:
    return lambda snapshot: [key for key in keys if snapshot.key_number(key) is None]


def damage(store: MemoryStore, step: int) -> None:
    snapshot = next(snapshot for snapshot in Repository(store).snapshots() if snapshot.step == step)
    store.delete(f"attempts/{snapshot.attempt}/part-000000")


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "fastckpt"):
        yield


def test_the_newest_that_has_every_key_is_taken_and_those_passed_over_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = saved(SPEC, SPEC, OLD, OLD)
    chosen = Repository(store).choose(None, lacks("w", "t", "o"))
    assert chosen is not None
    assert chosen.step == 2
    assert [record.getMessage().partition("choose: ")[2] for record in caplog.records] == [
        "passing over step 4: it has no t, o",
        "passing over step 3: it has no t, o",
    ]


def test_a_newer_one_that_lacks_nothing_but_is_damaged_is_passed_over_too(caplog: pytest.LogCaptureFixture) -> None:
    store = saved(SPEC, OLD, SPEC)
    damage(store, 3)
    chosen = Repository(store).choose(None, lacks("t"))
    assert chosen is not None
    assert chosen.step == 1
    assert "passing over step 3: step 3: attempts/" in caplog.text
    assert "passing over step 2: it has no t" in caplog.text


def test_where_none_has_every_key_it_is_the_newest_that_is_whole() -> None:
    store = saved(OLD, OLD, OLD)
    damage(store, 3)
    chosen = Repository(store).choose(None, lacks("t"))
    assert chosen is not None
    assert chosen.step == 2
    packs = sum(len(table.packs) for table in chosen.part(0).tables)
    assert store.sizes == packs, "a check asks for every pack; only the one that is returned has to be whole"


def test_where_none_has_every_key_and_none_is_whole_the_damage_is_raised() -> None:
    store = saved(OLD, OLD)
    for step in (1, 2):
        damage(store, step)
    with pytest.raises(SnapshotDamaged, match="step 2: attempts/"):
        Repository(store).choose(None, lacks("t"))


def test_thousands_of_missing_keys_are_counted_and_the_first_few_named(caplog: pytest.LogCaptureFixture) -> None:
    Repository(saved(OLD)).choose(None, lacks(*(f"layers.{number}.weight" for number in range(4000))))
    (record,) = caplog.records
    named = ", ".join(f"layers.{number}.weight" for number in range(5))
    assert record.getMessage().endswith(f"passing over step 1: it has no {named} and 3995 more")


def test_many_snapshots_passed_over_are_counted_and_the_newest_named(caplog: pytest.LogCaptureFixture) -> None:
    chosen = Repository(saved(SPEC, *[OLD] * 13)).choose(None, lacks("t"))
    assert chosen is not None
    assert chosen.step == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 11
    assert "step 14" in messages[0]
    assert "step 5" in messages[9]
    assert messages[10].endswith("passing over 3 older snapshots too")


def test_an_explicit_step_is_exact_whatever_it_lacks() -> None:
    chosen = Repository(saved(SPEC, OLD)).choose(2, lacks("t"))
    assert chosen is not None
    assert chosen.step == 2
