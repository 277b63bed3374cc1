# SPDX-License-Identifier: Apache-2.0
"""Register views by hand with PyTorch's own parametrize, and share one detector between them.

`pss.attach` does this for a whole model and keeps every Parameter in its place. By hand, the stored weight moves to
`parametrizations.weight.original`; `pss-repair export` gives such a checkpoint its plain names back.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

import pss_param as pss


def main(steps: int = 80) -> int:
    """Train two layers, one of them with a view.

    Returns:
        How often the view was opened.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    view = pss.SmoothingView(pss.Smoothing(shape="clip", edge="dominant"), label="0.weight")
    parametrize.register_parametrization(model[0], "weight", view)
    detector = pss.GradientNormRatio(threshold=2.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)) * (20 if step == 50 else 1)
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).tanh()).backward()
        # Before the optimizer's step: store what the last opening showed, then judge the new gradient.
        view.fold_(model[0].parametrizations.weight.original)
        verdict = detector.observe(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if verdict.triggered:
            print(f"step {step}: {verdict.reason}")
            view.open()
        optimizer.step()

    view.fold_(model[0].parametrizations.weight.original)
    plain = pss.plain_state_dict(model.state_dict())
    print("plain names:", ", ".join(plain))
    return view.openings


if __name__ == "__main__":
    main()
