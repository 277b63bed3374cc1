# SPDX-License-Identifier: Apache-2.0
"""torch distributed checkpoints, of one process and of two: read, repaired, loaded back by torch."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch_files import TinyTransformer, check_slices, make_sick

from pss_param.checkpoint import open_checkpoint
from pss_param.checkpoint.dcp import map_moments
from pss_param.checkpoint.dcp_metadata import Piece, check_cover
from pss_param.errors import CheckpointError
from pss_param.repair import RepairOptions, repair_checkpoint

UP = "layers.0.mlp.up_proj.weight"


def trained():
    torch.manual_seed(0)
    model = make_sick(TinyTransformer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = trained()
    weights, moments = get_state_dict(model, optimizer)
    path = tmp_path / "step-7"
    dcp.save({"model": weights, "optim": moments, "note": ["any", "object"]}, checkpoint_id=path, no_dist=True)
    return path


def test_one_process_saves_and_torch_loads_the_repair(checkpoint):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    report = repair_checkpoint(checkpoint, options=RepairOptions(strength="gentle"))
    output = checkpoint.with_name("step-7-repaired")
    assert report.format == "distributed checkpoint"
    assert f"model.{UP}" in report.changed
    assert len(report.changed) == 8
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert (output / ".metadata").read_bytes() == before[".metadata"]
    old, new = check_slices(checkpoint), check_slices(output)
    assert {name for name, origin in old if old[name, origin] != new[name, origin]} == set(report.changed)
    model, optimizer = trained()
    weights, moments = get_state_dict(model, optimizer)
    healthy = {name: value.clone() for name, value in weights.items()}
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=output, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    with open_checkpoint(output) as layout:
        for name, value in model.state_dict().items():
            assert torch.equal(layout.read(f"model.{name}"), value)
            assert torch.equal(value, healthy[name]) == (f"model.{name}" not in report.changed)


def test_state_is_listed_and_mapped_by_the_checkpoints_own_names(checkpoint):
    with open_checkpoint(checkpoint) as layout:
        assert all(name.startswith("model.") for name in layout.tensors)
        assert all(name.startswith("optim.") for name in layout.state)
        moments = layout.moments[f"model.{UP}"]
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        assert layout.read(moments["exp_avg"]).shape == layout.tensors[f"model.{UP}"].shape
        assert layout.read(moments["step"]) == 1
        # The tied head has no state of its own: torch records it under one of the two names.
        assert len(layout.state) == 3 * len(layout.moments)


def test_moments_of_the_repaired_weights_are_reset(checkpoint):
    report = repair_checkpoint(checkpoint, options=RepairOptions(strength="gentle", optimizer="reset"))
    output = checkpoint.with_name("step-7-repaired")
    check_slices(output)
    with open_checkpoint(checkpoint) as before, open_checkpoint(output) as after:
        for weight, moments in before.moments.items():
            for name in moments.values():
                if weight in report.changed:
                    assert not after.read(name).any()
                else:
                    assert torch.equal(after.read(name), before.read(name))


def test_names_of_parameters_are_matched_as_recorded():
    paths = {
        "app.model.w": ("app", "model", "w"),
        "app.ema.model.w": ("app", "ema", "model", "w"),
        "app.optim.state.w.exp_avg": ("app", "optim", "state", "w", "exp_avg"),
        "optimizer.state.a.b.step": ("optimizer", "state.a.b.step"),
        "a.b": ("a.b",),
        "optims.0.state.a.b.m": ("optims", 0, "state", "a.b", "m"),
        "optim.state.gone.m": ("optim", "state", "gone", "m"),
        "optim.param_groups.w.lr": ("optim", "param_groups", "w", "lr"),
    }
    weights = [name for name in paths if "opt" not in name]
    found = map_moments(paths, weights, [name for name in paths if "opt" in name])
    assert found == {
        "app.model.w": {"exp_avg": "app.optim.state.w.exp_avg"},
        "a.b": {"step": "optimizer.state.a.b.step", "m": "optims.0.state.a.b.m"},
    }


def test_flipped_bytes_of_metadata_never_crash(tmp_path):
    path = tmp_path / "x"
    dcp.save({"model": {UP: torch.ones(4, 4)}, "step": torch.tensor(1)}, checkpoint_id=path, no_dist=True)
    data = (path / ".metadata").read_bytes()
    chance = torch.Generator().manual_seed(0)
    opened = 0
    for _ in range(500):
        broken = bytearray(data)
        at, to = torch.randint(len(data), (1,), generator=chance), torch.randint(256, (1,), generator=chance)
        broken[int(at)] = int(to)
        (path / ".metadata").write_bytes(broken)
        try:
            with open_checkpoint(path):
                opened += 1
        except CheckpointError as error:
            reason = str(error)
            assert "\n" not in reason
    assert 0 < opened < 500


def metadata(path):
    return pickle.loads((path / ".metadata").read_bytes())


def rewrite(path, content):
    (path / ".metadata").write_bytes(pickle.dumps(content))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def test_a_payload_in_metadata_never_runs(checkpoint, tmp_path):
    flag, good = tmp_path / "executed", (checkpoint / ".metadata").read_bytes()
    content = metadata(checkpoint)
    content.planner_data["evil"] = Payload(flag)
    rewrite(checkpoint, content)
    with pytest.raises(CheckpointError, match=r"mentions '(__builtin__|builtins)\.eval'"):
        repair_checkpoint(checkpoint)
    for data in (pickle.dumps(Payload(flag)), b"cos\nsystem\n(Vtouch x\ntR.", good[:-1] + b"cos\nsystem\n."):
        (checkpoint / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"\.metadata is not usable"):
            repair_checkpoint(checkpoint)
    assert not flag.exists()
    rewrite(checkpoint, content)
    metadata(checkpoint)
    assert flag.exists()  # it was a real one


def test_a_payload_in_a_piece_never_runs(checkpoint, tmp_path):
    flag, content = tmp_path / "executed", metadata(checkpoint)
    torch.save(Payload(flag), checkpoint / "__evil.distcp")
    place = content.storage_data[MetadataIndex(f"model.{UP}", [0, 0])]
    place.relative_path, place.offset = "__evil.distcp", 0
    place.length = (checkpoint / "__evil.distcp").stat().st_size
    rewrite(checkpoint, content)
    with open_checkpoint(checkpoint) as layout:
        assert layout.tensors[f"model.{UP}"].dtype is None
    assert not flag.exists()


def _place(content, name=f"model.{UP}"):
    return content.storage_data[MetadataIndex(name, [0, 0])]


def _other_file(content):
    _place(content).relative_path = "../outside"


def _absolute(content):
    _place(content).relative_path = "/etc/passwd"


def _beyond(content):
    _place(content).length = 1 << 40


def _negative(content):
    _place(content).offset = -1


def _shifted(content):
    _place(content).offset += 1
    _place(content).length -= 1


def _same_place(content):
    other = _place(content, "model.layers.1.mlp.up_proj.weight")
    _place(content).offset, _place(content).length = other.offset, other.length


def _other_tensor(content):
    one, two = _place(content), _place(content, "model.layers.0.mlp.down_proj.weight")
    one.offset, one.length, two.offset, two.length = two.offset, two.length, one.offset, one.length


def _other_type(content):
    entry = content.state_dict_metadata[f"model.{UP}"]
    entry.properties = TensorProperties(dtype=torch.float16)


def _bigger(content):
    content.state_dict_metadata[f"model.{UP}"].size = torch.Size([9999, 32])


def _outside(content):
    content.state_dict_metadata[f"model.{UP}"].chunks[0].sizes = torch.Size([65, 32])


def _negative_size(content):
    content.state_dict_metadata[f"model.{UP}"].size = (-1, 32)


def _nowhere(content):
    del content.storage_data[MetadataIndex(f"model.{UP}", [0, 0])]


def _compressed(content):
    _place(content).transform_descriptors = ["zstd"]


def _doubled(content):
    entry = content.state_dict_metadata[f"model.{UP}"]
    entry.chunks = entry.chunks * 2


def _emptied(content):
    content.state_dict_metadata = {}


LIES = {
    _other_file: "not in the folder",
    _absolute: "not in the folder",
    _beyond: "cut off",
    _negative: "place of .* is broken",
    _shifted: "does not have the piece",
    _same_place: "over each other",
    _other_tensor: r"it holds torch\.float32 \(32, 64\)",
    _other_type: r"not torch\.float16",
    _bigger: "elements, the tensor has",
    _outside: "reaches outside",
    _negative_size: "whole numbers",
    _nowhere: "says nowhere",
    _compressed: "compressed",
    _doubled: "elements, the tensor has",
    _emptied: "no tensor",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_metadata_that_lies_is_refused(checkpoint, lie):
    content = metadata(checkpoint)
    lie(content)
    rewrite(checkpoint, content)
    with pytest.raises(CheckpointError, match=LIES[lie]) as caught:
        repair_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert not checkpoint.with_name("step-7-repaired").exists()


def test_cut_files_are_refused(checkpoint):
    file = next(checkpoint.glob("*.distcp"))
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"\.distcp"):
        repair_checkpoint(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="not in the folder"):
        repair_checkpoint(checkpoint)
    whole = (checkpoint / ".metadata").read_bytes()
    file.write_bytes(data)
    for end in range(0, len(whole), 501):
        (checkpoint / ".metadata").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            repair_checkpoint(checkpoint)


def test_pieces_must_cover_once():
    def piece(origin, shape):
        return Piece(origin, shape, "f", 0, 1)

    check_cover("w", (), (piece((), ()),))
    check_cover("w", (0, 4), ())
    check_cover("w", (4, 4), (piece((0, 0), (2, 4)), piece((2, 0), (2, 2)), piece((2, 2), (2, 2))))
    with pytest.raises(ValueError, match="overlap"):
        check_cover("w", (2, 2), (piece((0, 0), (2, 1)), piece((1, 0), (1, 2))))
    with pytest.raises(ValueError, match="overlap"):
        check_cover("w", (4,), (piece((0,), (2,)), piece((1,), (2,))))
    with pytest.raises(ValueError, match="elements"):
        check_cover("w", (4,), (piece((0,), (2,)),))
    with pytest.raises(ValueError, match="outside"):
        check_cover("w", (4,), (piece((2,), (3,)),))
