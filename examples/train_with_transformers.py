# SPDX-License-Identifier: Apache-2.0
"""Guard a Hugging Face Trainer: one line. A small GPT learns Python's own help texts, byte by byte, far too fast.

Needs ``pip install "pss-param[hf]"``; downloads nothing.
"""

import tempfile
from pydoc_data.topics import topics

import torch
from torch.utils.data import Dataset
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, Trainer, TrainingArguments, set_seed

from pss_param.integrations.transformers import PSSCallback

CONTEXT = 32


class Bytes(Dataset):
    """Windows of a text."""

    def __init__(self) -> None:
        """Read the text."""
        self.data = torch.tensor(list("".join(topics.values()).encode()))

    def __len__(self) -> int:
        """Count the windows."""
        return len(self.data) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Cut one window out."""
        window = self.data[index * CONTEXT : (index + 1) * CONTEXT]
        return {"input_ids": window, "labels": window}


def main(guarded: bool = True, steps: int = 125, folder: str | None = None) -> float:
    """Train at a learning rate that kills the model without the guard.

    Returns:
        Training loss at the end, in nats per byte; 3.3 is that of knowing byte frequencies alone.
    """
    set_seed(0)
    shape = {"n_embd": 32, "n_layer": 6, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = OpenAIGPTConfig(vocab_size=256, n_positions=CONTEXT, afn="gelu", **shape, **dropout)
    trainer = Trainer(
        model=OpenAIGPTLMHeadModel(config),
        args=TrainingArguments(
            output_dir=folder or tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=25,
            save_steps=steps,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Bytes(),
        callbacks=[PSSCallback()] if guarded else [],
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]


if __name__ == "__main__":
    print("without the guard:", main(guarded=False))
    print("with it:", main())
