# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair export CKPT``."""

import click

from pss_param.counting import counted
from pss_param.plain import export_checkpoint

from . import options
from .console import progress_bar, say, stdout


@click.command(short_help="Give parametrized weights their plain names.")
@options.checkpoint
@options.output
@options.force
def export(ckpt: str, output: str | None, force: bool) -> None:
    """Turn a checkpoint with `parametrizations.*.original` keys into plain weights.

    The result loads in code that has never heard of parametrizations. Values are copied, not computed. Where all
    names are plain already, nothing is written.
    """
    with progress_bar("copying") as progress:
        written, renamed = export_checkpoint(ckpt, output, force=force, progress=progress)
    if renamed:
        say(f"{counted(renamed, 'tensor has its plain name', 'tensors have their plain names')} again")
    else:
        say("all names are plain already: nothing was written, the checkpoint can be used as it is")
    stdout().print(str(written), soft_wrap=True)
