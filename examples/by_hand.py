"""Mark a region of a custom model by hand: hold its matrix products, run the rest again."""

import torch
from torch import nn
from torch.nn import functional as F

import tightfit


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + tightfit.checkpoint(self.inside, x, keep=["addmm"])

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.down(F.silu(self.gate(x)) * self.up(x)), 0.1)


torch.manual_seed(0)
model = nn.Sequential(Gated(64), Gated(64))
batch = torch.randn(32, 64)
for _ in range(2):  # the first call of a region learns what it does
    torch.manual_seed(1)
    model(batch).square().mean().backward()
    marked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

Gated.forward = lambda self, x: x + self.inside(x)  # type: ignore[method-assign]
torch.manual_seed(1)
model(batch).square().mean().backward()
same = all(torch.equal(a, p.grad) for a, p in zip(marked, model.parameters(), strict=True))
print("gradients with and without the marked region:", "identical" if same else "DIFFERENT")
assert same
