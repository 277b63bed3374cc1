# SPDX-License-Identifier: Apache-2.0
"""What a guard costs: small GPTs on a CPU, GPT-2 124M on a GPU where there is one, eager and compiled.

All times of one line come from one process, taken in turns (plain, guarded, floor, triggered, plain, ...), so that a
busy machine slows them alike; medians. Two measures of the quiet guard are given, because a share of 0.1 % drowns in
the noise of whole steps: the time spent inside `guard.step` and in reading closed views, over the plain step; and the
ratio of whole steps. Figures of a line (shares and ratios are of one plain step, 1 = as long as that step):

    quiet_guard_seconds      inside guard.step(norm) when GradientNormRatio does not fire, caches as the step left them
    quiet_guard_share        the same, and reading closed views, as a share; goal 0.002
    quiet_step_ratio         whole guarded steps over plain ones; noise included
    look_seconds             one look of StableRankFloor at all weights
    floor_share              StableRankFloor at its default period, per step; goal 0.01
    triggered_ratio_fresh    a step whose forward pass reads open gates on all weights, and whose optimizer's step damps
                             them, over a plain one, at the published edge: fresh weights
    triggered_ratio_trained  the same after some steps of training; goal 2.4 (published), aim 1.2
    triggered_ratio_collapsed  the same where four directions have taken over every weight (stable rank about 5), as
                             where a detector fires; directions that are few cost less to find in larger matrices
    triggered_decomposing    the part of triggered_ratio_trained - 1 that is linear algebra: finding the directions
    damped_share             damping all weights in the optimizer's step: copies before, drawing back after
    total_share_observed     of a run of 2,500 steps under the default detector: quiet steps, looks (dense at first and
                             after each trigger), and triggers of all weights at the rate of `run`, each with the steps
                             that are damped after it; goal 0.002
    total_share_published    the same at the published rate of triggers, 0.0025, all owed to the gradient norm: each
                             with its alert, in which weights are held as often as in `alarmed`
    seconds                  what this line took

`run` is a training run of 2,500 steps of the smallest size with pss.attach as it comes at a sane rate. Nothing in it is
extrapolated: the time inside guard.step, in reading open gates and in damping, over the rest of the run; goal 0.002.
`alarmed` is its beginning again with a false alarm every 400 steps, the published rate of triggers: none is needed.
`memory` has the most bytes that one step allocates: plain, quiet, and triggered with all weights open and damped.

    python examples/benchmarks/overhead.py [--sizes small,medium,large] [--modes eager,compiled] [--run-steps 2500]
    python examples/benchmarks/overhead.py --report     # only writes the README's table from results/overhead.json
"""

import argparse
import contextlib
import itertools
import json
import math
import platform
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from overhead_table import put
from suite.methods.triggers import Periodic
from torch import Tensor, nn

import pss_param as pss
from pss_param.damping import Damping

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results" / "overhead.json", HERE.parents[1] / "README.md"
GPU_RESULTS = RESULTS.with_name("overhead-gpu.json")
WHOLE_RUN, PUBLISHED_RATE = 2500, 0.0025


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

    def __init__(
        self,
        size: Size,
        device: str,
        compiled: bool,
        detector: pss.Detector | None = None,
        rate: float = 3e-3,
    ) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.model = GPT(size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        policy = pss.GuardPolicy(max_trigger_rate=1)
        self.guard = pss.attach(self.model, detector=detector, policy=policy)
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
        if trigger:  # what guard.step() does when its detector fires
            opened = self.guard._open(list(self.guard.views.values()))
            self.guard._damping.strike(dict.fromkeys(opened, self.guard.policy.damping))
        norm = self.backward()
        self.wait()  # or the guard would be charged for the backward pass, of which it reads the norm
        inner = time.perf_counter()
        if guarded:
            self.guard.step(norm)
        inner = time.perf_counter() - inner
        if self.guard.is_open and not trigger:
            self.guard.discard()  # the detector's own triggers are not what is timed here
            self.guard._damping.stop()
        self.optimizer.step()
        self.wait()
        seconds = time.perf_counter() - start
        self.guard._damping.stop()
        return seconds, inner

    def wait(self) -> None:
        """Let the device finish."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def look_seconds(self, rounds: int) -> float:
        """Seconds of one look of StableRankFloor, and of judging it; caches as a step leaves them."""
        floor = pss.StableRankFloor()
        floor.bind(self.guard._matrices)
        floor.look(self.guard._matrices)  # the first one measures what later ones are compared with
        taken = []
        for _ in range(max(2, rounds)):  # from either side of the matrices in turn
            self.timed(False)
            floor.step += floor.period
            start = time.perf_counter()
            floor.judge(1.0, [look.tolist() for look in floor.look(self.guard._matrices)])
            taken.append(time.perf_counter() - start)
        return statistics.mean((statistics.median(taken[::2]), statistics.median(taken[1::2])))

    def read_seconds(self) -> float:
        """Seconds that closed views add to the reads of one forward pass."""
        plain, viewed = nn.Linear(8, 8), self.model.blocks[0].up
        ours, theirs = (min(timeit.repeat(lambda m=m: m.weight, number=5000, repeat=5)) for m in (viewed, plain))
        return max(0.0, ours - theirs) / 5000 * len(self.guard.views)


def triggered_ratio(bench: Bench, rounds: int) -> tuple[float, float]:
    """A triggered step over a plain one, at the bench's present weights, which are put back each time."""
    saved = {key: value.detach().clone() for key, value in bench.model.state_dict().items()}
    bench.timed(True, trigger=True)
    bench.model.load_state_dict(saved)
    bench.timed(False)  # whatever is compiled anew for this state of the gates is not what is timed
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


def looks_of_a_run(triggers: int, own: bool = True) -> int:
    """Looks of StableRankFloor in WHOLE_RUN steps: its first ones, its schedule, and more after each trigger."""
    floor = pss.StableRankFloor()
    looks, fires = 2 * floor.settle_iterations, {WHOLE_RUN * (i + 1) // (triggers + 1) for i in range(triggers)}
    for step in range(1, WHOLE_RUN + 1):
        floor.step = step
        if floor._is_time():
            floor.seen, looks = step, looks + 1
        if step in fires:
            floor.alarm()
            floor.fired = step if own else floor.fired
    return looks


def steps_damped() -> float:
    """Steps until one trigger by itself is forgotten, with the policy's damping."""
    return math.log(pss.GuardPolicy().damping) / -math.log(Damping.forgetting)


@contextlib.contextmanager
def timing_of(owner: type, *names: str) -> Iterator[dict[str, float]]:
    """Seconds spent in methods of a class inside the block, by name."""
    spent, originals = dict.fromkeys(names, 0.0), {name: getattr(owner, name) for name in names}

    def timed(name: str) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return originals[name](*args, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    for name in names:
        setattr(owner, name, timed(name))
    try:
        yield spent
    finally:
        for name in names:
            setattr(owner, name, originals[name])


def alarming() -> pss.Detector:
    """The default detector, and one that fires for nothing, at the published rate."""
    return pss.AnyOf(pss.GradientNormRatio(), pss.StableRankFloor(), Periodic(round(1 / PUBLISHED_RATE)))


def observe(
    name: str, device: str, steps: int, detector: pss.Detector | None = None, rate: float = 1e-3
) -> dict[str, object]:
    """A real run: how often the detector triggers, and what the guard took of it."""
    bench, inner, opened = Bench(SIZES[name], device, False, detector, rate), 0.0, 0
    bench.backward()  # what is set up once
    start = time.perf_counter()
    with timing_of(pss.SmoothingView, "forward") as spent, timing_of(Damping, "before", "after") as damped:
        for step in range(steps):
            for group in bench.optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50)
            norm = bench.backward()
            bench.wait()
            before = time.perf_counter()
            opened += len(bench.guard.step(norm).smoothed)
            bench.wait()
            inner += time.perf_counter() - before
            bench.optimizer.step()
    own, whole = inner + spent["forward"] + sum(damped.values()), time.perf_counter() - start
    triggers, weights = bench.guard.triggers, len(bench.guard.views)
    in_alerts = triggers * pss.StableRankFloor().alert * weights
    return {
        "size": name,
        "learning_rate": rate,
        "steps": steps,
        "triggers": triggers,
        "weights_opened": opened,
        "rate": triggers / steps,
        "rate_of_whole_openings": opened / weights / steps,
        "held_share": (opened - triggers * weights) / in_alerts if in_alerts else 0.0,
        "guard_seconds": own,
        "guard_share": own / (whole - own),
    }


def measure(
    name: str, device: str, mode: str, rounds: int, run: dict[str, object], alarmed: dict[str, object]
) -> dict[str, object]:
    """All figures of one size."""
    began = time.perf_counter()
    bench = Bench(SIZES[name], device, mode == "compiled", pss.GradientNormRatio())
    for _ in range(2):
        bench.timed(True)
    fresh, step = triggered_ratio(bench, 2)
    rounds = max(2, min(rounds, round(6 / step)))
    plain, whole, inner = [], [], []
    for _ in range(rounds):
        plain.append(bench.timed(False)[0])
        seconds, inside = bench.timed(True)
        whole.append(seconds / plain[-1])
        inner.append(inside)
    step, look = statistics.median(plain), bench.look_seconds(rounds)
    for _ in range(rounds):  # on to where weights look as they do when a detector fires
        bench.timed(True)
    with timing_of(pss.SmoothingView, "_found") as spent, timing_of(Damping, "before", "after") as damping:
        trained, _ = triggered_ratio(bench, rounds)
    collapse(bench)
    collapsed, _ = triggered_ratio(bench, 2)
    quiet = (statistics.median(inner) + bench.read_seconds()) / step
    damped = sum(damping.values()) / (rounds + 1) / step

    def total(seen: dict[str, object], own: bool) -> float:
        looks = looks_of_a_run(round(seen["rate"] * WHOLE_RUN), own) / WHOLE_RUN
        return quiet + looks * look / step + seen["rate_of_whole_openings"] * (trained - 1 + steps_damped() * damped)

    return {
        "size": name,
        "mode": mode,
        **asdict(SIZES[name]),
        "weights": len(bench.guard.views),
        "step_seconds": step,
        "quiet_guard_seconds": statistics.median(inner),
        "quiet_guard_share": quiet,
        "quiet_step_ratio": statistics.median(whole),
        "look_seconds": look,
        "floor_share": look / pss.StableRankFloor().period / step,
        "triggered_ratio_fresh": fresh,
        "triggered_ratio_trained": trained,
        "triggered_ratio_collapsed": collapsed,
        "triggered_decomposing": spent["_found"] / (rounds + 1) / step,
        "damped_share": damped,
        "trained_steps": bench.calls,
        "total_share_observed": total(run, own=True),
        "total_share_published": total(alarmed, own=False),
        "seconds": time.perf_counter() - began,
    }


def peak_bytes(bench: Bench, call: Callable[[], object]) -> int:
    """The most bytes that a call holds beyond what was there when it began."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    for _ in range(2):  # what was allocated before the first is unknown to it when it is freed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [bytes for _, bytes in sorted((event.start_ns(), event.nbytes()) for event in events)]
    return max(itertools.accumulate(changes, initial=0))


def memory(name: str, device: str) -> dict[str, object]:
    """Memory of one size: of steps whose buffers, moments and gradients are there already."""
    bench = Bench(SIZES[name], device, compiled=False, rate=1e-5)  # at which nothing fires by itself
    steps = {"plain": (False, False), "quiet": (True, False), "triggered": (True, True)}
    for guarded, trigger in steps.values():
        bench.timed(guarded, trigger)
    peaks = {kind: peak_bytes(bench, lambda how=how: bench.timed(*how)) for kind, how in steps.items()}
    weights = dict(bench.model.named_parameters())
    return {"size": name, "guarded_weights": sum(weights[view].nbytes for view in bench.guard.views), **peaks}


def head_of(options: argparse.Namespace, device: str) -> dict[str, object]:
    """What the figures depend on besides the code."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"pss_param": pss.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": processor, "seed": 0, "threads": torch.get_num_threads(), "rounds": options.rounds}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = "gpt2" if device == "cuda" else "small,medium,large"
    parser.add_argument("--sizes", default=sizes, help=f"of {', '.join(SIZES)}, with commas between (%(default)s)")
    parser.add_argument("--modes", default="eager,compiled", help="of eager and compiled (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each kind, at most (%(default)s)")
    parser.add_argument("--run-steps", type=int, default=WHOLE_RUN, help="steps of the run under watch (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU (%(default)s)")
    output = GPU_RESULTS if device == "cuda" else RESULTS
    parser.add_argument("--output", type=Path, default=output, help=f"the file for the results (results/{output.name})")
    parser.add_argument("--add", action="store_true", help="keep the run and the other lines that the file has")
    parser.add_argument(
        "--memory", action="store_true", help="measure memory anew, and keep all times that the file has"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write the README's table")
    options = parser.parse_args()
    if options.memory:
        old = json.loads(options.output.read_text(encoding="utf-8"))
        old["memory"] = [memory(name, device) for name in options.sizes.split(",")]
        options.output.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")
    elif not options.report:
        torch.set_num_threads(options.threads)
        _measure_all(options, device)
    if options.output in {RESULTS, GPU_RESULTS}:
        put(README, json.loads(RESULTS.read_text(encoding="utf-8")), stored_gpu())


def stored_gpu() -> dict[str, object] | None:
    """What was measured on a GPU, if it ever was."""
    return json.loads(GPU_RESULTS.read_text(encoding="utf-8")) if GPU_RESULTS.exists() else None


def _measure_all(options: argparse.Namespace, device: str) -> None:
    results = head_of(options, device)
    if options.add:
        old = json.loads(options.output.read_text(encoding="utf-8"))
        runs = {kind: old[kind] for kind in ("run", "alarmed")}
        lines = {(line["size"], line["mode"]): line for line in old["lines"]}
    else:
        first, steps, lines = options.sizes.split(",")[0], options.run_steps, {}
        runs = {"run": observe(first, device, steps), "alarmed": observe(first, device, steps // 2, alarming())}
    runs["memory"] = [memory(name, device) for name in options.sizes.split(",")]
    print(json.dumps(results | runs), flush=True)
    for name in options.sizes.split(","):
        for mode in options.modes.split(","):
            lines[name, mode] = measure(name, device, mode, options.rounds, runs["run"], runs["alarmed"])
            print(json.dumps(lines[name, mode]), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(results | runs | {"lines": list(lines.values())}, indent=1)
            options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
