# SPDX-License-Identifier: Apache-2.0
"""Runs damaged checkpoints through scan and repair, one after the other, in a process with little memory.

Usage: ``python fuzz_worker.py SEEDS SEED FIRST STEP COUNT SECONDS``; cases FIRST, FIRST + STEP, ... One line a case
goes to the standard output: its number, then its outcome; what breaks a rule begins with "BAD".
"""

import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from fuzz_mutations import damage
from fuzz_pickles import MARKER
from fuzz_seeds import Tree, read_tree, write_tree

from pss_param.errors import ArgumentError, CheckpointError, NonFiniteError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.scan import scan_checkpoint

CASE_SECONDS = 20
MEMORY = 1 << 30
"""Bytes of address space beyond those after the start; seeds have a few kilobytes."""

LONGEST = 2000


class TooSlow(BaseException):
    """A case ran into its time limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number, frame):
        raise TooSlow

    # Processor time: on a busy machine a case may wait for long. One that sleeps is found by whoever reads the lines.
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(call, name: str) -> tuple[str, str]:
    """Run something that may refuse; returns the outcome in one word and what is wrong with it."""
    try:
        call()
    except (CheckpointError, NonFiniteError, ArgumentError) as error:
        return type(error).__name__, complaint(str(error), name)
    except MemoryError:
        return "MemoryError", "it takes more memory than it may: " + _where()
    except TooSlow:
        return "TooSlow", f"it takes more than {CASE_SECONDS} seconds: " + _where()
    except Exception:  # ruff: ignore[blind-except] - any other exception is what is looked for
        return "Exception", _where()
    return "done", ""


def _where() -> str:
    return traceback.format_exc(limit=-12)


def complaint(message: str, name: str) -> str:
    """What is wrong with the text of an error; empty where nothing is."""
    if name not in message:
        return f"the error does not name the file: {message[:300]!r}"
    if not message.isprintable():
        return f"the error is not one printable line: {message[:300]!r}"
    if len(message) > LONGEST:
        return f"the error has {len(message)} characters: {message[:100]!r}"
    return ""


def put_odd(path: Path, odd: str) -> None:
    """Put something into a folder that is no regular file."""
    beside = path / "model.safetensors"
    beside = beside if not beside.exists() else path / "extra.bin"
    if odd == "pipe":
        os.mkfifo(beside)
    elif odd == "folder":
        beside.mkdir()
    elif odd == "empty folder":
        (path / "new").mkdir()
    elif odd:
        beside.symlink_to({"loop": beside, "dangling": "nowhere", "outside": path.parent}[odd])


def run_case(seeds: dict[str, Tree], label: str, folder: Path) -> tuple[str, str]:
    """Damage one seed, scan and repair it, and check every promise; returns the outcome and the complaint."""
    rng = Random(label)
    seed, tree, odd = damage(seeds, rng)
    name = "case" + ("" if len(seeds[seed]) > 1 else rng.choice((".safetensors", ".pt", ".ckpt", "")))
    path, out = folder / "in" / name, folder / "out" / "result"
    for parent in (path.parent, out.parent):
        parent.mkdir()
    write_tree(tree, path)
    put_odd(path, odd)
    mode = rng.choice(("keep", "keep", "keep", "reset", "reset-all"))
    order = path / "order.json" if "order.json" in tree and rng.randrange(8) else None
    options = RepairOptions(optimizer=mode, param_order=order)
    with time_limit(CASE_SECONDS):
        scanned, wrong = attempt(lambda: scan_checkpoint(path), "case")
        repaired, more = attempt(lambda: repair_checkpoint(path, out, options), "case")
    wrong = wrong or more or check_promises(tree, path, out, repaired == "done")
    detail = f"seed {seed}, files {[n for n in tree if tree[n] != seeds[seed].get(n)]} {odd}, {mode}\n{wrong}"
    return f"{seed}: {scanned}, {repaired}", detail if wrong else ""


def check_promises(tree: Tree, path: Path, out: Path, done: bool) -> str:
    """The input is as it was, nothing ran, the output is complete or absent; returns what is not so."""
    if Path(MARKER).exists():
        Path(MARKER).unlink()
        return "a payload has run"
    if read_tree(path) != tree:
        return "the input has changed"
    left = sorted(os.listdir(out.parent))
    if left != (["result", "result.pss.json"] if done else []):
        return f"the destination's folder holds {left}"
    if done and {n: len(d) for n, d in read_tree(out).items()} != {n: len(d) for n, d in tree.items()}:
        return "the copy has other files or sizes than the input"
    return ""


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(seeds_file: str, seed: str, first: int, step: int, count: int, seconds: float) -> None:
    seeds = pickle.loads(Path(seeds_file).read_bytes())
    # Temporaries in memory: flushing thousands of files to a disk would be all that takes time.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        os.chdir(folder)
        for _ in range(2):  # what is loaded at the first use
            intact = Path("warm") / "case"
            write_tree(seeds["trainer"], intact)
            scan_checkpoint(intact)
            repair_checkpoint(intact, "warm/out")
            shutil.rmtree("warm")
        limit_memory()
        end = time.monotonic() + seconds
        for number in range(first, first + count * step, step):
            if time.monotonic() > end:
                break
            print(number, flush=True, end=" ")
            outcome, wrong = run_case(seeds, f"{seed}/{number}", Path(folder))
            print(f"BAD {outcome}\n{wrong}\nEND" if wrong else outcome, flush=True)
            for name in ("in", "out"):
                shutil.rmtree(name)
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), float(sys.argv[6]))
