# SPDX-License-Identifier: Apache-2.0
"""The suite's bookkeeping: resuming, counting, and tables that say what the records say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the examples are in the repository only", allow_module_level=True)
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from suite import ablations, headline, ranges, rescues, runner, sentences, tables  # noqa: E402
from suite.deaths import dead, phases  # noqa: E402
from suite.methods import METHODS  # noqa: E402
from suite.plans import HEADLINE, PROFILES, RIVALS, further  # noqa: E402
from suite.records import Records  # noqa: E402
from suite.remedies import REMEDIES  # noqa: E402
from suite.spec import Spec  # noqa: E402
from suite.states import HEALTHY, KILLED  # noqa: E402
from suite.store import Store, origin  # noqa: E402
from suite.task import tasks  # noqa: E402
from suite.training import Trace, fresh, go_on, train  # noqa: E402

TRIVIAL = 3.0


def result(final: float | None, steps: int = 300, **more: object) -> dict[str, object]:
    curve = [TRIVIAL if final is None else final] * (steps // 10)
    return {"final": final, "trivial": TRIVIAL, "steps": steps, "curve": curve, "events": 0, "seconds": 1.0, **more}


def records(measured: dict[Spec, dict[str, object]]) -> Records:
    return Records({"spec": asdict(spec), "result": r, "origin": {}} for spec, r in measured.items())


def test_a_store_finds_what_is_missing_and_forgets_on_demand(tmp_path):
    store = Store(tmp_path / "deep" / "results.jsonl")
    one, two = (Spec("range", "gpt", method, 0) for method in ("nothing", "warmup"))
    store.add([(one, result(1.0))], origin())
    assert store.missing([two, one, two]) == [two]
    assert store.drop("nothing") == 1
    assert store.missing([one]) == [one]


def test_a_line_cut_short_is_measured_again_and_spoils_no_other(tmp_path):
    store = Store(tmp_path / "results.jsonl")
    one, two, three = (Spec("range", "gpt", "nothing", seed) for seed in range(3))
    store.add([(one, result(1.0)), (two, result(1.0))], {})
    store.path.write_bytes(store.path.read_bytes()[:-20])
    store.add([(three, result(1.0))], {})
    assert store.missing([one, two, three]) == [two]


def test_a_run_is_dead_by_its_last_fifty_steps():
    assert not Trace([TRIVIAL] * 10 + [1.0] * 50).dead(TRIVIAL)
    assert Trace([1.0] * 50 + [TRIVIAL] * 50).dead(TRIVIAL)
    assert Trace([1.0] * 50 + [math.nan]).dead(TRIVIAL)
    assert Trace([1.0] * 100 + [TRIVIAL] * 100).death(TRIVIAL) in range(80, 101)
    assert Trace([1.0] * 100).death(TRIVIAL) is None


def test_the_range_ends_at_the_first_rate_that_kills():
    losses = {0.5: 2.0, 1.0: 1.0, 2.0: 1.5, 4.0: None, 8.0: 1.0, 16.0: None, 32.0: None}
    found = records({Spec("range", "gpt", "nothing", 0, m): result(final) for m, final in losses.items()})
    assert ranges.largest(found, "gpt", "nothing") == 2.0
    assert ranges.best_rate(found, "gpt") == 1.0
    assert ranges.sensitivity(found, "gpt", "nothing").mean == pytest.approx((5.5 + 3 * TRIVIAL) / 7 - 1)


def test_a_method_that_was_not_asked_for_the_whole_grid_has_no_range():
    some = {Spec("range", "gpt", "pss-qk", 0, m): result(1.0) for m in (1.0, 8.0, 16.0)}
    whole = {Spec("range", "gpt", "pss-qk", 1, m): result(1.5 if m < 8 else None) for m in ranges.GRID}
    assert math.isnan(ranges.largest(records(some), "gpt", "pss-qk"))
    assert not ranges.sensitivity(records(some), "gpt", "pss-qk").values
    assert ranges.complete(records(some | whole), "gpt", "pss-qk") == [1]
    assert ranges.largest(records(some | whole), "gpt", "pss-qk") == 4.0
    assert "pss-qk" not in tables.range_table(records(some))
    assert "pss-qk" not in tables.spread_table(records(some), ranges.sensitivity)


def test_a_method_is_scored_against_the_unguarded_range():
    found = records(
        {Spec("range", "gpt", "nothing", 0, m): result(1.0 if m < 4 else None) for m in ranges.GRID}
        | {Spec("range", "gpt", "clip", 0, m): result(1.1) for m in ranges.GRID}
    )
    assert ranges.score(found, "clip", ["gpt"]) == pytest.approx(16.0)
    assert ranges.quality(found, "gpt", "clip").mean == pytest.approx(0.1)
    assert ranges.open_ended(found, "gpt", "clip")
    assert not ranges.open_ended(found, "gpt", "nothing")
    assert "| clip | 16.00 | ≥ 32x |" in tables.range_table(found)


def rescue(method: str, seed: int, final: float | None, **more: object) -> dict[Spec, dict[str, object]]:
    return {Spec("rescue", "gpt", method, seed, 1.0, "late"): result(final, **more)}


def test_only_checkpoints_whose_continuation_is_dead_count():
    never = result(1.0, 600) | {"curve": [2.5] * 20 + [1.8] * 40}
    found = records(
        rescue("continue", 0, None)
        | rescue("continue", 1, 1.2)
        | rescue("repair-deep", 0, 1.8)
        | rescue("repair-deep", 1, 1.1)
        | rescue("restart", 0, 2.0)
        | rescue("restart", 1, 2.0)
        | {Spec("rescue", "gpt", "never", seed, 1.0, "late"): never for seed in (0, 1)}
    )
    deaths = rescues.dead_checkpoints(found, "late")
    assert [spec.seed for spec in deaths] == [0]
    tally = rescues.tally(found, deaths, "repair-deep")
    assert (tally.count, tally.alive, tally.ahead) == (1, 1, 1)
    assert tally.gap.middle == pytest.approx(-0.2)
    assert tally.saved.middle == pytest.approx(250 - 300)  # a run from scratch has 1.8 as its mean of 50 at step 250


def test_nothing_is_tried_on_a_checkpoint_that_lives(monkeypatch):
    specs = [Spec("rescue", "gpt", m, 0, 1.0, "late") for m in ("continue", "repair", "restart")]
    for final, count in ((1.0, 1), (None, 3)):
        monkeypatch.setattr(runner, "measure", lambda spec, final=final: result(final))
        assert len(runner.measure_all(specs)) == count
    living = records(rescue("continue", 0, 1.0) | rescue("continue", 1, None))
    assert rescues.alive(living) == {specs[0].checkpoint}


def test_a_method_that_learns_everywhere_is_asked_for_more():
    finals = {"hardy": {32.0: 1.0}, "tender": {32.0: None}, "hardier": {32.0: 1.0, 64.0: 1.0, 128.0: None}}
    found = records(
        {
            Spec("range", "gpt", method, seed, multiple): result(final)
            for method, values in finals.items()
            for seed in (0, 1)
            for multiple, final in {**dict.fromkeys(ranges.GRID[:-1], 1.0), **values}.items()
        }
    )
    assert further(found) == [Spec("range", "gpt", "hardy", seed, 64.0) for seed in (0, 1)]
    assert ranges.largest(found, "gpt", "hardier") == 64.0
    plain = {spec: r for spec, r in found.find(method="hardier").items() if spec.multiple <= 32}
    assert ranges.sensitivity(found, "gpt", "hardier") == ranges.sensitivity(records(plain), "gpt", "hardier")


def test_every_plan_names_what_exists_and_repeats_nothing():
    for profile in PROFILES.values():
        specs = profile()
        assert len(specs) == len(set(specs))
        for spec in specs:
            assert spec.task in tasks()
            known = {"range": METHODS, "state": (HEALTHY, KILLED)}.get(spec.question, REMEDIES)
            assert spec.method in known
    assert set(HEADLINE) < set(RIVALS) < set(METHODS)


def test_a_run_is_the_same_when_it_is_done_again():
    task = tasks()["mlp-adamw"]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    (_, one), (_, two) = (train(task, METHODS["nothing"](), 0, 4) for _ in range(2))
    assert one.losses == two.losses
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("death", ["early", "late"])
def test_a_dead_checkpoint_is_that_of_an_uninterrupted_run(death, monkeypatch):
    task = tasks()["mlp-adamw"]
    monkeypatch.setattr("suite.deaths.EARLY_STEPS", 110)
    short = type(task)(**{**vars(task), "steps": 105, "kill_steps": 5})
    monkeypatch.setattr("suite.deaths.tasks", lambda: {task.name: short})
    dead.cache_clear()
    found = dead(task.name, death, 0, 0)
    before, after, multiple = phases(short, death, 0)
    method = METHODS["nothing"]()
    run = fresh(short, method, 0)
    method.start(run.model, run.optimizer, before + after)
    go_on(short, run, method, before, 1.0)
    go_on(short, run, method, after, multiple)
    assert found.last.step == before + after
    assert all(torch.equal(value, found.last.model[name]) for name, value in run.model.state_dict().items())
    assert {100: 10} == {back: saved.step for back, saved in found.back.items()}
    dead.cache_clear()


def test_runs_from_one_checkpoint_are_one_job():
    specs = [Spec("rescue", "gpt", m, s, 1.0, "late") for s in (0, 1) for m in ("continue", "repair-deep")]
    specs += [Spec("range", "gpt", "nothing", 0, m) for m in (1.0, 2.0)]
    assert [len(job) for job in runner.jobs(specs)] == [2, 2, 1, 1]


def test_the_readme_shows_what_the_committed_results_say():
    stored = BENCHMARKS / "results" / "stability.jsonl"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split(headline.BEGIN, 1)[1].split(headline.END, 1)[0].strip()
    assert shown == headline.section(Records(Store(stored).records())).strip()


def test_the_command_writes_the_committed_tables_plots_and_figures_of_the_readme_again():
    pytest.importorskip("matplotlib")
    written = [ROOT / "README.md", *sorted((BENCHMARKS / "results").glob("stability*"))]
    before = {path: path.read_bytes() for path in written}
    assert {path.suffix for path in written} == {".jsonl", ".md", ".png"}
    subprocess.run([sys.executable, str(BENCHMARKS / "stability.py"), "--report"], check=True, capture_output=True)
    drawn = {path: path.read_bytes() for path in written if path.suffix == ".png"}
    for path, content in drawn.items():  # pixels depend on the version of the library that draws them
        path.write_bytes(before[path])
        assert content.startswith(b"\x89PNG")
        assert 0.5 < len(content) / len(before[path]) < 2
    assert {path: path.read_bytes() for path in written} == before


def test_committed_results_name_their_origin():
    lines = (BENCHMARKS / "results" / "stability.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, lines):
        assert {"pss_param", "commit", "torch", "device"} <= set(record["origin"])
        assert record["origin"]["commit"] != "unknown"


def test_a_failure_that_is_no_death_ends_the_suite(tmp_path, monkeypatch):
    def broken(spec):
        raise ZeroDivisionError("not a data point")

    class Inline:
        """Runs what is submitted at once, in this process."""

        def __init__(self, *args):
            self.down = False

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

        def submit(self, function, job):
            future = Future()
            try:
                future.set_result(function(job))
            except ZeroDivisionError as error:
                future.set_exception(error)
            return future

        def shutdown(self, cancel_futures):
            self.down = True

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(runner, "measure", broken)
    store = Store(tmp_path / "results.jsonl")
    with pytest.raises(ZeroDivisionError, match="not a data point"):
        runner.run([Spec("range", "mlp-adamw", "nothing", 0)], store, 1, Console(quiet=True))
    assert not list(store.records())


def test_sentences_say_what_the_tables_say():
    measured = {Spec("range", "gpt", "nothing", 0, m): result(1.0 if m < 4 else None) for m in ranges.GRID}
    measured |= {Spec("range", "gpt", "pss-default", 0, m): result(1.0) for m in ranges.GRID}
    assert "pss-default has the largest range (16.00 x" in sentences.reach(records(measured))
    assert "first, alone or with others, on 1 networks, and has ten times the unguarded range on 1" in sentences.reach(
        records(measured)
    )
    assert sentences.price(records(measured)) == "The default guard has the least on 1 networks; less: none."
    assert "costs +0.00 nats at most (on gpt)" in sentences.costs(records(measured))
    dead_and_back = rescue("continue", 0, None) | rescue("repair", 0, 1.5) | rescue("restart", 0, 2.0)
    dead_and_back |= {Spec("rescue", "gpt", "never", 0, 1.0, "late"): result(1.0, 600)}
    told = sentences.rescue(records(dead_and_back), "late")
    assert told.startswith("repair: 100 % of 1 learn again, 100 % ahead of the restart; restart: 100 %")
    guarded = dead_and_back | rescue("repair-guard", 0, 1.4) | rescue("restart-guard", 0, 1.6)
    told = sentences.rescue(records(guarded), "late")
    assert told.endswith("With the guard on in both, the repaired run ends below the restarted one in 1 of 1, by -0.20 "
                         "nats in the median.")  # fmt: skip
    again = records({Spec(**{**vars(s), "dying": 320}): r for s, r in dead_and_back.items()})
    assert sentences.recovery(again).startswith("1 of 1 learn again, after up to 320 steps at the deadly rate.")
    held = {Spec("healthy", "gpt", m, 0, 1.0, "late"): result(v) for m, v in (("continue", 1.0), ("repair", 1.25))}
    assert "+0.25 nats in the median of 1" in sentences.healthy(records(held))


def test_an_ablation_compares_where_all_were_measured():
    grid = {"nothing": (1.0, 8.0), "pss-published": (1.0, 8.0), "pss-qk": (1.0,)}
    losses = {"nothing": None, "pss-published": 1.0, "pss-qk": 2.0}
    found = records({Spec("range", "gpt", m, 0, x): result(losses[m]) for m, xs in grid.items() for x in xs})
    told, head, rows = ablations.group(found, "weights that are smoothed", ("gpt",))
    assert "higher: pss-qk." in told
    assert told.endswith("Worse than unguarded at the networks' own rates: none.")
    assert head == ["method", "mean", "gpt 1x"]
    assert rows == [["nothing", "3.00", "3.00"], ["pss-published", "1.00", "1.00"], ["pss-qk", "2.00", "2.00"]]
    assert told.startswith("Mean loss against pss-published (1.00 nats)")
    assert ablations.group(found, "edge", ("gpt",)) == ("", [], [])
