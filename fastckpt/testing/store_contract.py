"""StoreContract: what every store must do, as tests. One suite for all stores, ours and yours.

A store's test file is a subclass with one fixture::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda: MyStore(tmp_path)

``pytest.register_assert_rewrite("fastckpt.testing.store_contract")`` in your ``conftest.py`` makes failures readable.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

import pytest

from fastckpt.errors import ObjectExists, ObjectNotFound, StorageError
from fastckpt.storage.store import BLOCK_BYTES, Bytes, Store

_BIG = 1 << 20
_PHASES = (0, 1, 511, 512, BLOCK_BYTES - 1)
"""Of an address or an offset, modulo ``BLOCK_BYTES``."""

_BAD_NAMES = [
    "",
    "/",
    "/absolute",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/..",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "x" * 201,
    "a/" + "x" * 201,
    "a\0b",
    "a\n",
    "a b",
    "a\\b",
    "a:b",
    "a%2Fb",
    "~",
    "\u00e9",
    "\udc80",
]

_GOOD_NAMES = ["a", "A.b_c-d", "-", "_", "0/1/2/3/4/5/6/7/8/9", "x" * 200, "y" * 200 + "/" + "z" * 200, "a..b"]


class StoreContract:
    """Subclass it and supply ``make_store``; override ``raw_write`` and ``raw_read`` where the bytes can be reached
    without the store, so that two wrongs of the store do not make a right."""

    @pytest.fixture
    def make_store(self) -> Callable[[], Store]:
        """Opens the place of this test, which is empty at first. Each call acts like another process: what one
        store reported, the others see."""
        raise NotImplementedError("supply the fixture make_store")

    def raw_write(self, store: Store, name: str, data: bytes) -> None:
        """Puts an object in place behind the store's back."""
        store.create(name, data)

    def raw_read(self, store: Store, name: str) -> bytes:
        """The bytes of an object as they lie there."""
        return store.read(name, size_max=1 << 30)

    @pytest.fixture
    def store(self, make_store: Callable[[], Store]) -> Store:
        return make_store()

    # The empty store

    def test_an_empty_store_lists_nothing_and_finds_nothing(self, store: Store) -> None:
        assert list(store.list("")) == []
        assert list(store.children("")) == []
        assert list(store.list("a/b")) == []
        assert list(store.children("a/b")) == []
        _assert_absent(store, "a")
        _assert_absent(store, "a/b/c")
        store.delete("a/b/c")

    def test_the_url_and_the_capabilities_are_there(self, store: Store) -> None:
        assert "://" in store.url
        assert isinstance(store.capabilities.durable, bool)
        assert isinstance(store.capabilities.create_if_absent, bool)

    # create

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300], ids=["empty", "one byte", "76800 bytes"])
    def test_a_created_object_is_read_back_by_everyone(self, make_store: Callable[[], Store], data: bytes) -> None:
        store = make_store()
        store.create("a/b", data)
        assert self.raw_read(store, "a/b") == data
        assert make_store().read("a/b", size_max=len(data)) == data
        assert make_store().size("a/b") == len(data)

    @pytest.mark.parametrize("convert", [bytearray, memoryview], ids=["bytearray", "memoryview"])
    def test_create_takes_any_buffer_and_lets_go_of_it(self, store: Store, convert: Callable[[bytes], Bytes]) -> None:
        store.create("a", convert(b"content"))
        assert self.raw_read(store, "a") == b"content"
        buffer = bytearray(b"before")
        store.create("b", buffer)
        buffer[:] = b"behind"
        assert self.raw_read(store, "b") == b"before"

    def test_create_does_not_touch_an_existing_object(self, make_store: Callable[[], Store]) -> None:
        store = make_store()
        self.raw_write(store, "a/b", b"first")
        for other in (store, make_store()):
            with pytest.raises(ObjectExists, match="a/b"):
                other.create("a/b", b"second, and longer")
        assert self.raw_read(store, "a/b") == b"first"

    def test_of_sixteen_threads_creating_one_name_exactly_one_wins(self, make_store: Callable[[], Store]) -> None:
        stores = [make_store(), make_store()]
        if not stores[0].capabilities.create_if_absent:
            pytest.skip("this store has no create-if-absent; one writer only")
        for number in range(8):
            name = f"decisions/{number}"
            contents = [bytes([65 + thread]) * (1000 + thread) for thread in range(16)]
            outcomes, seen = _race(stores, name, contents)
            winners = [thread for thread, outcome in outcomes.items() if outcome == "created"]
            assert sorted(outcomes.values()) == ["created"] + ["exists"] * 15
            assert set(seen) == {contents[winners[0]]}
            assert self.raw_read(stores[0], name) == contents[winners[0]]
        assert len(list(stores[0].list(""))) == 8

    # write

    def test_append_returns_the_offset_where_the_data_starts(self, make_store: Callable[[], Store]) -> None:
        store = make_store()
        writer = store.write("packs/p")
        assert writer.append(b"abc") == 0
        assert writer.append(b"") == 3
        assert writer.append(b"defgh") == 3
        assert writer.append(b"i") == 8
        assert writer.finish() == 9
        assert self.raw_read(store, "packs/p") == b"abcdefghi"
        assert make_store().size("packs/p") == 9

    def test_a_stream_without_bytes_is_an_empty_object(self, store: Store) -> None:
        assert store.write("a").finish() == 0
        assert store.size("a") == 0
        assert store.read("a", size_max=0) == b""
        assert [info.name for info in store.list("")] == ["a"]

    def test_large_pieces_arrive_whole(self, store: Store) -> None:
        pieces = [bytes([number]) * (5 * _BIG + number) for number in range(3)]
        writer = store.write("a")
        for piece in pieces:
            writer.append(piece)
        assert writer.finish() == sum(map(len, pieces))
        assert self.raw_read(store, "a") == b"".join(pieces)

    def test_many_small_pieces_arrive_in_order(self, store: Store) -> None:
        writer = store.write("a")
        for number in range(2000):
            assert writer.append(number.to_bytes(4, "little")) == 4 * number
        assert writer.finish() == 8000
        assert self.raw_read(store, "a") == b"".join(number.to_bytes(4, "little") for number in range(2000))

    def test_append_takes_any_buffer_which_may_be_reused_at_once(self, store: Store) -> None:
        writer = store.write("a")
        buffer = bytearray(_BIG)
        for number in range(4):
            buffer[:] = bytes([number]) * _BIG
            writer.append(buffer if number % 2 else memoryview(buffer))
        buffer[:] = b"\xff" * _BIG
        writer.append(memoryview(b"12345678").cast("I"))
        writer.finish()
        assert self.raw_read(store, "a") == b"".join(bytes([n]) * _BIG for n in range(4)) + b"12345678"

    def test_wherever_bytes_lie_and_wherever_they_go_they_arrive(self, store: Store) -> None:
        memory = _aligned_memory(200_000)
        memory[:] = (bytes(range(251)) * 1000)[: len(memory)]
        writer, content = store.write("a"), b""
        for phase in _PHASES:
            for address in _PHASES:
                content += memory[: -(len(content) - phase) % BLOCK_BYTES]
                writer.append(memory[: len(content) - writer.append(b"")])
                for size in (3 * BLOCK_BYTES, 70_000, 1, 0):
                    data = memory[address : address + size]
                    assert writer.append(data) == len(content)
                    content += data
        assert writer.finish() == len(content)
        assert self.raw_read(store, "a") == content
        for phase in _PHASES:
            for address in _PHASES:
                for offset, size in ((phase, 5000), (phase, 70_000), (len(content) - 81920 - phase, 81920 + phase)):
                    buffer = _aligned_memory(address + size + 1)
                    store.read_into("a", offset, buffer[address : address + size])
                    assert buffer[address : address + size] == content[offset : offset + size], (address, offset, size)
                    assert not any(buffer[:address])
                    assert not buffer[address + size]

    @pytest.mark.parametrize("expected", [0, 1, 3 * _BIG + 5, 40 * _BIG, 1 << 60])
    def test_more_or_fewer_bytes_than_expected_may_come(self, store: Store, expected: int) -> None:
        writer = store.write("a", bytes_expected=expected)
        for _ in range(3):
            writer.append(bytes([7]) * _BIG)
        writer.append(b"12345")
        assert writer.finish() == 3 * _BIG + 5
        assert self.raw_read(store, "a") == bytes([7]) * 3 * _BIG + b"12345"
        store.write("b", bytes_expected=expected).abandon()
        assert [info.name for info in store.list("")] == ["a"]

    def test_write_does_not_touch_an_existing_object(self, make_store: Callable[[], Store]) -> None:
        store = make_store()
        self.raw_write(store, "a/b", b"first")
        with pytest.raises(ObjectExists, match="a/b"):
            make_store().write("a/b")
        store.write("a/c").finish()
        with pytest.raises(ObjectExists, match="a/c"):
            store.write("a/c")
        with pytest.raises(ObjectExists, match="a/c"):
            store.create("a/c", b"x")
        assert self.raw_read(store, "a/b") == b"first"
        assert self.raw_read(store, "a/c") == b""

    def test_several_streams_do_not_mix(self, store: Store) -> None:
        def write(thread: int) -> None:
            writer = store.write(f"packs/{thread}")
            for _ in range(50):
                writer.append(bytes([thread]) * 1000)
            writer.finish()

        _run_threads(write, 8)
        for thread in range(8):
            assert self.raw_read(store, f"packs/{thread}") == bytes([thread]) * 50_000

    def test_an_abandoned_object_is_gone_and_its_name_free(self, store: Store) -> None:
        writer = store.write("a/b")
        writer.append(b"x" * 100)
        writer.abandon()
        writer.abandon()
        _assert_absent(store, "a/b")
        assert list(store.list("")) == []
        store.create("a/b", b"second")
        writer.abandon()
        assert self.raw_read(store, "a/b") == b"second"

    # read

    def test_read_refuses_objects_beyond_size_max(self, store: Store) -> None:
        self.raw_write(store, "a", b"12345")
        assert store.read("a", size_max=5) == b"12345"
        assert store.read("a", size_max=1 << 40) == b"12345"
        with pytest.raises(StorageError, match="a"):
            store.read("a", size_max=4)

    def test_read_into_fills_exactly_the_buffer(self, store: Store) -> None:
        data = bytes(range(256)) * 1000
        self.raw_write(store, "a", data)
        for offset, count in [(0, len(data)), (1, 1000), (len(data) - 1, 1), (0, 0), (len(data), 0)]:
            buffer = bytearray(b"\xee" * (count + 2))
            store.read_into("a", offset, memoryview(buffer)[1 : 1 + count])
            assert buffer == b"\xee" + data[offset : offset + count] + b"\xee"
        numbers = memoryview(bytearray(16)).cast("I")
        store.read_into("a", 4, numbers)
        assert bytes(numbers) == data[4:20]

    @pytest.mark.parametrize(("offset", "count"), [(0, 6), (4, 2), (5, 1), (6, 0), (1 << 40, 1)])
    def test_a_short_object_is_an_error_and_never_a_short_read(self, store: Store, offset: int, count: int) -> None:
        self.raw_write(store, "a", b"12345")
        with pytest.raises(StorageError, match="a") as caught:
            store.read_into("a", offset, memoryview(bytearray(count)))
        assert not isinstance(caught.value, ObjectNotFound)

    def test_a_negative_offset_is_the_callers_mistake(self, store: Store) -> None:
        self.raw_write(store, "a", b"12345")
        with pytest.raises(ValueError, match="offset"):
            store.read_into("a", -1, memoryview(bytearray(1)))

    def test_what_is_absent_is_not_found_and_named(self, store: Store) -> None:
        self.raw_write(store, "a/b", b"x")
        for name in ("a", "c", "a/c", "a/b/c"):
            _assert_absent(store, name)

    # children and list

    def test_children_are_the_distinct_next_components_sorted(self, store: Store) -> None:
        for name in ("a/d", "a/b/c", "a/b/b", "a-b", "e", "a/B"):
            self.raw_write(store, name, b"x")
        assert list(store.children("")) == ["a", "a-b", "e"]
        assert list(store.children("a")) == ["B", "b", "d"]
        assert list(store.children("a/b")) == ["b", "c"]
        assert list(store.children("a/d")) == []

    def test_list_gives_names_and_sizes_sorted_by_whole_name(self, store: Store) -> None:
        names = ["a/x", "a-b", "a.b", "a0", "a/b/c", "A", "b/z"]
        for number, name in enumerate(names):
            self.raw_write(store, name, b"x" * number)
        assert [info.name for info in store.list("")] == ["A", "a-b", "a.b", "a/b/c", "a/x", "a0", "b/z"]
        assert {info.name: info.size for info in store.list("")} == {name: n for n, name in enumerate(names)}

    def test_a_prefix_ends_at_a_component(self, store: Store) -> None:
        for name in ("ab/x", "a/x", "a/y/z", "b"):
            self.raw_write(store, name, b"x")
        assert [info.name for info in store.list("a")] == ["a/x", "a/y/z"]
        assert [info.name for info in store.list("a/y")] == ["a/y/z"]
        assert list(store.list("a/x")) == []
        assert list(store.children("a")) == ["x", "y"]
        assert list(store.children("b")) == []

    def test_what_was_reported_is_listed_by_everyone(self, make_store: Callable[[], Store]) -> None:
        store, other = make_store(), make_store()
        for number in range(20):
            store.create(f"c/{number:02}", b"x")
            writer = store.write(f"w/{number:02}")
            writer.append(b"xy")
            writer.finish()
            assert [info.name for info in other.list("c")] == [f"c/{n:02}" for n in range(number + 1)]
            assert [info.size for info in other.list("w")] == [2] * (number + 1)
            assert list(other.children("c")) == [f"{n:02}" for n in range(number + 1)]

    # delete

    def test_delete_removes_and_may_be_repeated(self, make_store: Callable[[], Store]) -> None:
        store = make_store()
        self.raw_write(store, "a/b", b"x")
        self.raw_write(store, "a/c", b"x")
        store.delete("a/b")
        store.delete("a/b")
        make_store().delete("a/b")
        store.delete("z/z")
        _assert_absent(store, "a/b")
        assert [info.name for info in store.list("")] == ["a/c"]
        store.delete("a/c")
        assert list(store.children("")) == []
        assert list(store.children("a")) == []

    # sweep

    def test_sweeping_leaves_every_object_and_what_is_being_written(self, store: Store) -> None:
        store.create("a/b", b"x")
        stream = store.write("p/q")
        stream.append(b"half")
        assert store.sweep(["a", "p", "z"]) == 0
        stream.append(b"whole")
        assert stream.finish() == 9
        assert [info.name for info in store.list("")] == ["a/b", "p/q"]

    # free_bytes

    def test_the_room_that_is_left_is_a_number_or_not_known(self, store: Store) -> None:
        for _ in range(2):  # of a place that does not exist yet, too
            free = store.free_bytes()
            assert free is None or free >= 0
            store.create("a", b"x") if not list(store.list("")) else None

    # Names

    @pytest.mark.parametrize("name", _BAD_NAMES, ids=lambda name: ascii(name)[1:30])
    def test_a_bad_name_is_refused_by_every_method(self, store: Store, name: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.create(name, b"x"),
            lambda: store.write(name),
            lambda: store.read(name, size_max=1),
            lambda: store.read_into(name, 0, memoryview(bytearray(1))),
            lambda: store.size(name),
            lambda: store.delete(name),
        ]
        if name:
            calls += [lambda: list(store.list(name)), lambda: list(store.children(name))]
        for call in calls:
            with pytest.raises(ValueError):  # noqa: PT011 - the contract fixes no message
                call()
        assert list(store.list("")) == []

    @pytest.mark.parametrize("name", _GOOD_NAMES, ids=lambda name: name[:30])
    def test_a_good_name_is_taken_as_it_is(self, store: Store, name: str) -> None:
        store.create(name, b"x")
        assert [info.name for info in store.list("")] == [name]
        assert store.read(name, size_max=1) == b"x"
        assert list(store.children("")) == [name.partition("/")[0]]

    def test_names_differing_in_case_are_different(self, store: Store) -> None:
        store.create("a", b"lower")
        store.create("A", b"upper")
        assert store.read("a", size_max=5) == b"lower"


def _aligned_memory(size: int) -> memoryview:
    """Zeros, at an address that is a multiple of ``BLOCK_BYTES``."""
    return memoryview(mmap.mmap(-1, size))


def _assert_absent(store: Store, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.read(name, size_max=1),
        lambda: store.read_into(name, 0, memoryview(bytearray(1))),
        lambda: store.size(name),
    ]
    for call in calls:
        with pytest.raises(ObjectNotFound, match=name):
            call()


def _race(stores: list[Store], name: str, contents: list[bytes]) -> tuple[dict[int, str], list[bytes]]:
    """What came of each thread's create, and what each thread saw right afterwards, winner or not."""
    start = threading.Barrier(len(contents))
    outcomes: dict[int, str] = {}
    seen: list[bytes] = []

    def compete(thread: int) -> None:
        store = stores[thread % len(stores)]
        start.wait(30)
        try:
            store.create(name, contents[thread])
            outcomes[thread] = "created"
        except ObjectExists:
            outcomes[thread] = "exists"
        seen.append(store.read(name, size_max=10_000))

    _run_threads(compete, len(contents))
    return outcomes, seen


def _run_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(thread: int) -> None:
        try:
            work(thread)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(thread,), daemon=True) for thread in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a store call did not return within 60 s"
    if errors:
        raise errors[0]
