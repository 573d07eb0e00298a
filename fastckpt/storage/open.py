"""From a URL to a store."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

from fastckpt.errors import RepositoryNotFound
from fastckpt.storage.local import LocalStore
from fastckpt.storage.memory import memory_store
from fastckpt.storage.store import Store

_SUPPORTED = "this version of fastckpt opens file:///absolute/path, memory://name and plain paths"


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at ``url``: ``file:///absolute/path`` (percent-decoded), ``memory://name``, or a plain path, absolute
    or relative to the working directory of now. Nothing is read or created.

    ``RepositoryNotFound`` for a file where a directory should be, ``ValueError`` for anything else. Its message never
    repeats the URL, which may hold a secret.
    """
    url = os.fspath(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        if url.startswith("~"):
            raise ValueError("a path that starts with ~ is not expanded here; expand it, or write ./~ if you mean it")
        if url.lower().startswith(("file:", "memory:")):
            raise ValueError(f"the URL lacks '//' after its scheme; {_SUPPORTED}")
        return _local(url)
    scheme = scheme.lower()
    if scheme not in ("file", "memory"):
        # Only what looks like a scheme is repeated: user:password@host://x does not.
        named = f"scheme {scheme!r}" if re.fullmatch(r"[a-z][a-z0-9+.-]{0,15}", scheme) else "such a URL"
        raise ValueError(f"no store for {named}; {_SUPPORTED}")
    if "?" in rest or "#" in rest:
        raise ValueError(f"a {scheme} URL takes no query or fragment; in a path write %3F for ? and %23 for #")
    host, slash, path = rest.partition("/")
    if "@" in host:
        raise ValueError(f"a {scheme} URL takes no user or password")
    if scheme == "memory":
        try:
            return memory_store(rest)
        except ValueError:
            raise ValueError(f"memory://name needs a name made of A-Z a-z 0-9 . _ - and /; {_SUPPORTED}") from None
    if host.lower() not in ("", "localhost"):
        raise ValueError(f"a file URL names no other host: write file:///absolute/path; {_SUPPORTED}")
    if not slash:
        raise ValueError(f"the file URL has no path; {_SUPPORTED}")
    if re.search("%(?![0-9A-Fa-f]{2})", path):
        raise ValueError("a % in the file URL is not followed by two hexadecimal digits; write %25 for %")
    return _local("/" + os.fsdecode(unquote_to_bytes(path)))


def _local(path: str) -> LocalStore:
    if os.path.exists(path) and not os.path.isdir(path):
        raise RepositoryNotFound(f"{path} is a file; a repository is a directory")
    return LocalStore(path)
