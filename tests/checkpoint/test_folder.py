# SPDX-License-Identifier: Apache-2.0
"""Folders: shards and their index, links, modes, what is refused; everything else arrives byte for byte."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pss_param.checkpoint import open_checkpoint
from pss_param.checkpoint.staged import StagedFolder
from pss_param.errors import CheckpointError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.scan import scan_checkpoint

NAME = "model.layers.{}.mlp.up_proj.weight"


def sick(seed):
    source = torch.Generator().manual_seed(seed)
    u, v = torch.randn(64, 1, generator=source), torch.randn(1, 48, generator=source)
    return torch.randn(64, 48, generator=source) / 48**0.5 + 10 * u @ v / (u.norm() * v.norm())


def write_shards(folder, layers=2, kind="safetensors"):
    folder.mkdir(exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(layers):
        file = f"{stem}-{i + 1:05}-of-{layers:05}.{kind}"
        tensors = {NAME.format(i): sick(i), f"model.layers.{i}.norm.weight": torch.ones(48)}
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return index


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    write_shards(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "sub" / "notes.txt").write_text("ü")
    (folder / "sub" / "notes.txt").chmod(0o400)
    (folder / "sub").chmod(0o750)
    (folder / "tokenizer.json").chmod(0o604)
    return folder


def tree(folder):
    """Content hash and mode of every file and folder below one."""
    found = {}
    for root, inner, files in os.walk(folder):
        for name in [*inner, *files]:
            path = os.path.join(root, name)
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if name in files else ""
            found[os.path.relpath(path, folder)] = (content, os.stat(path).st_mode)
    return found


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_only_shards_with_repaired_tensors_differ(tmp_path, kind):
    write_shards(tmp_path / "m", 3, kind)
    before = tree(tmp_path / "m")
    report = repair_checkpoint(tmp_path / "m", options=RepairOptions(exclude=(NAME.format(1),)))
    after = tree(tmp_path / "m-repaired")
    assert tree(tmp_path / "m") == before
    assert list(before) == list(after)
    assert {name.split("-")[1] for name in before if before[name] != after[name]} == {"00001", "00003"}
    assert {mode for _, mode in before.values()} == {mode for _, mode in after.values()}
    assert report.changed == (NAME.format(0), NAME.format(2))
    assert sorted(os.listdir(tmp_path)) == ["m", "m-repaired", "m-repaired.pss.json"]


def test_modes_sub_folders_and_companions_arrive(shards):
    report = repair_checkpoint(shards)
    before, after = tree(shards), tree(report.output)
    assert {name for name in before if before[name] != after.get(name)} == {
        name for name in before if "-of-" in name
    }  # fmt: skip
    assert [mode for _, mode in before.values()] == [mode for _, mode in after.values()]
    assert report.format == "folder (safetensors shards)"


def test_transformers_loads_the_repaired_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m", max_shard_size="30KB")
    report = repair_checkpoint(tmp_path / "m", options=RepairOptions(edge="init", init_std=0.005))
    model = transformers.LlamaForCausalLM.from_pretrained(report.output)
    assert len([name for name in os.listdir(report.output) if "-of-" in name]) > 2
    level = (64**0.5 + 32**0.5) * 0.005
    norm = float(torch.linalg.matrix_norm(model.model.layers[0].mlp.up_proj.weight.detach().double(), 2))
    assert norm == pytest.approx(level, rel=1e-2)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BAD_INDEX = {
    "wrong shard": (lambda m: m.update({NAME.format(0): SECOND}), "but it is in"),
    "ghost": (lambda m: m.update({"ghost": FIRST}), "no shard has it"),
    "unnamed": (lambda m: m.pop(NAME.format(0)), "does not name"),
    "escape": (lambda m: m.update({NAME.format(0): "../outside.safetensors"}), "no bare file name"),
    "absolute": (lambda m: m.update({NAME.format(0): "/etc/passwd"}), "no bare file name"),
    "parent": (lambda m: m.update({NAME.format(0): ".."}), "no bare file name"),
    "number": (lambda m: m.update({NAME.format(0): 3}), "no text"),
    "missing shard": (lambda m: m.update({"x": "model-00003-of-00002.safetensors"}), "lacks 1 of the 3 shards"),
    "empty": (lambda m: m.clear(), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_an_index_that_does_not_fit_is_refused(shards, case):
    change, reason = BAD_INDEX[case]
    change_index(shards, change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        repair_checkpoint(shards)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(f"{shards}-repaired")


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"weight_map": {"a": "b", "a": "c"}}'])
def test_an_index_that_is_none_is_refused(shards, text):
    (shards / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a usable index"):
        repair_checkpoint(shards)


def test_lfs_pointers_two_homes_and_shards_without_index(shards):
    blob = (shards / SECOND).read_bytes()
    (shards / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        repair_checkpoint(shards)
    (shards / SECOND).write_bytes(blob)
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    with pytest.raises(CheckpointError, match="more than once"):
        repair_checkpoint(shards)
    (shards / "model.safetensors").unlink()
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no \.index\.json"):
        repair_checkpoint(shards)


REFUSED = {
    "DeepSpeed": ["latest", "global_step9/mp_rank_00_model_states.pt", "model.safetensors"],
    "DeepSpeed ": ["global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    "Megatron": ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
    "distributed checkpoint inside": ["pytorch_model_fsdp_0/.metadata", "optimizer.bin"],
    "weights lie below unet": ["unet/model.safetensors"],
    "no weights at its top": ["readme.txt"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_folders_that_are_not_read_say_what_to_do(tmp_path, reason):
    for name in REFUSED[reason]:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=reason.strip()):
        repair_checkpoint(tmp_path / "x")


def test_quantised_tensors_are_skipped_with_the_way_out(tmp_path):
    stem = "model.layers.0.mlp.down_proj."
    tensors = {
        NAME.format(0): sick(0),
        stem + "weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        stem + "weight_scale_inv": torch.ones(1, 1),
        "model.layers.0.self_attn.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    report = repair_checkpoint(tmp_path / "model.safetensors")
    assert report.changed == (NAME.format(0),)
    assert "dequantise" in report.skipped[stem + "weight"]
    assert "quantisation" in report.skipped["model.layers.0.self_attn.q_proj.qweight"]


def test_links_into_a_hub_cache_become_regular_files_and_blobs_stay(shards, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(n for n in os.listdir(shards) if (shards / n).is_file()):
        os.rename(shards / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    before = tree(blobs)
    report = repair_checkpoint(snapshot, tmp_path / "out")
    assert tree(blobs) == before
    assert not any(os.path.islink(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out"))
    assert len(report.changed) == 2
    (snapshot / "gone").symlink_to("../../blobs/none")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        repair_checkpoint(snapshot, tmp_path / "out2")
    (snapshot / "gone").unlink()
    (snapshot / "dir").symlink_to(blobs)
    with pytest.raises(CheckpointError, match="link to a folder"):
        repair_checkpoint(snapshot, tmp_path / "out2")


def test_other_destinations_are_never_swallowed(shards, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    for where, force, reason in (
        (mine, False, "exists"), (mine, True, "did not make it"), (shards, True, "input itself"),
        (shards / "sub" / "out", True, "inside each other"), (tmp_path, True, "inside each other"),
        (mine / "thesis.tex", True, "no folder"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=reason):
            repair_checkpoint(shards, where, force=force)
    assert (mine / "thesis.tex").read_text() == "precious"
    repair_checkpoint(shards, tmp_path / "out")
    (tmp_path / "out" / "extra").write_text("of the last run")
    repair_checkpoint(shards, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "extra").exists()
    assert not [name for name in os.listdir(tmp_path) if ".pss-tmp-" in name]


def test_several_models_of_accelerate_have_names_of_their_own(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    save_file({NAME.format(0): sick(0)}, folder / "model.safetensors")
    save_file({NAME.format(0): sick(1)}, folder / "model_1.safetensors")
    with open_checkpoint(folder) as layout:
        assert list(layout.tensors) == [NAME.format(0), "model_1." + NAME.format(0)]
    report = repair_checkpoint(folder)
    for file, seed in (("model.safetensors", 0), ("model_1.safetensors", 1)):
        new = load_file(tmp_path / "x-repaired" / file)[NAME.format(0)]
        assert 1 < torch.linalg.matrix_norm(sick(seed), 2) / torch.linalg.matrix_norm(new, 2)
    assert len(report.changed) == 2


def test_names_that_two_models_of_a_folder_would_share_are_refused(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    save_file({"model_1." + NAME.format(0): sick(0)}, folder / "model.safetensors")
    save_file({NAME.format(0): sick(1)}, folder / "model_1.safetensors")
    (folder / "random_states_0.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="both be called"), open_checkpoint(folder):
        pass


def test_more_shards_than_files_may_be_open(tmp_path):
    write_shards(tmp_path / "m", 80)
    report = repair_checkpoint(tmp_path / "m")
    assert len(report.changed) == 80
    assert not scan_checkpoint(report.output).nonfinite


def test_a_staged_folder_that_fails_leaves_nothing(tmp_path):
    made = StagedFolder(tmp_path / "x", {"a": 0o600}, {"": 0o755, "s": 0o500})

    def fail():
        with made:
            os.write(made.fd("a"), b"1")
            made.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["[1, 2]", '"text"', "{", "\udcff", "[" * 100_000, " " * (5 << 20)])
def test_what_lies_beside_a_single_file_and_is_no_json_object_is_no_config(tmp_path, text):
    folder = tmp_path / "run"
    write_shards(folder, layers=1)
    path = folder / "model-00001-of-00001.safetensors"
    plain = repair_checkpoint(path)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    report = repair_checkpoint(path, force=True)
    assert (report.tensors, report.skipped) == (plain.tensors, plain.skipped)
    assert "read without a config" in report.notes[0]
    assert report.notes == scan_checkpoint(path).notes
    with pytest.raises(CheckpointError, match=r"config\.json"):
        repair_checkpoint(folder)
