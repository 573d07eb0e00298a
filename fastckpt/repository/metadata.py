"""Reading metadata objects: one that is larger than it may be is damage, not a failure of the store."""

from __future__ import annotations

from fastckpt.errors import ObjectNotFound, SnapshotDamaged, StorageError
from fastckpt.storage.store import Store


def read_metadata(store: Store, name: str, size_max: int) -> bytes:
    """The object, of at most ``size_max`` bytes. ``SnapshotDamaged`` naming it if it is larger; ``ObjectNotFound``."""
    try:
        return store.read(name, size_max=size_max)
    except ObjectNotFound:
        raise
    except StorageError as error:
        if error.transient or (size := store.size(name)) <= size_max:
            raise
        message = f"{store.url}: {name} has {size} bytes, more than the {size_max} it may have"
        raise SnapshotDamaged(message, object=name) from error
