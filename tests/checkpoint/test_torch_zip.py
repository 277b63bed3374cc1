# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, repaired in place of their bytes: what torch, zip tools and a hash say afterwards."""

import argparse
import collections
import copy
import pickle

import pytest
import torch
from torch_files import TinyTransformer, changed_bytes, check_zip_tools, make_sick, raw_zip, sick, spans, torch_like

from pss_param.checkpoint import open_checkpoint
from pss_param.checkpoint.torch_zip import parse_torch_zip, read_torch_file
from pss_param.errors import CheckpointError, NonFiniteError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.spectrum import stable_rank

UP = "layers.0.mlp.up_proj.weight"


class Config:
    """A class that a reader of the file need not have."""

    def __init__(self):
        self.depth = 2
        self.secret = {"tensor": torch.arange(3.0)}


def repaired(path, **options):
    report = repair_checkpoint(path, **options)
    output = path.with_name(f"{path.stem}.repaired{path.suffix}")
    check_zip_tools(output)
    return report, output


def check_only_weights_changed(path, output, records):
    """Only these records and, in the whole file, only their bytes and check sums differ."""
    old, new = spans(path), spans(output)
    assert list(old) == list(new)
    assert {name for name in old if old[name] != new[name]} == records
    with open_checkpoint(path) as layout:
        inside = {(r.offset, r.size) for name, r in layout._records.items() if name in records}
        allowed = set(layout.mended(path.name, list(inside))) | inside
    for at in changed_bytes(path, output):
        assert any(offset <= at < offset + count for offset, count in allowed)


def test_a_plain_state_dict_of_a_tied_model(tmp_path):
    path = tmp_path / "model.pt"
    model = make_sick(TinyTransformer())
    torch.save(model.state_dict(), path)
    report, output = repaired(path, options=RepairOptions(strength="gentle"))
    assert report.format == "torch"
    assert len(report.changed) == 8
    after = torch.load(output, weights_only=True, mmap=True)
    before = model.state_dict()
    assert list(after) == list(before)
    assert after._metadata == before._metadata
    for name in before:
        assert torch.equal(after[name], before[name]) == (name not in report.changed), name
    assert float(stable_rank(after[UP])) > 3 * float(stable_rank(before[UP]))
    assert after["lm_head.weight"].data_ptr() == after["embed_tokens.weight"].data_ptr()
    order = list(dict.fromkeys(before[name].data_ptr() for name in before))
    records = {f"model/data/{order.index(before[name].data_ptr())}" for name in report.changed}
    check_only_weights_changed(path, output, records)
    TinyTransformer().load_state_dict(after, strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(tmp_path, dtype):
    path = tmp_path / "model.bin"
    torch.save(make_sick(TinyTransformer()).to(dtype).state_dict(), path)
    report, output = repaired(path)
    after = torch.load(output, weights_only=True)
    assert after[UP].dtype == dtype
    assert UP in report.changed


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    path = tmp_path / "model.pt"
    torch.save({UP: sick(64, 32), "n": 1}, path, pickle_protocol=protocol)
    report, _ = repaired(path)
    assert report.changed == (UP,)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict", "weights"])
@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_trainers_dictionary_is_found_and_its_names_are_kept(tmp_path, key, before):
    path = tmp_path / "trainer.pth"
    model = make_sick(TinyTransformer(layers=1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(6)[None]).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "rng": torch.get_rng_state(),
        key: {before + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, path)
    report, output = repaired(path, options=RepairOptions(optimizer="keep"))
    assert before + UP in report.changed
    after = torch.load(output, weights_only=False)
    assert list(after[key]) == list(content[key])
    assert after["args"] == content["args"]
    assert torch.equal(after["rng"], content["rng"])
    for number, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][number][k], v) for k, v in moments.items())


def test_state_that_is_no_weight_is_listed_by_path(tmp_path):
    path = tmp_path / "trainer.pt"
    model = TinyTransformer(layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(6)[None]).sum().backward()
    optimizer.step()
    extra = {"a.b": {"c": torch.ones(1)}, "a": {"b.c": torch.zeros(2)}, "config": Config()}
    torch.save({"model": model.state_dict(), "optimizers": [optimizer.state_dict()], **extra}, path)
    with open_checkpoint(path) as layout:
        assert layout.prefix == ("model",)
        assert list(layout.tensors) == list(model.state_dict())
        name = "optimizers.0.state.3.exp_avg"
        assert layout.paths[name] == ("optimizers", 0, "state", 3, "exp_avg")
        assert torch.equal(layout.read(name), optimizer.state_dict()["state"][3]["exp_avg"])
        assert {layout.paths[n] for n in ("a.b.c", "a.b.c#2")} == {("a.b", "c"), ("a", "b.c")}
        assert any(torch.equal(layout.read(n), torch.arange(3.0)) for n in layout.state if n.startswith("config"))


def test_an_optimizers_file_has_only_state(tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}, path)
    with path.open("rb") as file:
        found = read_torch_file(file.fileno(), path.stat().st_size, "optimizer.pt", model=False)
    assert not found.weights
    assert list(found.state) == ["state.0.exp_avg"]


def test_strided_tied_and_fused_tensors_are_repaired_once_and_stay_shared(tmp_path):
    path = tmp_path / "views.pt"
    flat = torch.cat([sick(32, 32).flatten(), sick(32, 32, seed=1).flatten()])
    fused = torch.cat([sick(32, 32, seed=2), sick(32, 32, seed=3)], dim=1)
    content = {
        "layers.0.up_proj.weight": sick(32, 64).t(),  # column-major
        "layers.1.up_proj.weight": flat[:1024].view(32, 32),  # two slices of a flat parameter
        "layers.2.up_proj.weight": flat[1024:].view(32, 32),
        "layers.3.up_proj.weight": fused[:, :32],  # two interleaved halves
        "layers.4.up_proj.weight": fused[:, 32:],
        "layers.5.up_proj.weight": flat[:512].view(16, 32),  # a part of layer 1's
        "layers.6.up_proj.weight": torch.randn(1, 32).expand(32, 32),
        "layers.7.up_proj.weight": torch.eye(32).to_sparse(),
    }
    torch.save(content, path)
    before = copy.deepcopy(content)
    report, output = repaired(path)
    assert report.changed == tuple(f"layers.{n}.up_proj.weight" for n in range(5))
    assert "shares its bytes" in report.skipped["layers.5.up_proj.weight"]
    assert "expanded" in report.skipped["layers.6.up_proj.weight"]
    assert "sparse" in report.skipped["layers.7.up_proj.weight"]
    after = torch.load(output, weights_only=True)
    for name in report.changed:
        assert after[name].stride() == before[name].stride()
        assert float(stable_rank(after[name])) > 2 * float(stable_rank(before[name])), name
    assert torch.equal(after["layers.5.up_proj.weight"], after["layers.1.up_proj.weight"][:16])
    assert torch.equal(after["layers.6.up_proj.weight"], before["layers.6.up_proj.weight"])


def test_parameters_subclasses_and_odd_types(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save(
        {
            UP: torch.nn.Parameter(sick(64, 32)),
            "buffer": torch.nn.Buffer(torch.ones(2)),
            "f8": torch.ones(4).to(torch.float8_e4m3fn),
            "u16": torch.ones(2, dtype=torch.uint16),
            "empty": torch.zeros(0, 5),
            "scalar": torch.tensor(2.0),
            "text": "not a tensor",
        },
        path,
    )
    with open_checkpoint(path) as layout:
        assert layout.tensors["f8"].dtype == torch.float8_e4m3fn
        assert layout.read("u16").tolist() == [1, 1]
        assert layout.read("empty").shape == (0, 5)
        assert layout.read("scalar").item() == 2.0
        assert "text" not in layout.tensors
    report, output = repaired(path)
    assert report.changed == (UP,)
    assert isinstance(torch.load(output, weights_only=True)[UP], torch.nn.Parameter)


def test_non_finite_weights_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({UP: sick(64, 32), "norm.weight": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(NonFiniteError, match=r"norm\.weight \(1\)"):
        repair_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_one_file_for_others_to_use(tmp_path):
    path = tmp_path / "shard.bin"
    torch.save({"w": torch.ones(2, 3)}, path)
    with path.open("rb") as file:
        assert parse_torch_zip(file.fileno(), "shard.bin")["w"].shape == (2, 3)
    path.write_bytes(path.read_bytes()[:-5])
    with path.open("rb") as file, pytest.raises(CheckpointError, match=r"shard\.bin is not a usable"):
        parse_torch_zip(file.fileno(), "shard.bin")


@pytest.mark.parametrize("namespace", [True, False])
@pytest.mark.parametrize("optimizer", ["keep", "reset"])
def test_lightning_resumes_after_the_repair(tmp_path, namespace, optimizer):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, hparams=None):
            super().__init__()
            self.model = make_sick(TinyTransformer(layers=1))
            if namespace:
                self.save_hyperparameters({"hparams": argparse.Namespace(lr=1e-3, config=Config())})

        def training_step(self, batch):
            logits = self.model(batch)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(32).view(4, 8), batch_size=2)

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    path, first = tmp_path / "last.ckpt", trainer(1)
    first.fit(Module())
    first.save_checkpoint(path)
    report, output = repaired(path, options=RepairOptions(strength="gentle", optimizer=optimizer))
    assert report.format == "lightning"
    assert "model." + UP in report.changed
    old, new = (torch.load(p, weights_only=False) for p in (path, output))
    assert list(new) == list(old)
    names = [name for name, _ in Module().named_parameters()]
    reset = {number for number, name in enumerate(names) if name in report.changed and optimizer == "reset"}
    assert bool(reset) == (optimizer == "reset")
    for number, moments in old["optimizer_states"][0]["state"].items():
        for key, value in moments.items():
            expected = torch.zeros_like(value) if number in reset else value
            assert torch.equal(new["optimizer_states"][0]["state"][number][key], expected)
    second, module = trainer(2), Module()
    second.fit(module, ckpt_path=output, weights_only=False)
    assert second.global_step == 4
    assert second.current_epoch == 2
    steps = {number: int(state["step"]) for number, state in second.optimizers[0].state_dict()["state"].items()}
    assert steps == {number: 2 if number in reset else 4 for number in steps}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("where", ["beside", "as a weight", "as a key's value", "as the whole"])
def test_a_payload_never_runs(tmp_path, where):
    flag, path = tmp_path / "executed", tmp_path / "x.pt"
    bomb, weights = Payload(flag), {UP: sick(64, 32)}
    content = {
        "beside": {"state_dict": weights, "hyper_parameters": bomb},
        "as a weight": {**weights, "evil.weight": bomb},
        "as a key's value": {"state_dict": {**weights, "x": {"y": [bomb]}}},
        "as the whole": bomb,
    }[where]
    torch.save(content, path)
    if where == "as the whole":
        with pytest.raises(CheckpointError, match=r"made by __builtin__\.eval"):
            repair_checkpoint(path)
    else:
        assert repaired(path)[0].changed == (UP,)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists()  # it was a real one


def tensor_pickle(storage="FloatStorage", key="0", count=4, offset=0, shape=(2, 2), stride=(2, 1), name="w"):
    """A state dict of one tensor, with whatever it claims about itself."""
    words = ("storage", _Name("torch", storage), key, "cpu", count)
    content = {
        name: _Call(_Name("torch._utils", "_rebuild_tensor_v2"), (_Ref(words), offset, shape, stride, False, {}))
    }
    return _dump(content)


class _Name(collections.namedtuple("_Name", "module name")):
    pass


class _Call(collections.namedtuple("_Call", "callee args")):
    pass


class _Ref(collections.namedtuple("_Ref", "words")):
    pass


def _dump(value):
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value):
    if isinstance(value, _Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, _Call):
        return _opcodes(value.callee) + _opcodes(tuple(value.args)) + b"R"
    if isinstance(value, _Ref):
        return _opcodes(tuple(value.words)) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_opcodes, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(k) + _opcodes(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1].split(b"q\x00")[0]


FOUR = [("0", bytes(16))]
REFUSED = {
    "pickle only": (pickle.dumps({"a": 1}), "bare pickle"),
    "some zip": (raw_zip([("a/b", b"1")]), "not one of torch.save"),
    "two models": (raw_zip([("a/data.pkl", b"N."), ("b/data.pkl", b"N.")]), "not one of torch.save"),
    "torchscript": (raw_zip([("a/data.pkl", b"N."), ("a/constants.pkl", b"N.")]), "TorchScript"),
    "big-endian": (raw_zip([("a/data.pkl", b"N."), ("a/byteorder", b"big")]), "big-endian"),
    "nothing": (torch_like(b"N."), "holds a NoneType"),
    "empty dictionary": (torch_like(b"}."), "no dictionary of tensors"),
    "broken pickle": (torch_like(b"(("), "pickle is broken"),
    "no storage": (torch_like(tensor_pickle()), "not there"),
    "path as a storage": (torch_like(tensor_pickle(key="../0"), FOUR), "not there"),
    "short storage": (torch_like(tensor_pickle(), [("0", bytes(15))]), "15 bytes"),
    "long storage": (torch_like(tensor_pickle(), [("0", bytes(17))]), "17 bytes"),
    "beyond the storage": (torch_like(tensor_pickle(offset=1), FOUR), "reaches byte 20"),
    "negative offset": (torch_like(tensor_pickle(offset=-1), FOUR), "unusual offset"),
    "negative stride": (torch_like(tensor_pickle(stride=(-2, 1)), FOUR), "whole numbers"),
    "negative shape": (torch_like(tensor_pickle(shape=(-2, 2)), FOUR), "whole numbers"),
    "bool shape": (torch_like(tensor_pickle(shape=(True, 2)), FOUR), "whole numbers"),
    "huge shape": (torch_like(tensor_pickle(shape=(1 << 62, 1 << 62)), FOUR), "reaches byte"),
    "huge number": (torch_like(tensor_pickle(shape=(1 << 70, 1)), FOUR), "whole numbers"),
    "huge count": (torch_like(tensor_pickle(count=1 << 61), FOUR), "16 bytes"),
    "text count": (torch_like(tensor_pickle(count="4"), FOUR), "unknown kind"),
    "dimensions": (torch_like(tensor_pickle(shape=(1,) * 65, stride=(1,) * 65), FOUR), "65 dimensions"),
    "strides missing": (torch_like(tensor_pickle(stride=(1,)), FOUR), "unusual offset, shape"),
    "unknown storage": (torch_like(tensor_pickle(storage="StrangeStorage"), FOUR), "StrangeStorage"),
    "key twice": (torch_like(b"}(" + (_opcodes("a") + b"N") * 2 + b"u."), "twice"),
    "deep": (torch_like(tensor_pickle()[:-1] + b"Va\n" + b"]" * 100_000 + b"a" * 99_999 + b"s.", FOUR), "levels deep"),
    "cyclic": (torch_like(b"}q\0Va\nh\0s."), "no dictionary of tensors"),
    "deepspeed": (torch_like(_dump({"module": {}, "ds_version": "0.1"})), "DeepSpeed"),
    "megatron": (torch_like(_dump({"checkpoint_version": 3.0, "args": None, "model": {}})), "Megatron"),
    "wrapped for ever": (
        torch_like(b"}Va\n" + b"ctorch._utils\n_rebuild_parameter\n(" * 50 + b"N" + b"NNtR" * 50 + b"s."),
        "wrapped more than",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_reason(tmp_path, name):
    data, reason = REFUSED[name]
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        repair_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_hand_made_file_is_a_good_one_when_it_does_not_lie(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(torch_like(tensor_pickle(), FOUR))
    with open_checkpoint(path) as layout:
        assert layout.read("w").tolist() == [[0, 0], [0, 0]]


def test_whole_models_and_several_models_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(TinyTransformer(layers=1), path)
    with pytest.raises(CheckpointError, match=r"TinyTransformer.* save model\.state_dict\(\)"):
        repair_checkpoint(path)
    torch.save({"generator": {"w": torch.ones(2)}, "critic": {"w": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match="several dictionaries"):
        repair_checkpoint(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match="single tensor"):
        repair_checkpoint(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch\.save\(torch\.load"):
        repair_checkpoint(path)


def test_every_cut_is_refused(tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "x.pt"
    torch.save({UP: sick(8, 8)}, whole)
    data = whole.read_bytes()
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"x\.pt"), open_checkpoint(path):
            pass


def read_all(path):
    """Read every tensor; returns our error's text, if there is one, and lets all others out."""
    try:
        with open_checkpoint(path) as layout:
            for name in (*layout.tensors, *layout.state):
                if layout.find(name).dtype is not None:
                    layout.read(name)
    except CheckpointError as error:
        return str(error)
    return None


def test_flipped_bytes_never_crash(tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "x.pt"
    torch.save({"model": {UP: sick(8, 8)}, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, whole)
    data = bytearray(whole.read_bytes())
    chance = torch.Generator().manual_seed(0)
    for _ in range(500):
        at, to = torch.randint(len(data), (1,), generator=chance), torch.randint(256, (1,), generator=chance)
        broken = data.copy()
        broken[int(at)] = int(to)
        path.write_bytes(broken)
        outcome = read_all(path)
        assert outcome is None or str(path) in outcome
