# SPDX-License-Identifier: Apache-2.0
"""GPT-2 as transformers has it, in bfloat16 autocast, as a task of the suite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from suite.task import Task
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .text import tokens


@dataclass(frozen=True)
class Size:
    """A GPT-2 and its batch.

    Args:
        width: of the residual stream.
        layers: number of blocks.
        heads: per block.
        vocabulary: number of tokens.
        context: tokens per window.
        batch: windows per step.
        steps: of a run.
        dying: steps at a deadly rate.
        rate: at which it learns without help.
        early: multiple of the rate that kills from the start.
        late: multiple that kills what has learned.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 50257
    context: int = 512
    batch: int = 8
    steps: int = 150
    dying: int = 100
    rate: float = 1.5e-4
    early: float = 128.0
    late: float = 256.0


SIZES = {
    # A quarter of the rate of GPT-3 124M (Brown et al. 2020, table 2.1), which needs the warm-up that is a rival here.
    "gpt2": Size(),
    "gpt2-small": Size(128, 4, 4, 2000, 64, 8, 300, 150, 1e-3, 32.0, 64.0),
    "tiny": Size(64, 2, 2, 500, 32, 4, 12, 6),
}


class GPT2(GPT2LMHeadModel):
    """The network with the loss that the suite's loop asks for."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy in nats."""
        inputs, targets = batch
        kind = inputs.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            logits = self(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def build(size: Size, device: str) -> GPT2:
    """A fresh network, drawn where it is to lie: on a GPU from its own global random state."""
    config = GPT2Config(
        vocab_size=size.vocabulary, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        return GPT2(config)


def task(size: Size, device: str) -> Task:
    """Put GPT-2 on Python's standard library.

    Args:
        size: of network and batch, and the rates.
        device: where it trains.

    Returns:
        The task.
    """
    text, rate = tokens(size.vocabulary, size.batch, size.context, device), size.rate
    return Task(
        "gpt2-adamw", partial(build, size, device), text, "adamw", rate, size.steps, size.early * rate,
        size.late * rate, size.dying,
    )  # fmt: skip
