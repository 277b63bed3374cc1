# SPDX-License-Identifier: Apache-2.0
r"""Two consoles: results go to stdout, progress and messages to stderr.

Rich honours ``NO_COLOR`` and knows pipes and narrow terminals; what is added here is that nothing is cut off
when stdout is a pipe, and that no text of a checkpoint is taken for markup.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from pss_param.options import Progress as Step
from pss_param.options import ProgressHook

PIPE_WIDTH = 400
"""Columns where stdout is no terminal: wide enough that no line is wrapped for a program that reads it."""


def stdout() -> Console:
    r"""The console for results.

    Returns:
        A console on the present ``sys.stdout``.
    """
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    r"""The console for progress and messages.

    Returns:
        A console on the present ``sys.stderr``.
    """
    return Console(file=sys.stderr, markup=False, highlight=False, emoji=False)


def fail(message: object) -> None:
    r"""Print an error as one line, whatever line breaks it came with.

    Args:
        message: what is wrong and what to do.
    """
    text = " ".join(str(message).split())
    stderr().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def say(message: str) -> None:
    r"""Print a message that is no result.

    Args:
        message: one line.
    """
    stderr().print(Text(message), soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Generator[ProgressHook, None, None]:
    r"""Show progress on stderr while the block runs; silent where stderr is no terminal.

    Args:
        title: shown before the bar.

    Yields:
        ProgressHook: to be passed to the library.
    """
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)

        def show(step: Step) -> None:
            # The name comes from a file: escape nothing, but show no markup either.
            name = step.name[-40:].replace("[", "(").replace("]", ")")
            bars.update(task, description=f"{step.stage} {name}", completed=step.done, total=step.total)

        yield show
