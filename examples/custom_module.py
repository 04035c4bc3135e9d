"""Fit any module: a small U-Net-like model, 70 % of the peak that its step would have."""

import torch
from torch import nn
from torch.nn import functional as F

import tightfit


class Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.norm(self.second(F.gelu(self.first(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 16), Block(16, 16), Block(16, 16), Block(32, 16)])
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        inner = self.blocks[2](self.blocks[1](F.avg_pool2d(first, 2)))
        out = self.blocks[3](torch.cat([first, F.interpolate(inner, scale_factor=2)], 1))
        return F.mse_loss(self.head(out), x)


torch.manual_seed(0)
model, batch = Net(), torch.randn(4, 3, 64, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

applied = tightfit.fit(model, batch, budget="70%", optimizer=optimizer)
plan = applied.plan
print(f"planned peak {plan.peak_bytes:,} B of {plan.unplanned_peak_bytes:,} B, on {', '.join(applied.active_units)}")
for step in range(5):
    loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
applied.remove()

proof = tightfit.verify(model, batch, plan, optimizer=optimizer)
for check in proof.checks:
    print(f"{check.name}: {'passed' if check.passed else 'FAILED'} ({check.measured})")
assert proof.passed
