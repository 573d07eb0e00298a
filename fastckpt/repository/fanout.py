"""Reading each byte once in the whole job: how the nodes agree who reads what several of them want, and pass it on.

agree  the leader of each node says what its ranks want; the coordinator deals out what several nodes want
pass   a rank reads its runs for all these nodes; of each other node one rank fetches them, for the others there
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fastckpt.errors import RestoreError
from fastckpt.group import Assembly, Deadline, Reply, checked
from fastckpt.plan.relay_plan import Fanout, Portion, Sizes, Wanted, all_wanted, plan_fanout
from fastckpt.repository.peers import TOKEN_BYTES, Client, RunName, Server
from fastckpt.topology.topology import Tree

Address = tuple[str, int]
"""Host and port."""


class _NodeLine(msgspec.Struct, array_like=True, frozen=True):
    """What the ranks of a node want, as the coordinator hears of it."""

    wanted: Wanted
    addresses: dict[int, Address]
    problem: str
    """Why the node can neither give nor take anything."""


class FanoutAnswer(msgspec.Struct, array_like=True, frozen=True):
    """What the coordinator tells all leaders."""

    fanout: Fanout = Fanout([], [])
    addresses: dict[int, Address] = {}
    """Of the ranks that read for other nodes."""
    token: bytes = b""
    problem: str = ""


class NodeFanout(msgspec.Struct, array_like=True, frozen=True):
    """What of it the ranks of one node need."""

    others: list[tuple[int, ...]] = []
    """Sets of other nodes for which something is read here."""
    carried: dict[int, int] = {}
    """For each portion that is read here for other nodes, by its position in ``Fanout.carried``, which of these."""
    addresses: dict[int, Address] = {}
    """Of the ranks from which something is fetched here."""
    token: bytes = b""

    @property
    def is_needed(self) -> bool:
        return bool(self.carried or self.addresses)


def for_node(answer: FanoutAnswer, node: int, portions: Iterable[Portion]) -> NodeFanout:
    """``portions``: of this node."""
    places: dict[int, int] = {}
    carried = {}
    addresses = {}
    for portion in portions:
        if portion.source >= 0:
            addresses[portion.source] = answer.addresses[portion.source]
        elif portion.carried >= 0:
            nodes = answer.fanout.carried[portion.carried].nodes
            carried[portion.carried] = places.setdefault(nodes, len(places))
    others = [tuple(other for other in answer.fanout.nodes[nodes] if other != node) for nodes in places]
    return NodeFanout(others, carried, addresses, answer.token)


@dataclass(frozen=True)
class JobFanout:
    """What it takes for nodes to read for each other."""

    assembly: Assembly
    tree: Tree | None
    """By which ranks reach the storage; on the coordinator."""
    ending: contextlib.ExitStack
    """What outlasts the reading, until all ranks have ended theirs: a rank that has failed still answers."""

    @property
    def node(self) -> int:
        """This rank's."""
        group = self.assembly.group
        return group.nodes[group.rank]

    def ranks_of_nodes(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rank, node in enumerate(self.assembly.group.nodes):
            found.setdefault(node, []).append(rank)
        return found

    def agree(self, name: str, line: Reply, sizes: Sizes, until: Deadline) -> FanoutAnswer:
        """On the leader of each node, with its ``node_line`` or what keeps it from having one, which all then raise."""

        def deal(replies: Mapping[int, Reply]) -> bytes:
            nodes = self.assembly.group.nodes
            lines = {
                nodes[leader]: msgspec.msgpack.decode(data, type=_NodeLine) for leader, data in checked(replies).items()
            }
            assert self.tree is not None, "the coordinator has it"
            problem = next((line.problem for line in lines.values() if line.problem), "")
            if problem:
                return msgspec.msgpack.encode(FanoutAnswer(problem=problem))
            wanted = {node: line.wanted for node, line in lines.items()}
            fanout = plan_fanout(wanted, self.ranks_of_nodes(), sizes, self.tree)
            readers = {carried.reader for carried in fanout.carried}
            addresses = {
                rank: address for line in lines.values() for rank, address in line.addresses.items() if rank in readers
            }
            return msgspec.msgpack.encode(FanoutAnswer(fanout, addresses, secrets.token_bytes(TOKEN_BYTES)))

        answer = self.assembly.group.exchange(
            name, line, deal, members=self.assembly.leaders, until=until, what="all nodes to restore"
        )
        return msgspec.msgpack.decode(answer, type=FanoutAnswer)


def node_line(wanted: Mapping[int, Wanted], addresses: Mapping[int, Address], problem: str, sizes: Sizes) -> bytes:
    """What the leader of a node tells the coordinator of its ranks."""
    return msgspec.msgpack.encode(_NodeLine(all_wanted(wanted, sizes), dict(addresses), problem))


class FanoutEnd:
    """One rank's end of what nodes pass to each other in a restore. Any thread may call."""

    def __init__(
        self, job: JobFanout, answer: NodeFanout, server: Server, read: Iterable[RunName], seconds_max: float
    ) -> None:
        """``read``: the runs that this rank reads for other nodes. ``RestoreError`` if no thread is to be had."""
        self._ranks = job.ranks_of_nodes()
        self._others = {name: answer.others[answer.carried[name.portion]] for name in read}
        self._server = server
        self._client = Client(answer.addresses, answer.token, job.assembly.group.rank, job.node, seconds_max)
        try:
            self._server.start(answer.token, self._others.values())
        except RuntimeError as error:
            raise RestoreError(
                f"cannot serve other nodes: {error}; raise the limits that the job runs under"
            ) from error

    def publish(self, name: RunName, views: Sequence[memoryview]) -> None:
        """A run has been read: the other nodes may fetch it from these buffers, until ``is_out``."""
        self._server.publish(name, views, self._others[name])

    def is_out(self, name: RunName) -> bool:
        """Whether all other nodes have fetched a published run."""
        return self._server.is_out(name)

    def fetching(self, source: int, name: RunName) -> Callable[[Sequence[memoryview]], None]:
        """What fills buffers with the bytes of a run that another rank reads."""
        return lambda views: self._client.fetch(source, name, views)

    @property
    def finished(self) -> bool:
        """Whether the other nodes have fetched all that they are to fetch here."""
        return self._server.finished

    def check(self) -> None:
        """``CommitTimeout`` if a rank that has yet to fetch something here was lost, or has given up."""
        self._server.check()

    @property
    def answers(self) -> int:
        """Runs that were given away so far."""
        return self._server.answers

    def late_ranks(self) -> list[int]:
        """Who has not fetched what is there: of each such node the rank that asked for runs, or all if none did."""
        late = self._server.late.items()
        return [rank for node, asked in late for rank in (self._ranks[node] if asked is None else [asked])]

    def give_up(self, blamed: int) -> None:
        """Tells the others that nothing more will come or be fetched, because of a rank."""
        self._server.give_up(blamed)
        self._client.give_up(blamed)

    def close(self) -> None:
        """All is fetched."""
        self._client.close()
