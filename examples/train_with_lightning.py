# SPDX-License-Identifier: Apache-2.0
"""Guard a Lightning Trainer: one line. A post-norm transformer learns Python's own help texts, far too fast.

Needs ``pip install "pss-param[lightning]"``; downloads nothing.
"""

import tempfile
from pydoc_data.topics import topics

import lightning
import torch
from torch import nn

from pss_param.integrations.lightning import PSSCallback

CONTEXT, WIDTH, LAYERS = 32, 32, 6


class ByteTransformer(lightning.LightningModule):
    """Predicts the next byte; normalises after every sublayer, which makes it fragile."""

    def __init__(self, lr: float) -> None:
        """Make the layers."""
        super().__init__()
        self.lr, self.losses = lr, []
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """Compute the loss of a batch of windows ``(B, CONTEXT + 1)``."""
        x = self.layers(self.embed(batch[:, :-1]) + self.position, mask=self.mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)


def batches(size: int = 8) -> torch.utils.data.DataLoader:
    """Cut the text into windows that overlap by one byte, in random order."""
    data = torch.tensor(list("".join(topics.values()).encode()))
    return torch.utils.data.DataLoader(data.unfold(0, CONTEXT + 1, CONTEXT), batch_size=size, shuffle=True)


def main(guarded: bool = True, steps: int = 120, lr: float = 1e-2) -> float:
    """Train at a learning rate that kills the model without the guard.

    Returns:
        Mean loss of the last 20 steps, in nats per byte; 3.3 is that of knowing byte frequencies alone.
    """
    lightning.seed_everything(0, verbose=False)
    model = ByteTransformer(lr)
    trainer = lightning.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[PSSCallback()] if guarded else [],
        default_root_dir=tempfile.mkdtemp(),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches())
    print(trainer.logged_metrics)
    return sum(model.losses[-20:]) / 20


if __name__ == "__main__":
    print("without the guard:", main(guarded=False))
    print("with it:", main())
