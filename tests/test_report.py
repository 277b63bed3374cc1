# SPDX-License-Identifier: Apache-2.0
"""The schema of the report: what the documentation lists, what the classes hold and what is frozen are one list."""

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import pytest
import torch
from safetensors.torch import save_file

import pss_param.report
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.report import SCHEMA, Report

# A field may be added here. If one is renamed, removed or means something else, SCHEMA gets another number.
FROZEN = {
    "schema": "text",
    "version": "text",
    "source": "text or null",
    "output": "text or null",
    "format": "text",
    "options": "object",
    "tensors": "list of objects",
    "tensors[].name": "text",
    "tensors[].role": "text",
    "tensors[].block": "integer or null",
    "tensors[].dtype": "text",
    "tensors[].shape": "list of integers",
    "tensors[].changed": "true or false",
    "tensors[].relative_change": "number",
    "tensors[].matrices": "list of objects",
    "tensors[].matrices[].part": "text",
    "tensors[].matrices[].shape": "pair of integers",
    "tensors[].matrices[].stable_rank": "pair of numbers",
    "tensors[].matrices[].spectral_norm": "pair of numbers",
    "tensors[].matrices[].k": "integer",
    "tensors[].matrices[].edge": "number",
    "tensors[].matrices[].residual": "number",
    "tensors[].matrices[].converged": "true or false",
    "tensors[].matrices[].note": "text",
    "tensors[].digest": "text",
    "skipped": "object of texts",
    "seconds": "number",
    "restored": "object of objects",
    "restored{}.nonfinite": "integer",
    "restored{}.digest": "text",
    "vectors": "object of texts",
    "reason": "text",
    "notes": "list of texts",
    "drift": "list of objects",
    "drift[].name": "text",
    "drift[].role": "text",
    "drift[].block": "integer or null",
    "drift[].distance": "number",
    "drift[].matrices": "list of objects",
    "drift[].matrices[].part": "text",
    "drift[].matrices[].shape": "pair of integers",
    "drift[].matrices[].stable_rank": "pair of numbers",
    "drift[].matrices[].spectral_norm": "pair of numbers",
    "optimizer": "object",
    "optimizer.mode": "text",
    "optimizer.states": "integer",
    "optimizer.reset": "list of texts",
    "optimizer.masters": "list of texts",
    "optimizer.written": "object of texts",
    "optimizer.order": "text",
}
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def documented():
    found = re.findall(r"^- ``([a-z_.\[\]{}]+)`` \(([a-z ]+)\): \S", pss_param.report.__doc__, re.MULTILINE)
    assert len({name for name, _ in found}) == len(found) == pss_param.report.__doc__.count("\n- ``")
    return dict(found)


def of_class(kind, prefix=""):
    """Path and type of every field of a dataclass and of those inside it."""
    hints, rows = typing.get_type_hints(kind), {}
    for entry in fields(kind):
        word, inner, mark = described(hints[entry.name])
        rows[prefix + entry.name] = word
        if inner is not None:
            rows.update(of_class(inner, f"{prefix}{entry.name}{mark}."))
    return rows


def described(hint):
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint], None, ""
    if is_dataclass(hint):
        return "object", hint, ""
    if origin is types.UnionType:
        return f"{WORDS[inside[0]]} or null", None, ""
    if origin is tuple:
        many = inside[-1] is Ellipsis
        return ("list of " if many else "pair of ") + _plural(inside[0]), _class(inside[0]), "[]"
    assert origin is Mapping, hint
    if inside[1] is typing.Any:
        return "object", None, ""
    return "object of " + _plural(inside[1]), _class(inside[1]), "{}"


def _plural(hint):
    return "objects" if is_dataclass(hint) else WORDS[hint] + "s"


def _class(hint):
    return hint if is_dataclass(hint) else None


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A report in which every list and object has an entry."""
    folder = tmp_path_factory.mktemp("report")
    up = torch.eye(32)
    up[0, 0] = 30.0
    good = {f"layers.{i}.mlp.up_proj.weight": up * (1 + i) for i in range(2)} | {"norm.weight": torch.ones(4)}
    bad = good | {"norm.weight": torch.full((4,), float("nan"))}
    files = {name: folder / f"{name}.ckpt" for name in ("good", "bad")}
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(32, 32)}
    names = list(good)[:2]
    optimizer = {
        "state": {0: moments, 1: moments},
        "param_groups": [{"params": [0, 1], "param_names": names}],
    }
    save_file(good, files["good"])
    torch.save({"pytorch-lightning_version": "2.5", "state_dict": bad, "optimizer_states": [optimizer]}, files["bad"])
    options = RepairOptions(reference=files["good"], nonfinite="reference", optimizer="reset")
    return json.loads(repair_checkpoint(files["bad"], options=options).to_json())


def test_documentation_and_classes_hold_exactly_the_frozen_fields():
    assert SCHEMA == "pss-param/repair-report/1"
    assert documented() == FROZEN
    assert of_class(Report) == FROZEN


def test_a_real_report_has_exactly_the_frozen_fields(content):
    found = {}
    _walk(content, "", found)
    assert found == FROZEN
    assert next(iter(content)) == "schema"
    assert list(content["options"]) == [entry.name for entry in fields(RepairOptions)]


def _walk(node, prefix, found):
    for key, value in node.items():
        path = prefix + key
        words = FROZEN[path]
        found[path] = words
        assert _fits(value, words), (path, value)
        if words.startswith("list of objects") or words == "object of objects":
            assert value, path
            mark, inner = ("[].", value) if isinstance(value, list) else ("{}.", value.values())
            for entry in inner:
                _walk(entry, path + mark, found)
        elif words == "object" and path != "options":
            _walk(value, path + ".", found)


def _fits(value, words):
    simple = {"text": str, "integer": int, "number": (int, float), "true or false": bool, "object": dict}
    simple |= {"texts": str, "integers": int, "numbers": (int, float), "objects": dict}
    if words.endswith(" or null"):
        return value is None or _fits(value, words.removesuffix(" or null"))
    for start, kind in (("list of ", list), ("pair of ", list), ("object of ", dict)):
        if words.startswith(start):
            inner = value.values() if isinstance(value, dict) else value
            right = len(value) == 2 if start == "pair of " else True
            return isinstance(value, kind) and right and all(_fits(x, words.removeprefix(start)) for x in inner)
    return isinstance(value, simple[words]) and (words == "true or false" or not isinstance(value, bool))


def test_fields_of_later_versions_are_passed_over(content):
    later = json.loads(json.dumps(content))
    for entry in (later, later["tensors"][0], later["tensors"][0]["matrices"][0], later["optimizer"]):
        entry["of_the_future"] = {"any": ["thing"]}
    for entry in (later["drift"][0], later["drift"][0]["matrices"][0], next(iter(later["restored"].values()))):
        entry["of_the_future"] = 1
    assert Report.from_json(json.dumps(later)) == Report.from_json(json.dumps(content))
    assert json.loads(Report.from_json(json.dumps(later)).to_json()) == content
    with pytest.raises(ValueError, match="schema"):
        Report.from_json(json.dumps({**content, "schema": "pss-param/repair-report/2"}))
