"""The outline of a description: all of it that is neither a tensor nor a value, and so may be kept between saves."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from fastckpt.format.chunk import chunk_hash
from fastckpt.format.families import Mesh
from fastckpt.format.shard import Box
from fastckpt.job.tensors import Held
from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer


@dataclass(frozen=True)
class Outline:
    """What this rank holds, but for the bytes. A *view* is the live memory of one box of one key; they are numbered."""

    offer: RankOffer
    digest: bytes
    """Of ``offer``."""
    own: Mapping[str, tuple[Offer, Sequence[Box]]]
    """By key, the offers that are no other key's tensor, and the boxes that this rank holds."""
    numbers: Mapping[tuple[str, Box], int]
    """Of views."""
    copied: Mapping[int, str]
    """By the number of a view that is to be copied before ``save`` returns, the dtype it is saved in."""
    sampled: Sequence[tuple[str, int]]
    """Key and number of the views that are read live on the CPU."""
    sampled_ends: Sequence[int]
    """Where each of ``sampled`` ends if their bytes were one behind the other."""
    devices: frozenset[torch.device]


def make_outline(held: Mapping[str, Held], aliases: Mapping[str, str], copy: Sequence[str]) -> Outline:
    """The outline of what is held, views numbered in its order. ``aliases`` are keys that are the same tensor as one of
    ``held``; ``copy`` has globs of keys whose tensors are copied before ``save`` returns."""
    offer = _offer(held, aliases)
    names: dict[str, list[str]] = {}
    for alias, target in aliases.items():
        names.setdefault(target, [target]).append(alias)
    numbers: dict[tuple[str, Box], int] = {}
    copied: dict[int, str] = {}
    sampled: list[tuple[str, int]] = []
    sizes: list[int] = []
    devices: set[torch.device] = set()
    for key, entry in held.items():
        early = entry.volatile
        early = early or any(fnmatch.fnmatchcase(name, glob) for glob in copy for name in names.get(key, [key]))
        # A lazily conjugated view is made real by reading it, so it must be read now.
        early = early or any(view.is_conj() or view.is_neg() for _, view in entry.pieces)
        for box, view in entry.pieces:
            number = numbers[key, box] = len(numbers)
            devices.add(view.device)
            if early:
                copied[number] = entry.dtype
            elif view.device.type == "cpu":
                sampled.append((key, number))
                sizes.append(view.numel() * view.element_size())
    own = {each.key: (each, [box for box, _ in held[each.key].pieces]) for each in offer.tensors if not each.alias}
    digest = chunk_hash(msgspec.msgpack.encode(offer))
    ends = list(itertools.accumulate(sizes))
    return Outline(offer, digest, own, numbers, copied, sampled, ends, frozenset(devices))


def _offer(held: Mapping[str, Held], aliases: Mapping[str, str]) -> RankOffer:
    groups: dict[tuple[int, ...], int] = {}
    meshes: list[Mesh] = []
    numbers: dict[int, int] = {}
    tensors = []
    aliased = {alias: held[target] for alias, target in aliases.items()}
    for key, entry in sorted({**held, **aliased}.items()):
        shape, alias = list(entry.shape), aliases.get(key, "")
        if entry.rule is not None and entry.sharing == KNOWN:
            if id(entry.rule.mesh) not in numbers:  # tensors of one mesh have one object
                numbers[id(entry.rule.mesh)] = len(meshes)
                meshes.append(entry.rule.mesh)
            mesh, splits = numbers[id(entry.rule.mesh)], list(entry.rule.splits)
            tensors.append(Offer(key, entry.dtype, shape, [], KNOWN, 0, alias, mesh, splits))
            continue
        among = groups.setdefault(entry.among, len(groups)) if entry.sharing == KNOWN else 0
        boxes = [(list(box.offsets), list(box.sizes)) for box, _ in entry.pieces]
        tensors.append(Offer(key, entry.dtype, shape, boxes, entry.sharing, among, alias))
    return RankOffer(tensors, [list(group) for group in groups] or [[]], meshes)
