"""What users hold: the Checkpointer of a training loop."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import operator
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, SupportsIndex

from fastckpt.agreement import Agreed, Attempt
from fastckpt.buffers import Pool
from fastckpt.errors import (
    FastckptError,
    LimitExceeded,
    RestoreError,
    SaveError,
    SnapshotDamaged,
    SnapshotExists,
    SnapshotNotFound,
)
from fastckpt.format.decision import STEP_MAX, check_labels
from fastckpt.group import Group, as_told
from fastckpt.job.environment import environment
from fastckpt.job.group import job_group, next_group_number
from fastckpt.job.memory import StagingMemory
from fastckpt.job.optimizer import broken_step_hook_reason
from fastckpt.job.profile import profile_range
from fastckpt.job.staging import Fence, Staging
from fastckpt.job.state import Describer, first_mesh
from fastckpt.job.targets import Targets
from fastckpt.options import Options
from fastckpt.pending import Pending, Work
from fastckpt.plan.restore_plan import Selection
from fastckpt.repository import drift, repository
from fastckpt.repository.reader import Snapshot
from fastckpt.request import Request, checked_request
from fastckpt.restore import Restores
from fastckpt.save import Labels, Saves
from fastckpt.storage.deadline import DeadlineStore
from fastckpt.storage.open import open_store
from fastckpt.topology.offer import Given, TopologySource
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

CLOSE_SECONDS_AFTER_ERROR = 60.0
STORAGE_SECONDS_SHARE = 0.75
"""A rank waits for its storage a little less long than the others wait for it: it must be able to say what is wrong."""


class Closable(Protocol):
    """What ends with a Checkpointer."""

    def restored(self, state: Mapping[str, Any], step: int) -> None:
        """``state`` is that of ``step`` now."""

    def close(self) -> None:
        """Waits for no save."""


class Checkpointer:
    """Saves and restores the state of a training job.

    Every rank makes one, in the same order, and makes the same calls; one thread a rank. Use it in a ``with`` block:
    leaving it waits for the last commit.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        options: Options | None = None,
        topology: TopologySource = None,
        create: bool = True,
    ) -> None:
        """``url``: a path, ``file:///...`` or ``memory://name``. The repository is made by the first save.

        ``topology``: by which nodes, supernodes and gateways ranks reach the storage, and what those carry: every rank
        gives the same ``Topology``, or its own ``RankPath``, or a function that returns it, or None. The function is
        called once, without arguments, in the first ``save`` or ``prepare``, or the first ``restore`` that reads once
        in the job, on the thread that calls those. ``TopologyError`` there, on every rank at once, naming the ranks:
        if they do not agree, if the function raises, or if what one has is of another type. Without a topology, all
        ranks count as equally fast.

        ``RepositoryNotFound`` if there is something else at ``url``, or nothing and ``create`` is False;
        ``RuntimeError`` if this is one of several ranks but ``torch.distributed`` has no process group.
        """
        self._options = options or Options()
        number = next_group_number()  # before anything can fail on one rank only
        seconds_max = self._options.commit_seconds_max
        self._store = DeadlineStore.opened(url, seconds_max * STORAGE_SECONDS_SHARE, open_store)
        if not repository.exists(self._store) and not create:
            repository.Repository(self._store)  # raises, saying what is there
        self._group = job_group(seconds_max, number)
        given = Given(topology)
        self._saves = Saves(self._store, self._group, self._options, given)
        fanout = self._options.read_fanout
        self._restores = Restores(self._store, self._group, seconds_max, read_fanout=fanout, topology=given)
        self._pending: Pending | None = None
        self._describer = Describer(self._options.copy)
        self._staging: Staging | None = None
        self._work: Work | None = None
        self._failed: list[Pending] = []
        on_node = sum(node == self._group.nodes[self._group.rank] for node in self._group.nodes)
        self._memory = StagingMemory(self._options.staging_bytes_max, on_node)
        self._is_wanted = False
        """Whether a save is not to wait for memory to be backed any longer. No Event: an interrupt inside of one may
        leave its lock held, and then whoever comes next waits for ever."""
        self._steps: set[int] = set()
        self._cleaner: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._restored: Snapshot | None = None
        self._closed = False
        self._callbacks: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._callback_count = 0
        self._process = os.getpid()
        self._fence = Fence(self._hold_step) if self._options.fence == "hook" else None
        _open.add(self)

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def group(self) -> Group:
        """The ranks that save together, as this one sees them. Any thread may speak through it, under names of its own:
        this is what policies such as ``Callback`` agree by."""
        return self._group

    def add_callback(self, callback: Closable) -> int:
        """Has ``close`` close ``callback`` too, if it still exists. Returns its number, which ranks that add theirs in
        the same order have in common."""
        self._callbacks.add(callback)
        self._callback_count += 1
        return self._callback_count

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None, note: str = ""
    ) -> Pending:
        """Starts saving ``state`` as the snapshot of ``step`` and returns; the rest happens behind the training loop.

        Parameters and optimizer state are read until the next ``Optimizer.step``, which waits for that; everything else
        in the state is copied before this returns. ``SnapshotExists`` if this writer has saved the step before,
        ``ValueError`` or ``TypeError`` naming keys that cannot be saved. The first save, and one whose layout is new,
        meets the other ranks before it returns. What an earlier save failed with is raised here too, once this one has
        been started: it goes on, as ``self.pending``.
        """
        self._check_open()
        self._hold_step()  # what the save before is still reading must not be waited for without limit here either
        self._release()
        pending = Pending(step, self._new_trace())
        with _raising(SaveError, f"step {step}"), pending._trace.span("return"):
            self._start(pending, state, metrics, note)
        # Only now: ranks learn of a failure at different moments, and must start the same saves all the same.
        self._raise_earlier(than=pending)
        return pending

    def _start(
        self, pending: Pending, state: Mapping[str, Any], metrics: Mapping[str, float] | None, note: str
    ) -> None:
        """The part of a save that happens in the call."""
        labels = Labels()
        offered: Staging | BaseException
        # Whatever is wrong on this rank alone is told to all: a rank that stayed away would be waited for.
        try:
            self._check_whole()
            step = pending.step = _checked_step(pending.step)
            if not isinstance(state, Mapping):
                raise TypeError(
                    f"the state is a dict of names, such as {{'model': model}}, not a {type(state).__name__}"
                )
            labels.metrics = {name: _checked_metric(name, number) for name, number in (metrics or {}).items()}
            if not isinstance(note, str):
                raise TypeError(f"the note is a string, not {note!r}")
            labels.note = note
            try:
                check_labels(step, dict(labels.metrics), labels.note)
            except LimitExceeded as error:
                raise ValueError(str(error)) from None
            if step in self._steps:
                self._join()  # it may be about to fail, and then may be tried again
            if step in self._steps:
                raise SnapshotExists(f"{self.url}: this job has saved step {step} already; save each step once")
            with pending._trace.span("describe"):
                description = self._describer.describe(state)
                offered = Staging(description)
            copy = self._options.fence == "copy" or broken_step_hook_reason(description.optimizers) is not None
        except Exception as error:
            offered, copy = error, False
        attempt: Attempt | None = None
        if isinstance(offered, BaseException) or not self._saves.expects(offered):
            self._join()
            attempt = self._saves.agree(pending.step, offered, pending._trace)
        assert isinstance(offered, Staging)
        if self._group.rank == 0:
            labels.environment = environment(
                mesh=offered.mesh, hosts=self._options.record_hosts, nodes=self._group.nodes
            )
        self._steps.add(pending.step)
        self._is_wanted = True
        work = Work("fastckpt-save", functools.partial(self._run, pending, offered, attempt, labels, self._work))
        try:
            self._pending, self._staging, self._work = pending, offered, work
            work.start()
        except BaseException:  # an interrupt: what may be waited for from now on must come to its end
            work.start()
            raise
        if copy:
            self._hold_step()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Meets the other ranks now for what the first save of ``state`` would need them for, and has the system back
        the staging memory, behind the training loop: the first save then costs no more than those that follow. Writes
        nothing. All ranks call it, if any does. ``ValueError`` or ``TypeError`` naming keys that cannot be saved.
        """
        self._check_open()
        self._hold_step()
        self._release()
        offered: Staging | BaseException
        try:
            offered = Staging(self._describer.describe(state))
        except Exception as error:
            offered = error
        self._join()
        with _raising(SaveError, self.url):
            agreed = self._saves.prepare(offered)
        assert isinstance(offered, Staging)
        devices = offered.devices
        offered.release()
        self._is_wanted = False
        work = Work("fastckpt-prepare", functools.partial(self._fault, agreed, devices))
        try:
            self._work = work
            work.start()
        except BaseException:  # an interrupt: what is waited for from now on must come to its end
            work.start()
            raise

    def _fault(self, agreed: Agreed, devices: Iterable[Any]) -> None:
        with contextlib.suppress(FastckptError, MemoryError):  # which the save meets again
            self._pool(agreed, devices).fault(lambda: self._is_wanted)

    def _run(
        self,
        pending: Pending,
        staging: Staging,
        attempt: Attempt | None,
        labels: Labels,
        before: Work | None,
    ) -> None:
        """The part of a save that happens behind the training loop."""
        try:
            with _raising(SaveError, f"step {pending.step}"):
                if before is not None:
                    before.join()
                if attempt is None:
                    attempt = self._saves.agree(pending.step, staging, pending._trace)
                written: Any
                try:
                    pool = self._pool(attempt.agreed, staging.devices)
                    written = self._saves.write(attempt, staging, pool, pending._trace, lambda: pending._mark("staged"))
                    pending._mark("written")
                except Exception as error:
                    written = error
                pending._staged.set()
                staging.release()
                live = self._saves.commit(attempt, written, staging.values, labels, pending._trace)
                pending._snapshot = Snapshot(self._store, live)
                pending._trace.add_since_start("committed")
        except BaseException as error:
            self._steps.discard(pending.step)
            self._failed.append(pending)
            pending._finish(error)
            return
        pending._finish(None)
        self._log_commit(pending)
        if self._cleaner is None:
            cleaner = threading.Thread(target=self._clean, name="fastckpt-clean", daemon=True)
            with contextlib.suppress(RuntimeError, MemoryError):  # the next save tries again
                cleaner.start()
                self._cleaner = cleaner

    def _pool(self, agreed: Agreed, devices: Iterable[Any]) -> Pool:
        # A call to the storage that was left behind may be reading its buffer still.
        return self._memory.pool(agreed.pool_bytes, devices, in_use=self._store.busy)

    def _log_commit(self, pending: Pending) -> None:
        if self._group.rank == 0:
            seconds = pending.counters["committed_seconds"]
            log.info(
                "%s: committed step %d: %d bytes in %.3f s", self.url, pending.step, pending.snapshot.bytes, seconds
            )

    def _clean(self) -> None:
        """Once a job: removes what dead attempts of earlier jobs left behind."""
        try:
            self._saves.clean()
        except (FastckptError, MemoryError) as error:  # harmless, and the next job tries again
            log.warning("%s: could not remove what earlier attempts left behind: %s", self.url, error)

    def _hold_step(self) -> None:
        """The fence: waits until what is being saved has been read, or gives the attempt up."""
        pending = self._pending
        if pending is None or pending._staged.is_set() or os.getpid() != self._process:
            return  # a forked child has the tensors but not the threads that read them
        with pending._trace.span("fence"):
            if not pending._staged.wait(self._options.fence_seconds_max):
                self._give_up(pending)

    def _new_trace(self) -> Trace:
        rank = self._group.rank
        return Trace(rank, self._group.nodes[rank], profile_range)

    def _give_up(self, pending: Pending) -> None:
        """Ends the reading of live tensors, so that training may go on."""
        log.warning(
            "%s: step %d is given up: it was not staged within fence_seconds_max=%.0f s",
            self.url,
            pending.step,
            self._options.fence_seconds_max,
        )
        staging = self._staging
        if staging is not None:
            staging.give_up()
        self._memory.cancel()  # staging may be waiting for a buffer
        pending._staged.set()

    @property
    def pending(self) -> Pending | None:
        """The last save, if there was one."""
        return self._pending

    def wait_staged(self, timeout: float | None = None) -> None:
        """Waits until no live tensor is being read; then anything in the state may be changed by any means."""
        if self._pending is not None:
            self._pending.wait_staged(timeout)

    def restore(
        self,
        state: dict[str, Any],
        step: int | None = None,
        *,
        only: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        missing: Literal["raise", "keep"] = "raise",
        cast: bool = False,
        policy: Literal["strict", "previous"] = "strict",
    ) -> int | None:
        """Restores ``state`` in place from the newest snapshot, or that of ``step``; returns its step, or None if there
        is no snapshot yet (an explicit step then is ``SnapshotNotFound``). All ranks call it; all restore the same
        snapshot or all raise. The newest is the last one with every key that rank 0 asks for, but for what optimizers
        keep; if none has them all, the last one. The log names those passed over.

        ``state`` may name part of what was saved. What one rank has no place for, another may have, as in a pipeline.
        ``only``: globs of names to restore, each with all that is below it; an optimizer comes whole or not at all.
        ``rename``: prefixes of saved names to prefixes of names in the state. ``missing="keep"`` leaves alone what the
        snapshot has not. ``cast`` converts dtypes. ``policy="previous"`` goes on with the snapshot before where one
        proves to be damaged.

        ``StateMismatch`` lists everything that does not fit, before anything is changed; ``SnapshotDamaged`` names key,
        shard, object and offset: then part of the state holds new values, and saving is refused until a restore
        succeeds. What differs from the environment of the snapshot is logged by rank 0, with its severity
        (``repository/drift.py``): as a warning if it may change what training computes.
        """
        self._check_open()
        self._restored = None
        trace = self._new_trace()
        with _raising(RestoreError, self.url), trace.span("restore"):
            snapshot = self._restore(trace, state, step, only, rename, missing, cast, policy)
        trace.end()
        if snapshot is None:
            return None
        self._restored = Snapshot(self._store, snapshot.live, trace)  # without the metadata that was read
        return snapshot.step

    @property
    def restored(self) -> Snapshot | None:
        """What the last ``restore`` restored; None before, if it found none, or if it failed. Its ``counters`` and
        ``timeline()`` tell of that restore on this rank, and not of what is read through it later."""
        return self._restored

    def _restore(
        self,
        trace: Trace,
        state: dict[str, Any],
        step: int | None,
        only: Sequence[str],
        rename: Mapping[str, str] | None,
        missing: str,
        cast: bool,
        policy: str,
    ) -> Snapshot | None:
        self._join()
        request: Request | None = None
        problem: Exception | None = None
        try:
            if step is not None:
                step = _checked_step(step)
            request = checked_request(state, only, rename, missing, cast, policy)
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        names, selection = ([], Selection()) if request is None else (request.names, request.selection)
        before: int | None = None
        damage: SnapshotDamaged | None = None
        while True:
            with trace.span("choose"):
                snapshot = self._restores.choose(
                    step, names, selection, before=before, or_earlier=policy == "previous", problem=problem, trace=trace
                )
            if snapshot is None:
                if damage is not None:
                    raise damage  # there is none before it: starting afresh is not for us to decide
                if step is not None:
                    raise SnapshotNotFound(
                        f"{self.url}: no snapshot of step {step}: there is none at all. Is the URL right?"
                    )
                if self._group.rank == 0:
                    log.warning("no snapshot in %s, starting at 1", self.url)
                return None
            try:
                assert request is not None, "a problem is raised by choosing"
                self._restore_from(snapshot, request)
            except SnapshotDamaged as error:
                if policy == "strict":
                    raise
                log.warning("%s: step %d is damaged, going on with the one before: %s", self.url, snapshot.step, error)
                step, before, damage = None, snapshot.live.decision, error
                continue
            # Steps beyond are no longer this run's past: it may come to them again.
            self._steps = {saved for saved in self._steps if saved <= snapshot.step}
            for callback in list(self._callbacks):
                callback.restored(state, snapshot.step)
            if self._group.rank == 0:
                self._log_drift(snapshot, state)
            return snapshot

    def _restore_from(self, snapshot: Snapshot, request: Request) -> None:
        rank, size = self._group.rank, self._group.size
        with snapshot.trace.span("plan"):
            targets = self._restores.all_fit(snapshot, request.selection, lambda: request.targets(snapshot, rank, size))
        self._broken = RestoreError("a restore did not finish: part of the state holds new values, part old ones")
        self._restores.all_read(lambda: self._read(snapshot, targets))
        self._broken = None

    def _read(self, snapshot: Snapshot, targets: Targets) -> None:
        with self._restores.reading(snapshot, targets.wants) as read_into:
            for install in targets.install:
                install()
            read_into(targets.sinks)
        for apply in targets.apply:
            apply()

    def _log_drift(self, snapshot: Snapshot, state: Mapping[str, Any]) -> None:
        """Says what differs from the environment that the snapshot was saved in."""
        mesh = first_mesh(state)
        now = environment(mesh=mesh, hosts=self._options.record_hosts, nodes=self._group.nodes)
        for severity, text in drift.describe(drift.differences(snapshot.environment, now)):
            level = logging.INFO if severity == "info" else logging.WARNING
            log.log(level, "%s: since step %d was saved (%s): %s", self.url, snapshot.step, severity, text)

    def snapshots(self) -> list[Snapshot]:
        """The snapshots in the repository, as this rank sees them now, oldest first."""
        return repository.Repository(self._store).snapshots() if repository.exists(self._store) else []

    def close(self, timeout: float | None = None) -> None:
        """Waits for the last commit and raises what it failed with, or an earlier one that nobody has been told of; of
        several failures the oldest, with the others in its ``__notes__``. May be called again. ``TimeoutError`` after
        ``timeout`` seconds; the save then goes on behind. In a forked child it waits for nothing."""
        self._closed = True
        if self._process != os.getpid():
            return  # the save, its threads and what it fails with are the parent's
        for callback in list(self._callbacks):
            callback.close()
        if self._pending is not None and not self._pending._finished.wait(timeout):
            raise TimeoutError(
                f"step {self._pending.step} was not committed within {timeout} s; it goes on: close it again"
            )
        self._join()
        if self._fence is not None:  # not before: what is being staged needs it to the end
            self._fence.close()
        if self._cleaner is not None:
            self._cleaner.join(timeout)
        self._release()
        self._memory.close()
        self._raise_earlier()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(CLOSE_SECONDS_AFTER_ERROR)
        except Exception as second:  # the first error is what the user must see; this one comes with it
            notes = getattr(second, "__notes__", ())
            for note in (f"fastckpt: the last save did not get through either: {_line(second)}", *notes):
                error.add_note(note)

    def _release(self) -> None:
        """Lets go of the copies of what was saved, once nothing is read any more."""
        if self._pending is None or self._pending._staged.is_set():
            self._staging = None

    def _check_open(self) -> None:
        if self._closed:
            raise SaveError(f"{self.url}: this Checkpointer is closed; make a new one")
        if self._process != os.getpid():
            raise SaveError(f"{self.url}: this Checkpointer is of the process that forked this one; make a new one")

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise SaveError(
                f"{self.url}: not saving: {self._broken}. Restore successfully first, or make a new Checkpointer"
            ) from self._broken

    def _raise_earlier(self, than: Pending | None = None) -> None:
        """Raises what saves (those before ``than``) failed with, unless their ``wait`` already did: each failure once;
        of several the oldest, with the others in its notes."""
        errors: list[BaseException] = []
        # One that is about to be done has no error yet, and stays for the next call.
        for pending in [failed for failed in self._failed if failed is not than and failed.done]:
            self._failed.remove(pending)
            if not pending._raised and pending.error is not None:
                pending._raised = True
                errors.append(pending.error)
                if len(errors) > 1:
                    errors[0].add_note(f"fastckpt: step {pending.step} was not saved either: {_line(pending.error)}")
        if errors:
            raise errors[0]

    def _join(self) -> None:
        self._is_wanted = True
        if self._work is not None and os.getpid() == self._process:  # a forked child has not the threads that do it
            self._work.join()

    def _wait_at_exit(self) -> None:
        if self._process != os.getpid():
            return
        pending = self._pending
        if pending is not None and not pending.done:
            log.warning("%s: waiting for the last save; close the Checkpointer to see how it ends", self.url)
            pending._finished.wait(CLOSE_SECONDS_AFTER_ERROR)
        for failed in self._failed:
            if not failed._raised:
                log.error("%s: step %d was not saved: %s", self.url, failed.step, failed.error)


@contextlib.contextmanager
def _raising(kind: type[FastckptError], what: str) -> Iterator[None]:
    """Raises errors of other kinds than ours and wrong arguments' as ``kind``, on the rank that failed as on others."""
    try:
        yield
    except Exception as error:
        told = as_told(error)
        if type(told) is not FastckptError:
            raise
        raise kind(f"{what}: {told}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _checked_metric(name: object, number: object) -> float:
    if not isinstance(name, str):
        raise TypeError(f"names of metrics are strings, not {name!r}")
    try:
        return float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"metric {name!r} is no number: {error}") from error


def _checked_step(step: object) -> int:
    if isinstance(step, bool) or not isinstance(step, SupportsIndex):
        raise TypeError(f"step is a number of training steps, not {step!r}")
    number = operator.index(step)
    if not 0 <= number <= STEP_MAX:
        raise ValueError(f"step {number} is not between 0 and 2**53")
    return number


_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()
"""Those that have not been collected. One handler for all: each that is registered stays as long as the process."""


@atexit.register
def _wait_at_exit() -> None:
    """Daemon threads die with the interpreter; a save that was started is given a minute to get through."""
    for checkpointer in list(_open):
        checkpointer._wait_at_exit()
