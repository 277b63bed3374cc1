# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a repair against a plain copy, on a sharded synthetic checkpoint made and removed here.

    python examples/benchmarks/checkpoint.py --gigabytes 8 --json checkpoint.json

Repair and `cp -r` take turns on the same folder. Before each, the source's pages are dropped from the cache and
everything dirty is written back. Copying dominates here: one of the many matrices is repaired. A repair ends when
everything is on the disk (fsync), `cp` when it is in memory: `ratio_to_cp` compares these although the repair does
more, `ratio_to_cp_and_sync` compares with `cp` followed by `sync` on its result.
Bytes are the kernel's counts for the process (/proc/self/io) without its imports, as multiples of the checkpoint's:
`asked` is what it read through the page cache or from the disk, `fetched` what came from the disk, `written` what it
wrote. Memory is the peak of a process that repairs, above that of one that only imports torch.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import pss_param

WIDE, NARROW = 11008, 4096
PEAK = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024"
BASE = f"import json, torch; print(json.dumps({{'peak': {PEAK}}}))"
WORK = f"""
import json, sys, time
import pss_param as pss
count = lambda: {{key: int(value) for key, value in (line.split(": ") for line in open("/proc/self/io"))}}
before, start = count(), time.perf_counter()
verify = sys.argv[3] == "verify"
options = pss.RepairOptions(targets="none", include=("layers.0.self_attn.q_proj",), verify=verify, device="cpu")
report = pss.repair_checkpoint(sys.argv[1], sys.argv[2], options)
seconds, after = time.perf_counter() - start, count()
moved = {{key: after[key] - before[key] for key in ("rchar", "wchar", "read_bytes")}}
print(json.dumps({{"seconds": seconds, "changed": len(report.changed), "peak": {PEAK}, **moved}}))
"""
IO = {"asked": "rchar", "fetched": "read_bytes", "written": "wchar"}


def make(folder: Path, gigabytes: float) -> int:
    """Write shards of about one gigabyte; returns the bytes of all of them."""
    folder.mkdir()
    layer_bytes = 2 * (3 * WIDE + 4 * NARROW) * NARROW
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    per_shard = max(1, round(1e9 / layer_bytes))
    shards = [range(first, min(first + per_shard, layers)) for first in range(0, layers, per_shard)]
    weight_map = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: value for layer in members for name, value in weights(layer)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def weights(layer: int):
    """The matrices of one layer, each with one strong direction; bytes differ from layer to layer."""
    source = torch.Generator().manual_seed(layer)
    shapes = {f"self_attn.{name}_proj": (NARROW, NARROW) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (WIDE, NARROW), "mlp.up_proj": (WIDE, NARROW), "mlp.down_proj": (NARROW, WIDE)}
    for name, (m, n) in shapes.items():
        weight = torch.empty(m, n, dtype=torch.bfloat16).normal_(generator=source).mul_(n**-0.5)
        weight += 0.05 * torch.randn(m, 1, generator=source).sign() * torch.randn(1, n, generator=source).sign()
        yield f"model.layers.{layer}.{name}.weight", weight


def settle(source: Path, result: Path) -> None:
    """Remove the last result, write back what is dirty, drop the source's pages: the same start for everyone."""
    shutil.rmtree(result, ignore_errors=True)
    result.with_name(result.name + ".pss.json").unlink(missing_ok=True)
    os.sync()
    for path in source.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def child(*command: str) -> dict[str, float]:
    """Run a process; its wall time and the figures that it printed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed with {process.returncode}")
    return {"wall": time.perf_counter() - start, **json.loads(said)}


def turn(source: Path, result: Path) -> dict[str, float]:
    """One repair with and one without the check, and one copy."""
    row: dict[str, float] = {}
    for mode in ("verify", "no-verify"):
        settle(source, result)
        outcome = child(sys.executable, "-c", WORK, str(source), str(result), mode)
        row[mode], row[f"{mode}_process"], row[f"{mode}_peak"] = outcome["seconds"], outcome["wall"], outcome["peak"]
        row["changed"] = outcome["changed"]
        row |= {f"{mode}_{word}": outcome[key] for word, key in IO.items()}
    settle(source, result)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(result)], check=True)
    row["cp"] = time.perf_counter() - start
    subprocess.run(["sync", *map(str, result.iterdir())], check=True)
    row["cp_sync"] = time.perf_counter() - start
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; needs twice the size")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="pss-benchmark-", dir=args.folder))
    try:
        figures = measure(place, args.gigabytes, args.runs)
    finally:
        shutil.rmtree(place)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def measure(place: Path, gigabytes: float, runs: int) -> dict[str, object]:
    """Make the checkpoint, take turns, sum up."""
    size = make(place / "source", gigabytes)
    base = min(child(sys.executable, "-c", BASE)["peak"] for _ in range(3))
    rows = []
    for number in range(runs):
        rows.append(turn(place / "source", place / "result"))
        print(f"run {number + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    largest = WIDE * NARROW * 4
    above = max(max(row["verify_peak"], row["no-verify_peak"]) for row in rows) - base
    return {
        "bytes": size,
        "largest_tensor_float32": largest,
        "peak_above_torch": above,
        "peak_bound": 4 * largest + 300_000_000,
        "peak_within_bound": above <= 4 * largest + 300_000_000,
        "median_seconds": middle,
        "bytes_per_byte": {
            mode: {word: middle[f"{mode}_{word}"] / size for word in IO} for mode in ("verify", "no-verify")
        },
        "ratio_to_cp": {key: middle[key] / middle["cp"] for key in ("verify", "no-verify")},
        "ratio_to_cp_and_sync": {key: middle[key] / middle["cp_sync"] for key in ("verify", "no-verify")},
        "runs": rows,
        "versions": {"pss_param": pss_param.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


if __name__ == "__main__":
    main()
