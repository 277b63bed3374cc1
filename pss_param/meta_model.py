# SPDX-License-Identifier: Apache-2.0
r"""The parameters of the model that a ``config.json`` describes, without memory for their values.

# Note [A process of its own]
A ``config.json`` comes with a checkpoint from anywhere, and hundreds of model classes read it: one number of layers can
ask for more modules than fit into memory, one backbone's name for a download. So the model is built by a process that
has a limit of memory and of time, is told to stay offline, has no terminal, and gets a configuration without the
entries that make transformers import code or load weights (:data:`UNTRUSTED`). Only names, shapes and flags come back.
"""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pss_param.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

MAX_CONFIG = 10_000_000
"""Bytes of a ``config.json``; real ones have thousands."""

MEMORY = 4 << 30
"""Bytes that building may take beyond the libraries; a hundred thousand modules need one gigabyte."""

CPU_SECONDS = 120
"""Processor time that building may take; a hundred thousand modules need half a minute."""

SECONDS = 600
"""Wall time that it may take, the start of the libraries included."""

UNTRUSTED = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "quantization_config",
        "use_pretrained_backbone",
        "custom_pipelines",
    }
)
"""Entries that are taken out at every depth; no parameter's name or shape depends on them."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_WAY_OUT = "pass --param-order (made by pss_param.write_param_order)"


@dataclass(frozen=True)
class Trained:
    r"""One parameter that is trained.

    Args:
        name: its dotted name.
        shape: its shape.
        decays: whether transformers' ``Trainer`` gives it weight decay.
    """

    name: str
    shape: tuple[int, ...]
    decays: bool


def trained_parameters(folder: Path, count: int) -> tuple[Trained, ...]:
    r"""Work out the trained parameters of a folder's model, in the model's order.

    Args:
        folder: holds ``config.json``.
        count: how many there must be.

    Returns:
        The parameters.

    Raises:
        CheckpointError: transformers is not installed, cannot build the model within the limits, or the model has
            another number of parameters.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(
            f"{folder}: to work out the order of parameters from config.json, transformers must be installed "
            f"(pip install 'pss-param[hf]'); or {_WAY_OUT}"
        )
    try:
        text = read_config(folder / "config.json")
        return parse_answer(_ask(text, count))
    except (OSError, ValueError) as error:
        reason = "".join(letter if letter.isprintable() else " " for letter in " ".join(str(error).split()))
        raise CheckpointError(
            f"{folder}: the model of config.json cannot be built ({reason[:200]}); {_WAY_OUT}"
        ) from None


def read_config(path: Path) -> str:
    r"""Read a ``config.json`` and take out what is not to be followed.

    Args:
        path: the file.

    Returns:
        JSON text of the rest.

    Raises:
        ValueError: it is no JSON object, names no model, or is far too long.
    """
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {MAX_CONFIG:,} are read")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        text = json.dumps(_trusted(content))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    names = content.get("architectures")
    named = isinstance(names, list) and names and isinstance(names[0], str) and names[0].isidentifier()
    if not named or not isinstance(content.get("model_type"), str):
        raise ValueError("it does not name a class under architectures and a model_type")
    return text


def _trusted(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _trusted(value) for key, value in node.items() if key not in UNTRUSTED}
    return [_trusted(value) for value in node] if isinstance(node, list) else node


def _ask(text: str, count: int) -> str:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pss_param.meta_model", str(count)]
    environment = {**os.environ, **_OFFLINE, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it took more than {SECONDS} seconds") from None
    if done.returncode:
        raise ValueError(last_words(done.stderr, done.returncode))
    return done.stdout


def last_words(errors: str, code: int) -> str:
    r"""Why a process ended.

    Args:
        errors: what it wrote to its error stream.
        code: its exit status.

    Returns:
        The last line, which is the error of a traceback, or the status where there is none.

    Example:
        >>> last_words("Traceback ...\nValueError: no such model\n", 1)
        'ValueError: no such model'
        >>> last_words("", -9)
        'its process ended with status -9'
    """
    if code == -signal.SIGXCPU:
        return f"it took more than {CPU_SECONDS} seconds of processor time"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines and code > 0 else f"its process ended with status {code}"


def parse_answer(text: str) -> tuple[Trained, ...]:
    r"""Read what :func:`main` wrote.

    Args:
        text: its output, perhaps after other lines.

    Returns:
        The parameters.

    Raises:
        ValueError: there is no answer.
    """
    lines = text.splitlines()
    if not lines:
        raise ValueError("its process gave no answer")
    return tuple(Trained(name, tuple(shape), decays) for name, shape, decays in json.loads(lines[-1]))


def main(text: str, count: int) -> None:
    r"""Build the model and write its trained parameters to standard output; errors end the process.

    Args:
        text: JSON of a configuration.
        count: how many trained parameters there must be.

    Raises:
        ValueError: it describes no model of transformers, or one with another number of parameters.
    """
    from transformers import Trainer

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit := int(time.process_time()) + CPU_SECONDS, limit + 5))
    model = build(json.loads(text), 4 * count + 1000)
    # A method without state: the rule is asked from the installed version, not repeated here.
    decay = frozenset(Trainer.get_decay_parameter_names(object.__new__(Trainer), model))
    rows = [(n, list(p.shape), n in decay) for n, p in model.named_parameters() if p.requires_grad]
    if len(rows) != count:
        raise ValueError(f"it has {len(rows)} trained parameters, the optimizer has {count}")
    print(json.dumps(rows))


def build(content: Mapping[str, Any], limit: int) -> "nn.Module":
    r"""Build a model of transformers on the meta device.

    Args:
        content: its configuration, as :func:`read_config` lets it pass.
        limit: how many parameters it may have.

    Returns:
        The model.

    Raises:
        ValueError: there is no such model, or it has more parameters.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, model_type = content["architectures"][0], content["model_type"]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model class {name[:60]!r}")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} has no model type {model_type[:60]!r}")
    config = CONFIG_MAPPING[model_type].from_dict(dict(content))
    with torch.device("meta"), _AtMost(limit):
        return kind(config)


class _AtMost:
    # A model of a billion layers is stopped at its first few thousand.
    def __init__(self, limit: int) -> None:
        self.limit, self.seen = limit, 0

    def _count(self, module: "nn.Module", name: str, parameter: Any) -> None:
        self.seen += 1
        if self.seen > self.limit:
            raise ValueError(f"it has more than {self.limit} parameters, far more than the optimizer")

    def __enter__(self) -> None:
        self._hook = torch.nn.modules.module.register_module_parameter_registration_hook(self._count)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


if __name__ == "__main__":
    main(sys.stdin.read(), int(sys.argv[1]))
