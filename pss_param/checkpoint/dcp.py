# SPDX-License-Identifier: Apache-2.0
r"""torch distributed checkpoints: ``.metadata`` and ``*.distcp``, without a process group.

Every piece of a tensor is a small file of ``torch.save`` at a known place inside a ``.distcp``; pieces of several
ranks make up one tensor. They are patched where they are, and the check sums inside the piece are mended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from pss_param.errors import CheckpointError

from .archive import Record, mend_archive, sums_of
from .dcp_metadata import Key, Piece, Recorded, read_metadata
from .folder import walk
from .layout import Layout
from .pickled import MAX_PICKLE
from .stored import Chunk, StoredTensor
from .torch_content import CONTAINERS
from .torch_tensors import View, tensor_of
from .torch_zip import read_torch_zip
from .transfer import read_exact

METADATA = ".metadata"


class DcpLayout(Layout):
    r"""A folder that ``torch.distributed.checkpoint.save`` wrote.

    Attributes:
        paths: for every tensor, weights and state, the keys that led to it before flattening.
        moments: names in ``state`` by moment (``"exp_avg"``, ``"step"``, ...) by name of the weight, as the
            checkpoint records them.

    Args:
        path: the folder.
    """

    format = "distributed checkpoint"

    def __init__(self, path: Path) -> None:
        r"""See the class."""
        files, folders = walk(path)
        super().__init__(path, files)
        self.folders = folders
        self.paths: Mapping[str, Key] = {}
        self.moments: Mapping[str, Mapping[str, str]] = {}
        self._records: dict[str, dict[str, Record]] = {}

    def _parse(self) -> Mapping[str, StoredTensor]:
        recorded = self._read_metadata()
        self._check_places(recorded)
        self.paths = {name: entry.path for name, entry in recorded.items()}
        placed = {name: self._stored(entry) for name, entry in recorded.items()}
        self.state = {name: stored for name, stored in placed.items() if optimizer_part(self.paths[name])}
        weights = {name: stored for name, stored in placed.items() if name not in self.state}
        self.moments = map_moments(self.paths, list(weights), list(self.state))
        return weights

    def _read_metadata(self) -> dict[str, Recorded]:
        size = self.stat(METADATA).st_size
        try:
            if size > MAX_PICKLE:
                raise ValueError(f"it has {size} bytes, at most {MAX_PICKLE} are read")
            return read_metadata(bytes(read_exact(self.fd(METADATA), 0, size)))
        except ValueError as error:
            raise CheckpointError(f"{self.path / METADATA} is not usable: {error}") from None

    def _check_places(self, recorded: Mapping[str, Recorded]) -> None:
        by_file: dict[str, list[Piece]] = {}
        for entry in recorded.values():
            for piece in entry.pieces:
                by_file.setdefault(piece.file, []).append(piece)
        for file, pieces in by_file.items():
            if file not in self.files:
                raise CheckpointError(f"{self.path / METADATA} names {file[:100]!r}, which is not in the folder")
            pieces.sort(key=lambda piece: piece.offset)
            ends = [piece.offset + piece.length for piece in pieces]
            if max(ends) > self.stat(file).st_size:
                raise CheckpointError(
                    f"{self.files[file]} has {self.stat(file).st_size} bytes, {METADATA} places pieces up to byte "
                    f"{max(ends)}; it was cut off, copy it again"
                )
            if any(end > after.offset for end, (_, after) in zip(ends, pairwise(pieces), strict=False)):
                raise CheckpointError(f"{self.path / METADATA} places two pieces over each other in {file}")

    def _stored(self, entry: Recorded) -> StoredTensor:
        chunks: tuple[Chunk, ...] = ()
        dtype = entry.dtype
        for piece in entry.pieces:
            chunk = self._chunk(entry, piece)
            if chunk is None:
                # Not a plain tensor (a quantised one): listed, not read.
                return StoredTensor(
                    entry.name, None, f"{entry.dtype_name} (no plain tensor)", entry.shape, (), entry.name
                )
            chunks = (*chunks, chunk)
        return StoredTensor(entry.name, dtype, entry.dtype_name, entry.shape, chunks, entry.name)

    def _chunk(self, entry: Recorded, piece: Piece) -> Chunk | None:
        try:
            inside = read_torch_zip(self.fd(piece.file), piece.offset, piece.length)
            view = tensor_of(inside.content)
            if not isinstance(view, View) or not view.simple:
                return None
            if view.shape != piece.shape or view.dtype != entry.dtype:
                raise ValueError(f"it holds {view.dtype} {view.shape}, not torch.{entry.dtype_name} {piece.shape}")
            offset = inside.record(view).offset
        except ValueError as error:
            raise CheckpointError(
                f"{self.files[piece.file]} does not have the piece of {entry.name[:200]!r} that {METADATA} places "
                f"at byte {piece.offset}: {error}"
            ) from None
        known = self._records.setdefault(piece.file, {})
        known.update({f"{piece.offset}/{name}": record for name, record in inside.records.items()})
        return replace(view.chunk(piece.file, offset), origin=piece.origin)

    def mend(self, file: str, fd: int, patched: Sequence[tuple[int, int]]) -> None:
        r"""Bring the check sums of patched pieces up to date.

        Args:
            file: relative name of the file.
            fd: the copy, open for reading and writing.
            patched: ``(offset, count)`` of every patch, in bytes.
        """
        mend_archive(fd, self._records.get(file, {}), patched)

    def mended(self, file: str, patched: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        r"""Where the check sums of patched pieces are.

        Args:
            file: relative name of the file.
            patched: ``(offset, count)`` of every patch, in bytes.

        Returns:
            ``(offset, count)`` of every sum.
        """
        return sums_of(self._records.get(file, {}), patched)


def optimizer_part(path: Key) -> Key | None:
    r"""What stands behind the optimizer's name in the keys of a tensor.

    Args:
        path: the keys that led to it.

    Returns:
        The keys behind, or None for a tensor that is no optimizer's.

    Example:
        >>> optimizer_part(("app", "optim", "state", "layers.0.weight", "exp_avg"))
        ('state', 'layers.0.weight', 'exp_avg')
        >>> optimizer_part(("model", "layers.0.weight")) is None
        True
    """
    for at, key in enumerate(path[:-1]):
        if isinstance(key, str) and key.lower().startswith("optim"):
            return path[at + 1 :]
    return None


def map_moments(paths: Mapping[str, Key], weights: Sequence[str], state: Sequence[str]) -> dict[str, dict[str, str]]:
    r"""Find out whose moments the optimizer's tensors are, by the names that the checkpoint gives them.

    Args:
        paths: the keys that led to every tensor.
        weights: names of the weights.
        state: names of the optimizer's tensors.

    Returns:
        Names in ``state`` by moment by weight; a tensor that belongs to no weight, or may belong to two, is left
        out.

    Example:
        >>> paths = {"model.w": ("model", "w"), "optim.state.w.step": ("optim", "state", "w", "step")}
        >>> map_moments(paths, ["model.w"], ["optim.state.w.step"])
        {'model.w': {'step': 'optim.state.w.step'}}
    """
    by_tail: dict[str, list[str]] = {}
    for weight in weights:
        words = weight.split(".")
        for at in range(len(words)):
            by_tail.setdefault(".".join(words[at:]), []).append(weight)
    found: dict[str, dict[str, str]] = {}
    for name in state:
        part = optimizer_part(paths[name]) or ()
        words = [str(key) for key in part]
        # Several optimizers: a list, so a number comes first.
        words = ".".join(words[1:] if words and words[0].isdigit() else words).split(".")
        if len(words) < 3 or words[0] != "state":
            continue
        owners = by_tail.get(".".join(words[1:-1]), [])
        before = paths[name][: len(paths[name]) - len(part) - 1]
        owner = _owner(owners, paths, before)
        if owner:
            found.setdefault(owner, {})[words[-1]] = name
    return found


def _owner(candidates: Sequence[str], paths: Mapping[str, Key], before: Key) -> str | None:
    if len(candidates) > 1:
        # `model.w` and `ema.model.w`: the optimizer's sister is meant.
        homes = {before, *((*before, container) for container in CONTAINERS)}
        candidates = [name for name in candidates if paths[name][:-1] in homes]
    return candidates[0] if len(candidates) == 1 else None
