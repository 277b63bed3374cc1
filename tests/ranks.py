# SPDX-License-Identifier: Apache-2.0
"""Real processes that talk through gloo, NCCL too where there are GPUs; kept alive, as starting them takes the time.

A test sends a function of its own file; every rank runs it and returns something picklable. A rank that fails or
hangs takes its pool down, so the next test starts on a fresh one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 240  # seconds
_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint"]


class Ranks:
    """``world`` processes that form one process group."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[mp.Process] = []
        self._pipes: list[Connection] = []

    def __call__(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` on every rank and return what each returned, in the order of ranks."""
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((job.__code__.co_filename, job.__qualname__, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) < self.world:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.01):
                    continue
                good, value = pipe.recv()
                if not good:
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.world} failed:\n{value}")
                results[rank] = value
            if time.monotonic() > deadline:
                self.close()
                raise AssertionError(f"ranks {sorted(set(range(self.world)) - set(results))} hang in {job.__name__}")
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        # Imported once by the server that all ranks fork from; a fork of pytest itself would inherit its threads.
        context.set_forkserver_preload(_PRELOAD)
        folder = tempfile.mkdtemp()
        # One thread a rank: with more, ranks on a small machine wait for each other.
        saved = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(self.world):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, self.world, folder, there), daemon=True)
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.terminate()
            worker.join()
        self._workers, self._pipes = [], []


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    dist.init_process_group(
        _backend(rank, world),
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            path, name, args = pipe.recv()
        except (EOFError, OSError):
            return
        torch.manual_seed(0)
        try:
            module = modules[path] if path in modules else modules.setdefault(path, _load(path))
            answer = True, getattr(module, name)(*args)
        except BaseException:  # noqa: BLE001 (the parent raises it)
            answer = False, traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:  # another rank failed first, and nobody listens any more
            return


def _backend(rank: int, world: int) -> str:
    """gloo; where every rank has a GPU of its own, NCCL beside it for what lies there."""
    if torch.cuda.device_count() < world:
        return "gloo"
    torch.cuda.set_device(rank)
    return "cpu:gloo,cuda:nccl"


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
