# SPDX-License-Identifier: Apache-2.0
"""A 124M-parameter GPT-2 on a GPU: at which learning rates it lives, and what comes back after it has died.

The network is transformers' GPT-2 in bfloat16 autocast, the text Python's standard library, the loop, the methods and
the definition of death are those of the suite (`stability.py`). The range: trained from scratch at multiples of a rate.
The rescues: an *early* death (from scratch at a deadly rate, then on at that rate) and a *late* one (trained to health,
killed by a higher rate, then on at the healthy rate), each saved as a Hugging Face `Trainer` would, repaired by the
command, loaded again and trained on.

    for seed in 0 1 2; do python examples/benchmarks/gpt2.py --seed $seed & done; wait   # ten minutes on an H100
    python examples/benchmarks/gpt2.py --size gpt2-small --device cpu --multiples 1,4,16,32,64   # on two cores
    python examples/benchmarks/gpt2.py --report               # the README's table, from the results of all seeds
    python examples/benchmarks/gpt2.py --size tiny --device cpu --json /tmp/tiny.json

What is measured already is not measured again; each figure has the commit that it was made at, or that stored it. Needs
`pip install -e ".[test]"`.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import click
import torch
from large.measuring import WAYS, at_rate, rescues
from large.network import SIZES, task
from large.report import put
from suite.store import origin
from suite.task import Task

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parents[2] / "README.md"


def stored() -> list[list[dict[str, object]]]:
    """What was measured: of each size the seeds in their order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("gpt2-*.json")]
    seeds = sorted(found, key=lambda each: each["seed"])
    return [same for size in SIZES if (same := [each for each in seeds if each["size"] == size])]


def versions(device: str) -> dict[str, str]:
    """What the figures depend on besides the code."""
    import transformers

    import pss_param

    chip = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": chip, "torch": torch.__version__, "transformers": transformers.__version__,
        "pss_param": pss_param.__version__, "python": platform.python_version(),
    }  # fmt: skip


class Results:
    """What was measured, in a file.

    Args:
        path: the file; may not exist yet.
        head: what the figures depend on.
    """

    def __init__(self, path: Path, head: dict[str, object]) -> None:
        self.path = path
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"range": [], "rescues": {}}
        self.found |= head
        self.began = time.perf_counter()

    def has_rate(self, method: str, multiple: float) -> bool:
        """Whether a method was tried at a rate."""
        return any((row["method"], row["multiple"]) == (method, multiple) for row in self.found["range"])

    def save(self) -> None:
        """Write the file, and say how far the work is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        ways = sum(len(death["ways"]) for death in self.found["rescues"].values())
        click.echo(
            f"{time.perf_counter() - self.began:.0f} s: {len(self.found['range'])} rates, {ways} ways after a death"
        )


def every_rate(learned: Task, results: Results, methods: list[str], multiples: list[float]) -> None:
    """Train from scratch wherever that was not done yet."""
    for method, multiple in product(methods, multiples):
        if not results.has_rate(method, multiple):
            row = at_rate(learned, method, multiple, results.found["seed"])
            results.found["range"].append({"method": method, "multiple": multiple, **row, "commit": origin()["commit"]})
            results.save()


@click.command(help=__doc__.split("\n")[0])
@click.option("--size", type=click.Choice([*SIZES]), default="gpt2", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--methods", default="nothing,pss-default,clip-1.0,warmup", show_default=True, help="Of the suite.")
@click.option("--multiples", default="1,4,16,64,128,256", show_default=True, help="Of the rate of the size.")
@click.option("--early", type=float, help="Multiple that kills from the start; 0 for none.  [by size]")
@click.option("--late", type=float, help="Multiple that kills what has learned; 0 for none.  [by size]")
@click.option("--ways", default=",".join(WAYS), show_default=True, help="After a death.")
@click.option("--seed", default=0, show_default=True, help="Of weights and batches.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the numbers go.  [results/SIZE-SEED.json]")
@click.option("--report", "only_report", is_flag=True, help="The README's table from the results; measure nothing.")
def main(
    size: str, device: str, methods: str, multiples: str, early: float | None, late: float | None, ways: str, seed: int,
    out: Path | None, only_report: bool,
) -> None:  # fmt: skip
    """Measure what is missing, or write the README's table."""
    if only_report:
        put(README, stored())
    elif device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("this needs a GPU; --size tiny --device cpu tries the program out")
    else:
        chosen = SIZES[size]
        chosen = replace(chosen, **{k: v for k, v in {"early": early, "late": late}.items() if v is not None})
        learned, deaths = task(chosen, device), {"early": chosen.early, "late": chosen.late}
        results = Results(out or RESULTS / f"{size}-{seed}.json", {
            "size": size, "rate": chosen.rate, "steps": learned.steps, "trivial": learned.trivial, "seed": seed,
            "versions": versions(device),
        })  # fmt: skip
        for kind, multiple in deaths.items():
            if multiple:
                death = results.found["rescues"].setdefault(f"{kind}-{multiple:g}", {"kind": kind, "deadly": multiple})
                rescues(learned, death, ways.split(","), seed, results.save)
        every_rate(learned, results, methods.split(","), [float(each) for each in multiples.split(",") if each])


if __name__ == "__main__":
    main()
