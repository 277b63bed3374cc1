# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair verify OUT``."""

import click

from pss_param.counting import counted
from pss_param.errors import CheckpointError
from pss_param.verification import verify_checkpoint

from . import options
from .console import progress_bar, say


@click.command(short_help="Check a repaired checkpoint against its report.")
@click.argument("out", type=click.Path())
@click.option("--source", type=click.Path(), help="What OUT was made from: compare all other bytes with it.")
@options.as_json
def verify(out: str, source: str | None, as_json: bool) -> None:
    """Read the repaired checkpoint OUT again and compare it with OUT.pss.json.

    Every changed tensor must have the reported bytes and measures and be finite; with --source, everything else
    must be equal to the source byte for byte. Exits with 1 if anything differs.
    """  # noqa: DOC501 - click shows this text
    with progress_bar("reading") as progress:
        outcome = verify_checkpoint(out, source, progress=progress)
    if as_json:
        click.echo(outcome.to_json(), nl=False)
    if outcome.problems:
        more = f" (and {len(outcome.problems) - 1} more, see --json)" if len(outcome.problems) > 1 else ""
        if outcome.wrong_source:
            raise CheckpointError(
                f"{source} is not the source of {out}, its report names {outcome.origin}: {outcome.problems[0]}{more}; "
                "compare with that one, or repair again"
            )
        raise CheckpointError(
            f"{out} is not what its report says: {outcome.problems[0]}{more}; repair the source again"
        )
    bytes_equal = f", {outcome.compared:,} other bytes equal to {source}" if source else ""
    say(f"{counted(outcome.checked, 'changed tensor is', 'changed tensors are')} as the report says{bytes_equal}")
