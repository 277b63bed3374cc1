# SPDX-License-Identifier: Apache-2.0
r"""Folders of frameworks that are known but not read: one sentence each that says what to do instead."""

import re
from collections.abc import Iterable
from pathlib import Path

from pss_param.errors import CheckpointError

_DEEPSPEED = re.compile(r"(.*/)?(mp_rank_\d+_model_states|.*zero_pp_rank_\d+_mp_rank_\d+_\w+_states)\.pt")
_MEGATRON = re.compile(r"(.*/)?mp_rank_\d+(_\d+)*/(model_optim_rng|distrib_optim|model_rng)\.pt")


def refuse_folder(path: Path, files: Iterable[str], folders: Iterable[str]) -> None:
    r"""Raise for a folder of a framework whose weights are stored in pieces that only it can join.

    Args:
        path: the folder.
        files: relative names of its files.
        folders: relative names of its sub-folders.

    Raises:
        CheckpointError: it is one.

    Example:
        >>> try:
        ...     refuse_folder(Path("ckpt"), ["latest", "global_step9/mp_rank_00_model_states.pt"], ["global_step9"])
        ... except CheckpointError as error:
        ...     print(str(error)[:58])
        ckpt is a DeepSpeed checkpoint, whose weights are in piece
    """
    names = list(files)
    if any(_DEEPSPEED.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{path} is a DeepSpeed checkpoint, whose weights are in pieces beside their float32 masters; join them "
            "(python zero_to_fp32.py . OUT --safe_serialization, in that folder), repair OUT, and start from it"
        )
    if any(_MEGATRON.fullmatch(name) for name in names) or "latest_checkpointed_iteration.txt" in names:
        raise CheckpointError(
            f"{path} is a Megatron checkpoint, whose weights are split over ranks; convert it to the Hugging Face "
            "format with the tools of Megatron, repair that, and convert it back"
        )
    if nested := [name for name in folders if f"{name}/.metadata" in names]:
        raise CheckpointError(
            f"{path} keeps its weights in a distributed checkpoint inside; repair {path / nested[0]} with -o, and put "
            f"the result in the place of {nested[0]} in a copy of the folder"
        )
