# SPDX-License-Identifier: Apache-2.0
r"""The group of commands; ``pss-repair CKPT`` without a command's name is the repair."""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click
import torch

from pss_param.errors import PssError
from pss_param.version import __version__

from .compare import compare
from .console import fail
from .export import export
from .repair import repair
from .scan import scan
from .verify import verify

DONE, FAILED, USAGE = 0, 1, 2


class RepairGroup(click.Group):
    r"""A group whose first word may be a checkpoint instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        r"""Put ``repair`` before arguments that name no command.

        Args:
            ctx: the context.
            args: what follows ``pss-repair``.

        Returns:
            What click has not consumed.

        Raises:
            UsageError: the word is ``help``, and no checkpoint has this name.
        """
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.list_commands(ctx) and args[0] not in own:
            if args[0] == "help" and not os.path.exists("help"):
                raise click.UsageError("there is no command 'help', use --help or COMMAND --help", ctx)
            args = ["repair", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        r"""Name all commands; ``demo`` is imported only when it is called.

        Args:
            ctx: the context.

        Returns:
            Their names, in the order of the help.
        """
        return [*super().list_commands(ctx), "demo"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        r"""Find a command.

        Args:
            ctx: the context.
            cmd_name: its name.

        Returns:
            The command, or None.
        """
        if cmd_name == "demo":
            from .demo import demo

            command: click.Command = demo
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        r"""Run the command; Ctrl-C becomes an error of one line (click would print an empty one before it).

        Args:
            ctx: the context.

        Returns:
            What the command returns.

        Raises:
            ClickException: the user or the system interrupted the command.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; no output was written and the input is as it was") from None

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        r"""Show both ways of calling.

        Args:
            ctx: the context.
            formatter: takes the text.
        """
        formatter.write_usage(ctx.command_path, "[OPTIONS] CKPT")
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        r"""Show the repair's options as the group's own, then the commands.

        Args:
            ctx: the context.
            formatter: takes the text.
        """
        with formatter.section("Repair options"):
            options = [option for option in repair.params if isinstance(option, click.Option)]
            records = [option.get_help_record(ctx) for option in options]
            formatter.write_dl([record for record in records if record])
        with formatter.section("Other options"):
            records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
            formatter.write_dl([record for record in records if record])
        self.format_commands(ctx, formatter)


@click.group(cls=RepairGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="pss-repair")
def cli() -> None:
    """Repair the checkpoint of a training run that has diverged.

    CKPT is a file (.safetensors, .pt, .bin, Lightning .ckpt) or a folder (Hugging Face model or shards, Trainer
    checkpoint-N, accelerate state, distributed checkpoint). A copy is written beside it (x.repaired.safetensors,
    folder-repaired) in which the dominant singular values of the weight matrices are brought down; what
    is not repaired is identical byte for byte. The input is never changed. A report beside the copy (*.pss.json)
    lists what was done.

    \b
    pss-repair model.safetensors               repair with the defaults
    pss-repair checkpoint-85000                a folder that training resumes from
    pss-repair --dry-run model.safetensors     compute and show, write nothing
    pss-repair scan model.safetensors          look, and exit with 3 if it is damaged
    pss-repair compare good bad                which matrices fell, against a healthy checkpoint
    pss-repair verify x-repaired --source x    check a repaired checkpoint again
    pss-repair demo                            a run dies and is rescued, in a minute

    Exit codes: 0 done, 1 an error (one line says what to do), 2 wrong usage, 3 scan found damage.
    """  # noqa: D301 - click needs the character \b itself


for command in (repair, scan, compare, verify, export):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    r"""Run the command and exit; every expected failure is one line on stderr, never a traceback.

    Args:
        args: what follows the program's name; None for ``sys.argv``.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    r"""Run the command.

    Args:
        args: what follows the program's name; None for ``sys.argv``.

    Returns:
        The exit code.
    """
    try:
        code = cli.main(None if args is None else list(args), prog_name="pss-repair", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        error.show()
        return USAGE
    except (PssError, click.ClickException) as error:
        fail(error.format_message() if isinstance(error, click.ClickException) else error)
        return FAILED
    except OSError as error:
        return _system_failure(error)
    except MemoryError:
        fail("out of memory; the largest tensor needs about four times its size in float32")
        return FAILED
    except torch.OutOfMemoryError:
        fail("the device is out of memory; use --device cpu")
        return FAILED
    return code if isinstance(code, int) else DONE


def _system_failure(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # The reader of stdout has gone, as in `| head`; Python must not try to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    where = f"{error.filename}: " if error.filename else ""
    fail(f"{where}{error.strerror or error}; nothing was written")
    return FAILED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
