# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged checkpoints of every format: a repair, or one sentence that says why not; nothing else.

Cases run in processes of their own with little memory. A case that breaks a rule is printed with its number and
the seed: ``PSS_FUZZ_SEED=SEED PSS_FUZZ_CASE=NUMBER pytest -m "" tests/checkpoint/test_fuzz.py -k replay`` runs it
again alone.
"""

import os
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fuzz_pickles import MARKER, PAYLOADS
from fuzz_seeds import make_seeds

TESTS = Path(__file__).resolve().parents[1]
SEED = os.environ.get("PSS_FUZZ_SEED", "1")
SILENCE = 90
"""Seconds without a word from a worker after which it hangs; it stops a slow case itself after 20."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "made").mkdir()
    path = folder / "seeds.pickle"
    path.write_bytes(pickle.dumps(make_seeds(folder / "made")))
    return path


class Worker:
    """A process that runs every ``step``-th case from ``first`` on."""

    def __init__(self, seeds, first, step, count, seconds):
        words = [sys.executable, TESTS / "fuzz_worker.py", seeds, SEED, first, step, count, seconds]
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.log = seeds.with_name(f"errors-{first}-{time.monotonic_ns()}")
        with self.log.open("wb") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                list(map(str, words)), stdout=pipe, stderr=log, env=environment, cwd=seeds.parent
            )
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.decode(errors="backslashreplace"))
        self.lines.put(None)

    def output(self):
        """Everything that it says until it ends; ends it where it hangs."""
        lines = []
        try:
            while (line := self.lines.get(timeout=SILENCE)) is not None:
                lines.append(line)
        except queue.Empty:
            self.process.kill()
            pytest.fail(f"the worker hangs in a case after {lines[-1:]}; PSS_FUZZ_SEED={SEED}")
        finally:
            code = self.process.wait()
            self.process.stdout.close()
        text = "".join(lines)
        assert code == 0, f"the worker died with {code} after {lines[-2:]}; seed {SEED}\n{self.log.read_text()[-3000:]}"
        return text


def fuzz(seeds, workers, count, seconds, begin=0):
    """Run cases in several processes at once; returns the number of cases by seed and outcome."""
    running = [Worker(seeds, begin + first, workers, count // workers, seconds) for first in range(workers)]
    text = "".join(worker.output() for worker in running)
    bad = re.findall(r"^(\d+ BAD .*?)^END$", text, re.MULTILINE | re.DOTALL)
    assert not bad, f"{len(bad)} cases break a rule, PSS_FUZZ_SEED={SEED}:\n\n" + "\n\n".join(bad[:5])
    found = {}
    for seed, outcome in re.findall(r"^\d+ ([a-z ]+): \w+, (\w+)$", text, re.MULTILINE):
        found.setdefault(seed, {}).setdefault(outcome, 0)
        found[seed][outcome] += 1
    return found


def total(found):
    return sum(sum(outcomes.values()) for outcomes in found.values())


def test_damaged_checkpoints_of_every_format_are_repaired_or_refused(seeds):
    found = fuzz(seeds, 1, 400, 60)
    assert set(found) == set(pickle.loads(seeds.read_bytes()))
    assert total(found) >= 100  # of 400; a slow machine is stopped by the clock
    # Damage is gentle enough to reach the writer, and hard enough to be noticed.
    assert all(outcomes.get("CheckpointError", 0) for outcomes in found.values()), found
    assert sum(outcomes.get("done", 0) for outcomes in found.values()) > 0.05 * total(found), found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tens_of_thousands_of_damaged_checkpoints(seeds, record_property):
    start = time.monotonic()
    found = fuzz(seeds, min(2, os.cpu_count() or 1), 60_000, 120)
    if total(found) < 10_000:  # a busy machine gets twice the time, for other cases
        more = fuzz(seeds, min(2, os.cpu_count() or 1), 20_000, 120, 60_000)
        found = {seed: {o: n + more.get(seed, {}).get(o, 0) for o, n in rows.items()} for seed, rows in found.items()}
    print(f"\n{total(found)} cases in {time.monotonic() - start:.0f} s: {found}")
    record_property("cases", total(found))
    assert total(found) >= 10_000


@pytest.mark.skipif("PSS_FUZZ_CASE" not in os.environ, reason="for a case that failed; see the module's text")
def test_replay(seeds):
    fuzz_case = int(os.environ["PSS_FUZZ_CASE"])
    text = Worker(seeds, fuzz_case, 1, 1, 600).output()
    print(text)
    assert "BAD" not in text


def test_payloads_would_run_under_the_ordinary_unpickler(tmp_path, monkeypatch):
    # Else the cases above would prove nothing.
    monkeypatch.chdir(tmp_path)
    for payload in PAYLOADS:
        pickle.loads(b"\x80\2" + payload + b".")
        assert Path(MARKER).exists(), payload
        Path(MARKER).unlink()
