# SPDX-License-Identifier: Apache-2.0
r"""A checkpoint under other names: parametrized keys become plain ones, values are copied, never computed."""

import os
from pathlib import Path

from pss_param.checkpoint import Layout, open_checkpoint
from pss_param.checkpoint.rename import write_renamed
from pss_param.errors import CheckpointError
from pss_param.export import plain_state_dict
from pss_param.options import Progress, ProgressHook


def export_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: ProgressHook | None = None,
) -> tuple[Path, int]:
    r"""Write a copy in which ``x.parametrizations.weight.original`` is called ``x.weight`` again, if there is any such.

    Args:
        path: a ``.safetensors`` file.
        output: the copy; None for ``x.plain.safetensors`` beside ``x.safetensors``.
        force: whether an existing output may be replaced.
        progress: told of every step.

    Returns:
        Where the copy is, and how many tensors have another name in it. Where all names are plain already, nothing is
        written, and that is the checkpoint itself, and 0.

    A checkpoint that cannot be read, or weights that would have to be computed, raise
    :class:`CheckpointError`.

    Example:
        >>> import tempfile, safetensors.torch, torch
        >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> safetensors.torch.save_file({"fc.parametrizations.weight.original": torch.eye(2)}, path)
        >>> written, renamed = export_checkpoint(path)
        >>> list(safetensors.torch.load_file(written)), renamed
        (['fc.weight'], 1)
    """
    source = Path(path)
    destination = source.with_name(f"{source.stem}.plain{source.suffix}") if output is None else Path(output)
    with open_checkpoint(source) as layout:
        names = plain_names(layout)
        renamed = sum(new != old for new, old in names.items())
        if not renamed:
            return source, 0
        total, done = sum(layout.tensors[old].nbytes for old in names.values()), 0
        for step in write_renamed(layout, names, destination, force):
            done += step
            if progress is not None:
                progress(Progress("copy", "", done, total))
    return destination, renamed


def plain_names(layout: Layout) -> dict[str, str]:
    r"""Which key comes from which, by the same rule as for state dicts.

    Args:
        layout: the checkpoint.

    Returns:
        Stored key by plain key, in the stored order.

    Raises:
        CheckpointError: a weight would have to be computed, or two keys get the same name.
    """
    try:
        return plain_state_dict({name: name for name in layout.tensors})
    except CheckpointError as error:
        raise CheckpointError(f"{layout.path}: {error}") from None
