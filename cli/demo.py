# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair demo``."""

import csv
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text as Styled

from pss_param.errors import ArgumentError

from .console import say, stderr, stdout
from .demo_plot import Curve, draw
from .demo_run import Act, Advance, Recipe, play
from .demo_text import load_text
from .demo_verdict import failures
from .tables import Listing

_NAMES = {
    "healthy": "trained",
    "dead": "died",
    "dead.repaired": "repaired, not trained on",
    "control": "control: resumed dead",
    "restart": "restart from scratch",
    "rescued": "rescued: resumed repaired",
}
_MARKS = {"control": ("x", "red"), "restart": ("o", "yellow"), "rescued": ("#", "green")}
_SHARE_BEFORE = 0.45


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and batches.")
@click.option(
    "--steps", type=click.IntRange(min=3), default=Recipe.steps, show_default=True,
    help="Healthy training; a third of it after the death.",
)  # fmt: skip
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Leave checkpoints and a CSV here.")
def demo(seed: int, steps: int, keep: Path | None) -> None:
    """Watch a training run die and be rescued; takes about a minute.

    A small transformer learns from the manual pages that come with Python. It is resumed without its optimizer
    state at ten times its learning rate, and dies. Its checkpoint is repaired as `pss-repair CKPT` would. Then
    three runs go on with the same steps, rate and batches, each with a fresh optimizer: from the dead
    checkpoint, from scratch, and from the repaired checkpoint.

    Exits with 1 if the repaired run does not end clearly below the dead one and below the restart.
    """
    recipe, text = Recipe(seed=seed, steps=steps), load_text()
    unigram = text.unigram_loss(recipe.context)
    with _folder(keep) as folder:
        with _progress(recipe) as advance:
            acts = play(recipe, text, folder, advance)
        if keep is not None:
            _write_curves(folder / "loss.csv", acts)
    _show(recipe, acts, unigram)
    _conclude(recipe, acts, unigram, keep)


@contextmanager
def _folder(keep: Path | None) -> Generator[Path, None, None]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="pss-demo-") as name:
            yield Path(name)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ArgumentError(f"--keep needs a new or empty folder, {keep} is not; name another one")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


@contextmanager
def _progress(recipe: Recipe) -> Generator[Advance, None, None]:
    console = stderr()
    say(f"seed {recipe.seed}: {recipe.total_steps} steps of training, about a minute on two cores")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=recipe.total_steps)

        def advance(act: str, step: int, loss: float) -> None:
            bars.update(task, advance=1, description=f"{act:8} loss {loss:.2f}")

        yield advance


def _write_curves(path: Path, acts: Mapping[str, Act]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("run", "step", "training_loss"))
        for act, outcome in acts.items():
            rows.writerows((act, step + 1, f"{loss:.6f}") for step, loss in enumerate(outcome.curve))


def _show(recipe: Recipe, acts: Mapping[str, Act], unigram: float) -> None:
    console = stdout()
    width = min(console.width, 78)
    console.print(_plot(acts, unigram, width))
    console.print(_axis(recipe, width), soft_wrap=True)
    legend = [Styled.assemble((mark, style), f" {act}") for act, (mark, style) in _MARKS.items()]
    console.print(Styled("  ").join([Styled.assemble(("*", "cyan"), " first life"), *legend]))
    console.print(Styled(f". unigram loss {unigram:.2f}: letter frequencies only"))
    console.print()
    numbers = ("loss", "stable rank", "s")
    rows = Listing(("run", *numbers), numbers)
    for act, name in _NAMES.items():
        outcome = acts[act]
        style = "bold" if act == "rescued" else ""
        values = (f"{outcome.loss:.2f}", f"{outcome.stable_rank:.1f}", f"{outcome.seconds:.1f}")
        rows.add(name, *values, style=style)
    console.print(rows)


def _plot(acts: Mapping[str, Act], unigram: float, width: int) -> Styled:
    first = [*acts["healthy"].curve, *acts["dead"].curve]
    curves = [Curve(first, "*", "cyan", 0.0, _SHARE_BEFORE)]
    curves += [Curve(acts[act].curve, *mark, _SHARE_BEFORE, 1.0) for act, mark in _MARKS.items()]
    low = min(value for curve in curves for value in curve.columns(width).values())
    return draw(curves, (min(low, unigram - 0.5), unigram + 1.0), (width, 16), unigram)


def _axis(recipe: Recipe, width: int) -> str:
    died = recipe.steps + recipe.kill_steps
    before = round(_SHARE_BEFORE * (width - 6))
    left, right = f"dies at step {died}^".rjust(before), f"+{recipe.resume_steps}"
    return "     +" + left + right.rjust(width - 6 - len(left))


def _conclude(recipe: Recipe, acts: Mapping[str, Act], unigram: float, keep: Path | None) -> None:
    losses = {act: outcome.loss for act, outcome in acts.items()}
    if keep is not None:
        say(f"kept the checkpoints and loss.csv in {keep}")
    if broken := failures(losses, unigram):
        raise click.ClickException(f"no rescue with seed {recipe.seed}: {'; '.join(broken)}")
    stdout().print(
        f"\nRescued: {losses['rescued']:.2f} after {recipe.resume_steps} steps. The dead run stays at "
        f"{losses['control']:.2f}, a restart reaches {losses['restart']:.2f}."
    )
