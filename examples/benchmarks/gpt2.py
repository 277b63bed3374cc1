# SPDX-License-Identifier: Apache-2.0
"""A 124M-parameter GPT-2 on a GPU: at which learning rates it lives, and what comes back after it has died.

The network is transformers' GPT-2 in bfloat16 autocast, the text Python's standard library, the loop, the methods and
the definition of death are those of the suite (`stability.py`). The range: trained from scratch at multiples of 1.5e-4.
The rescues: an *early* death (from scratch at a deadly rate, then on at that rate) and a *late* one (trained to health,
killed by a higher rate, then on at the healthy rate), each saved as a Hugging Face `Trainer` would, repaired by the
command, loaded again and trained on.

    python examples/benchmarks/gpt2.py                        # some minutes on an H100
    python examples/benchmarks/gpt2.py --size tiny --device cpu --json /tmp/tiny.json
    python examples/benchmarks/gpt2.py --report               # only the README's table, from the results

What is measured already is not measured again. Needs `pip install -e ".[test]"`.
"""

from __future__ import annotations

import json
import platform
import time
from functools import partial
from pathlib import Path

import click
import torch
from large.measuring import WAYS, at_rate, rescues
from large.network import RATE, SIZES, task
from large.report import put

RESULTS = Path(__file__).parent / "results" / "gpt2.json"
README = RESULTS.parents[3] / "README.md"


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

    def has_rate(self, method: str, multiple: float) -> bool:
        """Whether a method was tried at a rate."""
        return any((row["method"], row["multiple"]) == (method, multiple) for row in self.found["range"])

    def save(self, began: float) -> None:
        """Write the file, and say how far the work is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        ways = sum(len(death["ways"]) for death in self.found["rescues"].values())
        click.echo(f"{time.perf_counter() - began:.0f} s: {len(self.found['range'])} rates, {ways} ways after a death")


@click.command(help=__doc__.split("\n")[0])
@click.option("--size", type=click.Choice([*SIZES]), default="gpt2", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--methods", default="nothing,clip-1.0,warmup,pss-default", show_default=True, help="Of the suite.")
@click.option("--multiples", default="1,4,16,64,256", show_default=True, help="Of the rate 1.5e-4.")
@click.option("--early", default=256.0, show_default=True, help="Multiple that kills from the start.")
@click.option("--late", default=256.0, show_default=True, help="Multiple that kills what has learned.")
@click.option("--ways", default=",".join(WAYS), show_default=True, help="After a death.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=RESULTS, help="Where the numbers go.")
@click.option("--report", "only_report", is_flag=True, help="The README's table from the results; measure nothing.")
def main(
    size: str, device: str, methods: str, multiples: str, early: float, late: float, ways: str, out: Path,
    only_report: bool,
) -> None:  # fmt: skip
    """Measure what is missing, then write the README's table."""
    if not only_report:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError("this needs a GPU; --size tiny --device cpu tries the program out")
        began, learned = time.perf_counter(), task(SIZES[size], device, early, late)
        results = Results(out, {
            "size": size, "rate": RATE, "steps": learned.steps, "trivial": learned.trivial,
            "versions": versions(device),
        })  # fmt: skip
        results.save(began)
        for multiple in map(float, filter(None, multiples.split(","))):
            for method in methods.split(","):
                if not results.has_rate(method, multiple):
                    row = {"method": method, "multiple": multiple} | at_rate(learned, method, multiple)
                    results.found["range"].append(row)
                    results.save(began)
        for kind, multiple in (("early", early), ("late", late)):
            if multiple:
                death = results.found["rescues"].setdefault(kind, {})
                rescues(learned, kind, ways.split(","), death, partial(results.save, began))
    if out == RESULTS and out.exists():
        put(README, json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
