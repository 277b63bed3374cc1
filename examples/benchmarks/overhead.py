# SPDX-License-Identifier: Apache-2.0
"""What a guard costs: small GPTs on a CPU, GPT-2 124M on a GPU where there is one, eager and compiled.

All times of one line come from one process, taken in turns (plain, guarded, floor, triggered, plain, ...), so that a
busy machine slows them alike; medians. Two measures of the quiet guard are given, because a share of 0.1 % drowns in
the noise of whole steps: the time spent inside `guard.step` and in reading closed views, over the plain step; and the
ratio of whole steps. Figures of a line (shares and ratios are of one plain step, 1 = as long as that step):

    quiet_guard_seconds      inside guard.step(norm) when GradientNormRatio does not fire, caches as the step left them
    quiet_guard_share        the same, and reading closed views, as a share; goal 0.002
    quiet_step_ratio         whole guarded steps over plain ones; noise included
    floor_share              StableRankFloor at its default period, per step; goal 0.01. More often at first and
                             after a trigger, at most at every step: period times as much
    triggered_ratio_fresh    a step whose forward pass reads open gates on all weights, over a plain one: fresh weights
    triggered_ratio_trained  the same after some steps of training; goal 2.4 (published), aim 1.2
    triggered_ratio_collapsed  the same where four directions have taken over every weight (stable rank about 5), as
                             where a detector fires; directions that are few cost less to find in larger matrices
    total_share_at_published_rate  quiet_guard_share + 0.0025 x (triggered_ratio_trained - 1); goal 0.002
    seconds                  what this line took

The smallest size takes about half a minute, the largest CPU size a few minutes, compiled ones a minute more for the
compiler. Run it on a machine with nothing else to do:

    python examples/benchmarks/overhead.py [--sizes small,medium,large] [--modes eager,compiled] [--rounds 8]
"""

import argparse
import json
import platform
import statistics
import time
import timeit
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import pss_param as pss

RESULTS = Path(__file__).parent / "results" / "overhead.json"


@dataclass(frozen=True)
class Size:
    """A network and its batch."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    vocabulary: int = 512


SIZES = {
    "small": Size(128, 4, 4, 128, 8),
    "medium": Size(256, 4, 4, 256, 8),
    "large": Size(384, 6, 6, 256, 8),
    "gpt2": Size(768, 12, 12, 1024, 8, 50304),
}


class Block(nn.Module):
    """Post-LN: this is where guards are needed."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, width = size.heads, size.width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.first(x + self.proj(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class GPT(nn.Module):
    """A decoder."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Bench:
    """One model, one optimizer, one batch after the other; steps that are timed."""

    def __init__(self, size: Size, device: str, compiled: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.size, self.device = size, device
        self.model = GPT(size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.guard = pss.attach(
            self.model, detector=pss.GradientNormRatio(), policy=pss.GuardPolicy(max_trigger_rate=1)
        )
        self.run = torch.compile(self.model) if compiled else self.model
        self.calls = 0

    def backward(self) -> Tensor:
        """Forward, backward, and the norm that the user computes anyway."""
        self.calls += 1
        source = torch.Generator().manual_seed(self.calls)
        # Markov text: a learnable rule (the next token is near the last one) rather than noise.
        steps = torch.randint(0, 4, (self.size.batch, self.size.context + 1), generator=source)
        tokens = (steps.cumsum(1) * 7 % self.size.vocabulary).to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.run(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        return nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def timed(self, guarded: bool, trigger: bool = False) -> tuple[float, float]:
        """Seconds of one step and of `guard.step` within it; a trigger is opened before and folded inside."""
        self.wait()
        start = time.perf_counter()
        if trigger:
            self.guard._open(list(self.guard.views.values()))  # what guard.step() does when its detector fires
        norm = self.backward()
        inner = time.perf_counter()
        if guarded:
            self.guard.step(norm)
        inner = time.perf_counter() - inner
        if self.guard.is_open and not trigger:
            self.guard.discard()  # the detector's own triggers are not what is timed here
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - start, inner

    def wait(self) -> None:
        """Let the device finish."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def floor_seconds(self) -> float:
        """Seconds that StableRankFloor takes a step, at its default period."""
        floor = pss.StableRankFloor()
        floor.bind(self.guard._matrices)
        floor.look(self.guard._matrices)  # the first one measures what later ones are compared with
        self.wait()
        start = time.perf_counter()
        floor.step = floor.seen = 1 << 20  # long after its dense looks at the start
        for _ in range(floor.period):
            looks = [look.tolist() for look in floor.look(self.guard._matrices)]
            floor.judge(1.0, looks)
        return (time.perf_counter() - start) / floor.period

    def read_seconds(self) -> float:
        """Seconds that closed views add to the reads of one forward pass."""
        plain, viewed = nn.Linear(8, 8), self.model.blocks[0].up
        ours, theirs = (min(timeit.repeat(lambda m=m: m.weight, number=5000, repeat=5)) for m in (viewed, plain))
        return max(0.0, ours - theirs) / 5000 * len(self.guard.views)


def triggered_ratio(bench: Bench, rounds: int) -> tuple[float, float]:
    """A triggered step over a plain one, at the bench's present weights, which are put back each time."""
    saved = {key: value.detach().clone() for key, value in bench.model.state_dict().items()}
    bench.timed(True, trigger=True)
    plain, fired = [], []
    for _ in range(rounds):
        bench.model.load_state_dict(saved)
        plain.append(bench.timed(False)[0])
        bench.model.load_state_dict(saved)
        fired.append(bench.timed(True, trigger=True)[0])
    bench.model.load_state_dict(saved)
    return statistics.median(f / p for f, p in zip(fired, plain, strict=True)), statistics.median(plain)


@torch.no_grad()
def collapse(bench: Bench) -> None:
    """Give every guarded weight four directions that hold most of its energy: a stable rank of about 5."""
    source, strengths = torch.Generator().manual_seed(1), torch.tensor([1.0, 0.9, 0.8, 0.7])
    weights = dict(bench.model.named_parameters())
    for name in bench.guard.views:
        m, n = weights[name].shape
        left = torch.linalg.qr(torch.randn(m, 4, generator=source)).Q
        right = torch.linalg.qr(torch.randn(n, 4, generator=source)).Q.T
        weights[name].add_((left * strengths @ right).to(bench.device), alpha=float(weights[name].norm()) / 1.5)


def measure(name: str, device: str, mode: str, rounds: int) -> dict[str, object]:
    """All figures of one size."""
    began = time.perf_counter()
    bench = Bench(SIZES[name], device, mode == "compiled")
    for _ in range(2):
        bench.timed(True)
    fresh, _ = triggered_ratio(bench, max(2, rounds // 2))
    plain, whole, inner, floor = [], [], [], []
    for _ in range(rounds):
        plain.append(bench.timed(False)[0])
        seconds, inside = bench.timed(True)
        whole.append(seconds / plain[-1])
        inner.append(inside)
        floor.append(bench.floor_seconds())
    step = statistics.median(plain)
    before = bench.guard.steps, bench.guard.triggers
    for _ in range(3 * rounds):  # on to where weights look as they do when a detector fires
        bench.timed(True)
    trained, _ = triggered_ratio(bench, rounds)
    collapse(bench)
    collapsed, _ = triggered_ratio(bench, max(2, rounds // 2))
    quiet = (statistics.median(inner) + bench.read_seconds()) / step
    rate = (bench.guard.triggers - before[1]) / max(1, bench.guard.steps - before[0])
    return {
        "size": name,
        "mode": mode,
        **asdict(SIZES[name]),
        "weights": len(bench.guard.views),
        "step_seconds": step,
        "quiet_guard_seconds": statistics.median(inner),
        "quiet_guard_share": quiet,
        "quiet_step_ratio": statistics.median(whole),
        "floor_share": statistics.median(floor) / step,
        "triggered_ratio_fresh": fresh,
        "triggered_ratio_trained": trained,
        "triggered_ratio_collapsed": collapsed,
        "trained_steps": bench.calls,
        "trigger_rate_here": rate,
        "total_share_at_published_rate": quiet + 0.0025 * (trained - 1),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = "gpt2" if device == "cuda" else "small,medium,large"
    parser.add_argument("--sizes", default=sizes, help=f"of {', '.join(SIZES)}, with commas between (%(default)s)")
    parser.add_argument("--modes", default="eager,compiled", help="of eager and compiled (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each kind (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file for the results (results/overhead.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    head = {"pss_param": pss.__version__, "torch": torch.__version__, "python": platform.python_version()}
    head |= {"device": processor, "seed": 0, "threads": torch.get_num_threads(), "rounds": options.rounds}
    print(json.dumps(head))
    lines = []
    for name in options.sizes.split(","):
        for mode in options.modes.split(","):
            lines.append(measure(name, device, mode, options.rounds))
            print(json.dumps(lines[-1]), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({**head, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
