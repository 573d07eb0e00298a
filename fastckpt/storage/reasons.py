"""What a system's error number means for a store: which error it becomes, whether trying again may help, what to do."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from fastckpt.errors import OutOfSpace, StorageError


@dataclass(frozen=True)
class Reason:
    advice: str
    """What to look at or change, read after the system's own words."""
    transient: bool = False
    kind: type[StorageError] = StorageError


_NETWORK = Reason("the storage behind it did not answer: look at its server and at the network", transient=True)
_DESCRIPTORS = "raise `ulimit -n`, or close files: data loader workers hold many"
_PERMISSION = "look at the owner and mode of the directory, and as which user this process runs"

REASONS: dict[int, Reason] = {
    errno.ENOSPC: Reason("free space there, or use another place", kind=OutOfSpace),
    errno.EDQUOT: Reason("free space there, or have the quota of this user or project raised", kind=OutOfSpace),
    errno.EFBIG: Reason("a file may not grow that large: raise `ulimit -f`, or use a file system that allows it"),
    # Not transient: after it a page may be marked clean, so a second try may succeed with the bytes lost.
    errno.EIO: Reason("the device failed: look at the kernel log; a file that was being written is given up"),
    errno.EROFS: Reason("it is mounted read-only, perhaps since an error: look at the kernel log, then remount it"),
    errno.EACCES: Reason(_PERMISSION, transient=True),
    errno.EPERM: Reason(_PERMISSION + "; the file system may also forbid it (an immutable directory)", transient=True),
    errno.ENOTDIR: Reason("a file is where a directory should be: move it away, or use another place"),
    errno.ENAMETOOLONG: Reason("the path is too long for the file system: use a shorter one"),
    errno.ENODEV: Reason("the device is gone: look at the kernel log, then mount it again", transient=True),
    errno.ENXIO: Reason("the device is gone: look at the kernel log, then mount it again", transient=True),
    errno.ENOTCONN: Reason("the process that serves this file system is gone: mount it again", transient=True),
    errno.ENOENT: Reason("somebody removes directories there: nothing else may clean up in it", transient=True),
    errno.EMFILE: Reason(_DESCRIPTORS, transient=True),
    errno.ENFILE: Reason("the whole machine has too many files open: raise the sysctl fs.file-max", transient=True),
    errno.ENOMEM: Reason("the machine, or this job's memory limit, has no memory left for it", transient=True),
    errno.ENOBUFS: Reason("the machine has no memory left for it", transient=True),
    errno.ESTALE: Reason("the file server has forgotten the directory: if that lasts, mount it again", transient=True),
    errno.EBUSY: Reason("somebody else is using it", transient=True),
    errno.EAGAIN: Reason("the system asks to try again later", transient=True),
    errno.EINTR: Reason("a signal interrupted it", transient=True),
    errno.ETIMEDOUT: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ECONNREFUSED: _NETWORK,
    errno.ENETDOWN: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
}


def storage_error(what: str, error: OSError, details: str = "") -> StorageError:
    """The error to raise: ``what`` could not be done, the system's words, ``details`` and what to do about it. An error
    without a number is one of our own: it says all there is to say."""
    reason = REASONS.get(error.errno or 0, Reason(""))
    parts = [f"{what}: {error.strerror or error}", details, reason.advice]
    return reason.kind("; ".join(part for part in parts if part), transient=reason.transient)
