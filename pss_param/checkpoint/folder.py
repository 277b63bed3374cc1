# SPDX-License-Identifier: Apache-2.0
r"""A folder with weights at its top: Hugging Face models and shards, ``Trainer`` checkpoints, accelerate states.

Only the weights are looked into; optimizer, scheduler, random states and everything else are opaque files of
the same folder. Links to files, as in the hub's cache, are followed: a copy holds regular files.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pss_param.errors import CheckpointError

from .archive import mend_archive, read_archive, sums_of
from .layout import Layout
from .refused import refuse_folder
from .safetensors import read_header, stored_tensor
from .shards import check_index, read_index
from .start import is_torch_zip, refuse_pickle
from .stored import StoredTensor
from .torch_zip import parse_torch_zip, read_torch_file
from .write import MARK

_INDEX = ".index.json"
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|diffusion_pytorch_model)(_[0-9]+)?(\.fp16)?\.(safetensors|bin)"
)
_SHARD = re.compile(r".*-[0-9]{5}-of-[0-9]{5}\.(safetensors|bin)")
_COMPANIONS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict|training_args|rng_state|random_states|custom_checkpoint)"
    r"(_[0-9]+)*\.(pt|bin|pth|pkl)"
)
_OPTIMIZER = re.compile(r"optimizer(_[0-9]+)?\.(pt|bin)")
_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class WeightSet:
    r"""The weights of one model of a folder.

    Args:
        prefix: put before its names where a folder holds several models; empty for the first.
        files: its files, relative to the folder.
        index: relative name of its index, or empty.
    """

    prefix: str
    files: tuple[str, ...]
    index: str = ""


class FolderLayout(Layout):
    r"""A folder of files, of which some hold the weights.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        r"""See the class."""
        files, folders = walk(path)
        refuse_folder(path, files, folders)
        super().__init__(path, files)
        self.folders = folders
        self.sets = find_weights(path, files)
        self.format = _format(self.sets, files)
        self._torch: set[str] = set()

    def _parse(self) -> Mapping[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for group in self.sets:
            shards = {file: self._parse_file(file) for file in group.files}
            if group.index:
                tensors = check_index(self.path / group.index, read_index(self.files[group.index]), shards)
            else:
                (tensors,) = (dict(shard) for shard in shards.values())
            named = {group.prefix + name: _renamed(stored, group.prefix) for name, stored in tensors.items()}
            if both := found.keys() & named.keys():
                raise CheckpointError(
                    f"{self.path} holds two tensors that would both be called {min(both)}; name the file of one model"
                )
            found.update(named)
        self._parse_optimizers()
        return found

    def _parse_optimizers(self) -> None:
        state: dict[str, StoredTensor] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        self.content = {}
        for file in (file for file in self.files if _OPTIMIZER.fullmatch(file)):
            try:
                inside = read_torch_file(self.fd(file), self.stat(file).st_size, file, model=False)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.files[file]} is not a usable optimizer state: {error}; the weights alone are repaired "
                    "by naming their file"
                ) from None
            self._torch.add(file)
            self.content[file] = inside.zip.content
            state.update(
                {f"{file}:{key}": replace(stored, name=f"{file}:{key}") for key, stored in inside.state.items()}
            )
            paths.update({f"{file}:{key}": (file, *path) for key, path in inside.paths.items()})
        self.state, self.paths = state, paths

    def _parse_file(self, file: str) -> Mapping[str, StoredTensor]:
        if is_torch_zip(self.files[file]):
            self._torch.add(file)
            return parse_torch_zip(self.fd(file), file, self.files[file])
        refuse_pickle(self.files[file])
        header = read_header(self.fd(file), self.stat(file).st_size, self.files[file])
        return {name: stored_tensor(file, header, name) for name in header.entries}

    def mend(self, file: str, fd: int, patched: Sequence[tuple[int, int]]) -> None:
        r"""Bring the check sums of a torch zip file up to date.

        Args:
            file: relative name of the file.
            fd: the patched copy.
            patched: ``(offset, count)`` of every patch.
        """
        if file in self._torch:
            mend_archive(fd, read_archive(self.fd(file), 0, self.stat(file).st_size), patched)

    def mended(self, file: str, patched: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        r"""Where the check sums of a torch zip file are.

        Args:
            file: relative name of the file.
            patched: ``(offset, count)`` of every patch.

        Returns:
            ``(offset, count)`` of every sum.
        """
        if file not in self._torch:
            return ()
        return sums_of(read_archive(self.fd(file), 0, self.stat(file).st_size), patched)


def walk(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    r"""List everything in a folder.

    Args:
        folder: the folder.

    Returns:
        Files by relative name, and sub-folders, parents first. Temporaries of killed runs are left out.

    Raises:
        CheckpointError: something is neither a file, a link to one, nor a folder.
    """
    files: dict[str, Path] = {}
    folders: list[str] = []
    for root, inner, names in os.walk(folder):
        inner.sort()
        here = Path(root).relative_to(folder)
        folders += [(here / name).as_posix() for name in inner]
        for link in (Path(root) / name for name in inner):
            if link.is_symlink():
                raise CheckpointError(f"{link} is a link to a folder; make a copy without links first (cp -rL)")
        for name in sorted(names):
            if MARK not in name:
                files[(here / name).as_posix()] = _checked(Path(root) / name)
    return files, tuple(folders)


def _checked(path: Path) -> Path:
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise CheckpointError(
            f"{path} leads nowhere ({error.strerror}); download or copy the checkpoint again"
        ) from None
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path} is no regular file; a checkpoint has none such, remove it first")
    return path


def find_weights(path: Path, files: Mapping[str, Path]) -> tuple[WeightSet, ...]:
    r"""Find the files that hold weights, by name and index.

    Args:
        path: the folder.
        files: its files.

    Returns:
        One set, or several where accelerate saved several models.

    Raises:
        CheckpointError: there is none, or it is not clear which is loaded.
    """
    top = [name for name in files if "/" not in name]
    if indices := [name for name in top if name.endswith(_INDEX)]:
        return (_sharded(path, indices, top),)
    known = [name for name in top if _WEIGHTS.fullmatch(name)]
    known = known or [name for name in top if name.endswith(_KINDS) and not _COMPANIONS.fullmatch(name)]
    if len(known) > 1 and any(_SHARD.fullmatch(name) for name in known):
        raise CheckpointError(
            f"{path} has shards but no {_INDEX} that says what belongs where; add it or name one file"
        )
    if not known:
        inner = sorted({name.split("/")[0] for name in files if name.endswith(_KINDS)})
        hint = f"; weights lie below {', '.join(inner[:4])}: name that" if inner else "; name the file that holds them"
        raise CheckpointError(f"{path} has no weights at its top{hint}")
    numbers = {name: _WEIGHTS.fullmatch(name) for name in known}
    places = [match[2] if match else None for match in numbers.values()]
    if len(set(places)) < len(places):
        raise CheckpointError(
            f"{path} holds weights more than once ({', '.join(known[:4])}) and loaders differ in which they take; "
            "name the file itself, or move the others away"
        )
    return tuple(_single(name, numbers[name]) for name in sorted(known, key=lambda name: (len(name), name)))


def _single(name: str, match: "re.Match[str] | None") -> WeightSet:
    number = match[2] if match else None
    return WeightSet(f"model{number}." if number else "", (name,))


def _sharded(path: Path, indices: Sequence[str], top: Sequence[str]) -> WeightSet:
    whole = [name for name in top if _WEIGHTS.fullmatch(name)]
    if len(indices) + len(whole) > 1:
        raise CheckpointError(
            f"{path} holds weights more than once ({', '.join([*indices, *whole][:4])}) and loaders differ in which "
            "they take; move all but one away"
        )
    index = read_index(path / indices[0])
    files = sorted(set(index.values()))
    if missing := [file for file in files if file not in top]:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the {len(files)} shards of {indices[0]}, first {missing[0]}; "
            "download or copy the checkpoint again"
        )
    return WeightSet("", tuple(files), indices[0])


def _format(sets: Sequence[WeightSet], files: Mapping[str, Path]) -> str:
    kind = "safetensors" if sets[0].files[0].endswith(".safetensors") else "torch"
    shape = f"{kind} shards" if sets[0].index else kind
    if "trainer_state.json" in files:
        return f"transformers Trainer folder ({shape})"
    if any(name.startswith("random_states_") for name in files):
        return f"accelerate folder ({shape})"
    return f"folder ({shape})"


def _renamed(stored: StoredTensor, prefix: str) -> StoredTensor:
    return replace(stored, name=prefix + stored.name) if prefix else stored
