# SPDX-License-Identifier: Apache-2.0
"""Small real checkpoints of every format, as bytes by relative name; the name "" is a checkpoint of one file."""

import argparse
import json
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch_files import sick

Tree = dict[str, bytes]

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


class Hyper:
    """A class that no reader of ours imports."""

    def __init__(self):
        self.width, self.path, self.rest = 8, Path("x"), argparse.Namespace(lr=0.1)


def weights(kind=torch.float32):
    return {
        UP: sick(12, 8, kind),
        "model.layers.0.norm.weight": torch.ones(8, dtype=kind),
        DOWN: sick(8, 12, kind, seed=1),
        "model.position_ids": torch.arange(4),
    }


def optimizer():
    """State dict of a real AdamW after one step, and the names of its parameters."""
    names = [UP, "model.layers.0.norm.weight", DOWN]
    parameters = [torch.nn.Parameter(weights()[name]) for name in names]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW(parameters)
    adam.step()
    return adam.state_dict(), names


def make_seeds(folder: Path) -> dict[str, Tree]:
    """Write every format with the library that defines it.

    Args:
        folder: an empty folder.

    Returns:
        Files of each seed.
    """
    return {
        "safetensors": {"": save(weights(torch.bfloat16), {"format": "pt"})},
        "shards": _shards("model", ".safetensors"),
        "torch": {"": _torch(weights(), folder)},
        "torch nested": {"": _torch(_nested(), folder)},
        "lightning": {"": _torch(_lightning(), folder)},
        "torch shards": _shards("pytorch_model", ".bin", folder),
        "trainer": _trainer(folder),
        "accelerate": _accelerate(folder),
        "dcp": _dcp(folder / "dcp"),
    }


def _torch(value, folder):
    torch.save(value, folder / "one.pt")
    return (folder / "one.pt").read_bytes()


def _shards(stem, kind, folder=None):
    tree, table = {}, {}
    for number, name in enumerate((UP, DOWN), 1):
        file = f"{stem}-{number:05}-of-00002{kind}"
        part = {name: weights()[name], f"norm.{number}.weight": torch.ones(3)}
        tree[file] = save(part, {"format": "pt"}) if kind == ".safetensors" else _torch(part, folder)
        table.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 792}, "weight_map": table}
    return {**tree, f"{stem}{kind}.index.json": json.dumps(index, indent=2).encode(), "config.json": _config()}


def _config():
    return json.dumps({"architectures": ["X"], "num_attention_heads": 2, "initializer_range": 0.02}).encode()


def _nested():
    tied = weights()
    tied["lm_head.weight"] = tied["model.embed.weight"] = torch.ones(5, 4)
    tied["model.layers.2.mlp.up_proj.weight"] = sick(8, 12, seed=2).t()
    flat = torch.ones(12)
    return {"model_state_dict": {**tied, "a": flat[:6], "b": flat[6:]}, "epoch": 3, "optimizer": optimizer()[0]}


def _lightning():
    states = {f"net.{name}": value for name, value in weights().items()}
    return {
        "epoch": 1, "global_step": 3, "pytorch-lightning_version": "2.5.0", "state_dict": states,
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"checkpoint": {"best": torch.tensor(1.0)}},
        "optimizer_states": [optimizer()[0]], "lr_schedulers": [], "hyper_parameters": Hyper(),
    }  # fmt: skip


def _trainer(folder):
    state, names = optimizer()
    rows = [{"name": name, "shape": list(weights()[name].shape)} for name in names]
    order = {"schema": "pss-param/param-order/1", "parameters": rows}
    return {
        "model.safetensors": save(weights(), {"format": "pt"}),
        "optimizer.pt": _torch(state, folder),
        "scheduler.pt": _torch({"last_epoch": 2}, folder),
        "rng_state.pth": _torch({"cpu": torch.get_rng_state()[:64].clone()}, folder),
        "trainer_state.json": json.dumps({"global_step": 2, "log_history": []}).encode(),
        "config.json": _config(),
        "order.json": json.dumps(order).encode(),
    }


def _accelerate(folder):
    return {
        "model.safetensors": save(weights(), {"format": "pt"}),
        "optimizer.bin": _torch(optimizer()[0], folder),
        "random_states_0.pkl": pickle.dumps({"step": 3}),
        "sub/notes.txt": b"text",
    }


def _dcp(folder):
    state = optimizer()[0]["state"]
    moments = {name: state[number] for number, name in enumerate(optimizer()[1])}
    content = {"model": weights(), "optim": {"state": moments, "param_groups": [{"lr": 0.1}]}, "note": ["any"]}
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return read_tree(folder)


def read_tree(path: Path) -> Tree:
    """Read all regular files.

    Args:
        path: a file, or a folder.

    Returns:
        Contents by relative name.
    """
    if path.is_file():
        return {"": path.read_bytes()}
    return {x.relative_to(path).as_posix(): x.read_bytes() for x in sorted(path.rglob("*")) if x.is_file()}


def write_tree(tree: Tree, path: Path) -> None:
    """Write a seed to the disk.

    Args:
        tree: its files.
        path: the new file or folder.
    """
    for name, data in tree.items():
        target = path / name if name else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


__all__ = ["DOWN", "UP", "Tree", "make_seeds", "read_tree", "write_tree"]
