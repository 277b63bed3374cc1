# SPDX-License-Identifier: Apache-2.0
r"""What the first bytes of a file say about its format."""

from pathlib import Path

from pss_param.errors import CheckpointError


def is_torch_zip(path: Path) -> bool:
    r"""Tell a file of ``torch.save`` by its first bytes.

    Args:
        path: the file.

    Returns:
        True for a zip archive.
    """
    return _start(path).startswith(b"PK\x03\x04")


def refuse_pickle(path: Path) -> None:
    r"""Refuse a bare pickle, the format of ``torch.save`` before 1.6.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is one.
    """
    start = _start(path)
    # A safetensors file may begin with these bytes as its header's length; then the header follows.
    if start[:1] == b"\x80" and start[1:2] in {b"\2", b"\3", b"\4", b"\5"} and start[8:] != b"{":
        raise CheckpointError(
            f"{path} is a bare pickle, as torch saved before 1.6; convert it with "
            "`torch.save(torch.load(OLD, weights_only=True), NEW)` and repair NEW"
        )


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)
