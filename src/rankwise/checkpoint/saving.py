"""One save, from the copy to the commit: what runs in the background while training goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rankwise import collectives, logs
from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import (
    METADATA,
    TENSORS,
    VALUES,
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_tensors,
)
from rankwise.checkpoint.places import Folder
from rankwise.checkpoint.plan import Piece, own_pieces, plan_pieces, structure
from rankwise.checkpoint.state import PerRank, buffer_addresses, capture, check_names
from rankwise.checkpoint.together import Assembly, rank_and_world_size, tell
from rankwise.checkpoint.tree import Path as TreePath
from rankwise.checkpoint.tree import Tree, flatten
from rankwise.checkpoint.writer import Shard, encode_metadata, write_shard
from rankwise.errors import CheckpointCorruptError, CheckpointError, RankFailure

_logger = logs.get_logger(__name__)


@dataclass
class Snapshot:
    """A rank's part of a state at one step, and what all ranks have to agree on.

    Attributes:
        items: by name, whether the item is `PerRank`.
        shared, own: plain values as JSON, of the items that all share (main process) and of this rank's own.
        tensors: shape and type of every tensor whose record this rank makes.
        structure: of the shared tensors, in words.
        is_abandoned: nobody waits for the save any more, so what it reads, where it is no copy, may have changed.
    """

    step: int
    items: dict[str, bool] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, TreePath] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    structure: dict[str, str] = field(default_factory=dict)
    failure: RankFailure | None = None
    is_abandoned: bool = False

    @property
    def digest(self) -> str:
        """Of what must be equal on all ranks."""
        return hashlib.sha256(json.dumps([self.items, self.structure], sort_keys=True).encode()).hexdigest()


@dataclass
class _Share:
    """What one rank tells the main process of its part. All of it pickles."""

    step: int
    items: dict[str, bool]
    structure: dict[str, str] | None = None
    """Only where it is not the main process's."""
    shard: Shard | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    failure: RankFailure | None = None


def take_snapshot(step: int, state: Mapping[str, object], copy: Callable[[list[Piece]], list[Piece]]) -> Snapshot:
    """This rank's part of `state`, by `copy` in memory that stays as it is while it is written.

    Never raises: what fails is told to all ranks with the save.

    Ranks: every rank must call, as `state_dict` of what is sharded may.
    """
    snapshot = Snapshot(step)
    try:
        if type(step) is not int or step < 0:
            raise CheckpointError(f"a step is a whole number from 0 on, not {step!r}.")
        check_names(state)
        rank, world_size = rank_and_world_size()
        snapshot.items = {name: isinstance(item, PerRank) for name, item in state.items()}
        shared: dict[str, torch.Tensor] = {}
        buffers: set[str] = set()
        own: dict[str, torch.Tensor] = {}
        for name, item in state.items():
            if isinstance(item, PerRank):
                tree = flatten(capture(item.item), name, f"rank-{rank:05d}")
                snapshot.own[name] = tree.encoded
                own |= tree.tensors
                _note(snapshot, tree, is_writer=True)
            else:
                tree = flatten(capture(item), name)
                snapshot.shared[name] = tree.encoded
                shared |= tree.tensors
                addresses = buffer_addresses(item)
                buffers |= {name for name, each in tree.tensors.items() if _address(each) in addresses}
                _note(snapshot, tree, is_writer=rank == 0)
        snapshot.structure = structure(shared)
        snapshot.pieces = copy(plan_pieces(shared, buffers, rank, world_size) + own_pieces(own))
    except Exception as error:
        snapshot.failure = collectives.describe(error)
    return snapshot


def _address(tensor: torch.Tensor) -> int:
    return 0 if isinstance(tensor, DTensor) else tensor.data_ptr()


def _note(snapshot: Snapshot, tree: Tree, is_writer: bool) -> None:
    if not is_writer:
        return
    snapshot.leaves |= tree.leaves  # fresh lists: `capture` has made them
    snapshot.paths |= tree.paths
    snapshot.aliases |= tree.aliases
    snapshot.tensors |= {name: (each.dtype, tuple(each.shape)) for name, each in tree.tensors.items()}


class Saver:
    """Writes snapshots into one folder, all ranks together.

    Args:
        check_lease, epoch: of the main process's lease.
        keep_last, keep_every: as `CheckpointManager`.

    Attributes:
        loaded_step: the step that training went on from, if any.
    """

    loaded_step: int | None = None

    def __init__(
        self,
        place: Folder,
        assembly: Assembly,
        check_lease: Callable[[], None],
        epoch: int,
        keep_last: int | None,
        keep_every: int | None,
        config_digest: str,
    ) -> None:
        self._place = place
        self._assembly = assembly
        self._check_lease = check_lease
        self._epoch = epoch
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._config_digest = config_digest

    def save(self, snapshot: Snapshot) -> None:
        """Write, sync and check this rank's part; the step appears when all ranks have.

        Raises:
            CheckpointError: a rank could not write its part, or they save different things; on every rank.
        Ranks: every rank must call, in one thread each.
        """
        what = f"step {snapshot.step} was not saved"
        begin = time.monotonic()
        attempt, digest = self._assembly.on_main(what, lambda: self._begin(snapshot))
        share = _Share(snapshot.step, snapshot.items, failure=snapshot.failure)
        if share.failure is None and snapshot.digest != digest:
            share.structure = snapshot.structure
        elif share.failure is None and attempt is not None:
            try:
                self._write(attempt, snapshot, share)
            except Exception as error:
                share.failure = collectives.describe(error)
        snapshot.pieces = []
        shares = self._assembly.gather(what, share)
        self._assembly.on_main(what, lambda: self._finish(attempt, snapshot, shares))
        where = self._place.describe(self._place.committed(snapshot.step, attempt or ""))
        try:
            if not self._place.wait_until_visible(snapshot.step):
                _logger.warning("%s is saved, but is not seen on this host after %g s", where, folder.VISIBLE_SECONDS)
        except OSError as error:  # the save is over: a failure here would be of this rank alone
            _logger.warning("%s is saved, but cannot be seen on this host: %s", where, error)
        if attempt is not None:
            seconds = time.monotonic() - begin
            _logger.info("step %d: saved %s (%.1f s)", snapshot.step, where, seconds, ranks="main")

    def _begin(self, snapshot: Snapshot) -> tuple[str | None, str]:
        """The name of an attempt at the step, None where it is there and whole; and what the main process saves."""
        if snapshot.failure is not None:
            return None, ""  # told when all have told theirs
        self._check_lease()
        place, found = self._place, self._place.at(snapshot.step)
        if found is not None:
            try:
                place.verify(found)
                is_stale = place.read_epoch(found) < self._epoch and self._is_left_behind(snapshot.step)
            except CheckpointCorruptError as error:
                aside = place.set_aside(found, folder.BROKEN)
                _logger.warning("step %d was broken (%s) and now lies in %s", snapshot.step, error, aside)
            else:
                if not is_stale:
                    place.confirm()  # the save that made it may have failed at just this
                    _logger.warning(
                        "%s is there and whole, so step %d was not saved again", place.describe(found), snapshot.step
                    )
                    return None, snapshot.digest
                aside = place.set_aside(found, folder.STALE)
                _logger.warning("step %d of an earlier job was in the way and now lies in %s", snapshot.step, aside)
        return place.begin(snapshot.step, self._epoch), snapshot.digest

    def _is_left_behind(self, step: int) -> bool:
        """Whether training went on from an older step than this one of an earlier job."""
        steps = [found.step for found in self._place.find()]
        index = steps.index(step)
        went_on_from_older = self.loaded_step in steps[:index]
        return went_on_from_older or index < len(steps) - 1

    def _write(self, attempt: str, snapshot: Snapshot, share: _Share) -> None:
        staging = self._place.join(attempt)
        rank = self._assembly.rank
        if snapshot.pieces or snapshot.leaves:
            name = folder.shard_file(rank)
            share.shard = write_shard(staging / name, snapshot.pieces, snapshot.leaves)
            if snapshot.is_abandoned:
                raise CheckpointError("the save was interrupted while it was written")
            share.shard.paths = snapshot.paths
            share.files[name] = share.shard.file
        if rank == 0:
            share.files[VALUES] = folder.write_file(staging / VALUES, _json(snapshot.shared))
        if snapshot.own:
            name = folder.rank_file(rank)
            share.files[name] = folder.write_file(staging / name, _json(snapshot.own))
        self._place.publish(attempt, share.files)
        share.tensors, share.aliases = snapshot.tensors, snapshot.aliases

    def _finish(self, attempt: str | None, snapshot: Snapshot, shares: list[_Share]) -> None:
        """On the main process: judge what all ranks told, and commit."""
        what = f"step {snapshot.step} was not saved"
        is_committed = False
        try:
            failures = [share.failure for share in shares if share.failure is not None]
            reason = tell(what, failures, len(shares)) if failures else _disagreement(what, snapshot, shares)
            if reason:
                raise CheckpointError(reason)
            if attempt is None:
                return
            manifest = self._complete(attempt, snapshot, shares)
            self._place.commit(attempt, manifest, self._check_lease)
            is_committed = True
        finally:
            if attempt is not None:
                self._place.discard(attempt, is_committed=is_committed)
        self._prune(snapshot.step)

    def _complete(self, attempt: str, snapshot: Snapshot, shares: list[_Share]) -> Manifest:
        """Write what tells of all parts together."""
        staging, nonce = self._place.join(attempt), attempt.rpartition("-")[2]
        files = {name: record for share in shares for name, record in share.files.items()}
        records = _join(shares)
        shards = [share.shard for share in shares if share.shard is not None]
        aliases = {alias: name for share in shares for alias, name in share.aliases.items()}
        files[TENSORS] = folder.write_file(staging / TENSORS, encode_tensors(records))
        files[METADATA] = folder.write_file(staging / METADATA, encode_metadata(shards, records, aliases, nonce))
        self._place.publish(attempt, [TENSORS, METADATA])
        return Manifest(
            step=snapshot.step,
            epoch=self._epoch,
            nonce=nonce,
            world_size=len(shares),
            shared_items=tuple(name for name, is_own in snapshot.items.items() if not is_own),
            per_rank_items=tuple(name for name, is_own in snapshot.items.items() if is_own),
            files=files,
            config_digest=self._config_digest,
        )

    def _prune(self, newest: int) -> None:
        """Delete the steps that need not be kept; the newest is durable and was read back."""
        if self._keep_last is None:
            return
        try:
            self._check_lease()
            # A damaged one does not count as kept, and is left to whoever wants to see why.
            place = self._place
            whole = [found for found in place.find() if place.looks_whole(found)]
            # Where a manifest cannot be read just now, the order of steps is not known, and none is removed.
            ordered = sorted(whole, key=lambda found: (place.read_epoch(found), found.step))
            kept, every = {*(found.step for found in ordered[-self._keep_last :]), newest}, self._keep_every
            is_kept = [found.step in kept or bool(every and found.step % every == 0) for found in ordered]
            place.remove(found for found, keep in zip(ordered, is_kept, strict=True) if not keep)
        except (OSError, CheckpointError) as error:
            _logger.warning("step %d is saved, but older ones could not be removed: %s", newest, error)


def _join(shares: list[_Share]) -> dict[str, TensorRecord]:
    """The record of every tensor, from the parts that the ranks wrote."""
    known = {name: kind for share in shares for name, kind in share.tensors.items()}
    chunks: dict[str, list[Chunk]] = {name: [] for name in known}
    for share in shares:
        for name, chunk in share.shard.chunks if share.shard is not None else ():
            chunks[name].append(chunk)
    records = {}
    for name, (dtype, shape) in known.items():
        wanted, found = torch.Size(shape).numel(), sum(torch.Size(chunk.sizes).numel() for chunk in chunks[name])
        if wanted != found or len({chunk.offsets for chunk in chunks[name]}) != len(chunks[name]):
            raise CheckpointError(
                f"the ranks hold {found} of the {wanted} values of the tensor {name!r} together. "
                "A shard is missing, or is there twice: look at the device mesh that it is distributed over."
            )
        records[name] = TensorRecord(dtype, shape, tuple(sorted(chunks[name])))
    return records


def _disagreement(what: str, snapshot: Snapshot, shares: list[_Share]) -> str:
    """A message that names the first rank that saves something else than rank 0; empty where all save the same."""
    for rank, share in enumerate(shares):
        if share.step != snapshot.step:
            return (
                f"{what}: rank {rank} saves step {share.step}, rank 0 step {snapshot.step}. "
                "Save the same step on every rank."
            )
        if share.items != snapshot.items:
            names = _differing(share.items, snapshot.items)
            return (
                f"{what}: rank {rank} and rank 0 save different items ({names}). "
                "Save the same names on every rank, each in `PerRank` on all of them or on none."
            )
        if share.structure is not None:
            names = _differing(share.structure, snapshot.structure)
            return (
                f"{what}: rank {rank} and rank 0 save different tensors ({names}). Save equal ones on every rank, or "
                "put the item in `PerRank` on all of them."
            )
    return ""


def _differing(here: Mapping[str, object], there: Mapping[str, object]) -> str:
    names = list(dict.fromkeys(name for name, _ in sorted(here.items() ^ there.items())))
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
