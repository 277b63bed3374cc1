# SPDX-License-Identifier: Apache-2.0
"""The README's table of what a guard costs, made from results/overhead.json and from nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
_HEAD = (
    "GPT, one thread",
    "step",
    "quiet step",
    "`StableRankFloor`",
    "triggered step (collapsed / trained / fresh weights)",
    "whole run, observed rate",
    "at the published rate",
)


def section(results: Mapping[str, Any], gpu: Mapping[str, Any] | None = None) -> str:
    """What stands between the marks.

    Args:
        results: what `overhead.py` wrote.
        gpu: what it wrote on a GPU, if it ever did.

    Returns:
        Markdown.
    """
    rows = [_HEAD, ["---"] * len(_HEAD), *(_row(line) for line in results["lines"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = f"{table}\n\n{_observed(results['run'])} {_alarmed(results['alarmed'])} {_memory(results['memory'])}\n"
    return text if gpu is None else f"{text}\n{_on_gpu(gpu)}\n"


def _row(line: Mapping[str, Any]) -> list[str]:
    ratios = (line[f"triggered_ratio_{weights}"] for weights in ("collapsed", "trained", "fresh"))
    return [
        f"width {line['width']}, {line['layers']} layers, {line['weights']} weights, {line['mode']}",
        f"{1000 * line['step_seconds']:.0f} ms",
        _percent(line["quiet_guard_share"]),
        _percent(line["floor_share"]),
        " / ".join(f"{ratio:.2f}" for ratio in ratios) + " steps",
        _percent(line["total_share_observed"]),
        _percent(line["total_share_published"]),
    ]


def _observed(run: Mapping[str, Any]) -> str:
    return (
        f"Observed: {run['triggers']} triggers in {run['steps']} steps of the first one at a learning rate of "
        f"{run['learning_rate']:g} with the guard as it comes; it took {_percent(run['guard_share'])} of their "
        "time, the denser looks of its beginning included."
    )


def _alarmed(run: Mapping[str, Any]) -> str:
    return (
        f"With {run['triggers']} triggers in {run['steps']} of its steps, all forced at the published rate, and "
        f"{100 * run['held_share']:.0f} % of the weights held in the steps of their alerts, it took "
        f"{_percent(run['guard_share'])}."
    )


def _memory(sizes: Sequence[Mapping[str, Any]]) -> str:
    shares = [[(one[kind] - one["plain"]) / one["guarded_weights"] for one in sizes] for kind in ("quiet", "triggered")]
    quiet, triggered = (" to ".join(sorted({f"{share:.2f}" for share in kind})) for kind in shares)
    return (
        "Memory at the peak of a step beyond that of a plain one, over the bytes of the guarded weights: "
        f"{quiet} where nothing fires, {triggered} where all weights are open and damped."
    )


def _on_gpu(gpu: Mapping[str, Any]) -> str:
    line, run = next(line for line in gpu["lines"] if line["mode"] == "eager"), gpu["run"]
    ratios = (f"{line[f'triggered_ratio_{weights}']:.0f}" for weights in ("collapsed", "trained", "fresh"))
    return (
        f"On one {gpu['device']} (torch {gpu['torch']}) a step of a post-norm GPT-2 of 124M parameters takes "
        f"{1000 * line['step_seconds']:.0f} ms. A quiet guard takes {_percent(line['quiet_guard_share'])} of that, "
        f"`StableRankFloor` {_percent(line['floor_share'])}; a step with all {line['weights']} weights open at the "
        f"published edge takes as long as {' / '.join(ratios)} plain ones (collapsed / trained / fresh weights): where "
        "more than a third of the values are dominant, the library's eigenvalues serve, which take 9 ms for one matrix "
        f"of 768 columns. With {run['triggers']} triggers in the "
        f"first {run['steps']} steps at a learning rate of {run['learning_rate']:g} the guard as it comes took "
        f"{_percent(run['guard_share'])} of their time."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def put(readme: Path, results: Mapping[str, Any], gpu: Mapping[str, Any] | None = None) -> None:
    """Write the figures between the README's two marks.

    Args:
        readme: the file.
        results: what `overhead.py` wrote.
        gpu: what it wrote on a GPU, if it ever did.
    """
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{section(results, gpu)}{END}{after}", encoding="utf-8")
