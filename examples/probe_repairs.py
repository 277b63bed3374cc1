# SPDX-License-Identifier: Apache-2.0
r"""Which repair? Let a short run decide: kill a small transformer, try each repair on disk, resume the best one."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pss_param as pss

TEXT = torch.tensor(list("".join(topics.topics.values()).encode("ascii", "replace")))
CONTEXT, HEALTHY, DEADLY = 32, 2e-3, 5e-2


class Model(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self) -> None:
        """Make fresh weights."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(128, 32)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[-1])
        return self.head(self.encoder(self.embed(tokens), mask, is_causal=True))


def batches(seed: int) -> Iterator[Tensor]:
    """Draw 16 pieces of text at a time, for ever."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(TEXT) - CONTEXT - 1, (16, 1), generator=chance)
        yield TEXT[starts + torch.arange(CONTEXT + 1)]


def train(model: Model, rate: float, steps: int, seed: int) -> float:
    """Train with a fresh AdamW; the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _, batch in zip(range(steps), batches(seed), strict=False):
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def main(folder: Path, steps: int = 120) -> None:
    """Live, die, probe."""
    torch.manual_seed(0)
    model, path = Model(), folder / "dead.safetensors"
    print(f"healthy: {train(model, HEALTHY, 2 * steps, seed=1):.2f}")
    print(f"dead:    {train(model, DEADLY, steps // 2, seed=2):.2f}")
    save_file(model.state_dict(), path)

    def judge(checkpoint: Path) -> float:
        model.load_state_dict(load_file(checkpoint))
        return train(model, HEALTHY, steps, seed=3)

    trials = pss.probe_repairs(path, judge)
    for trial in trials:
        print(f"{trial.options.strength if trial.options else 'as it is':8} {trial.loss:.2f} after {steps} steps")
    if trials[0].options is not None:
        print("wrote", Path(str(pss.repair_checkpoint(path, options=trials[0].options).output)).name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
