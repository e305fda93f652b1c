"""Time of the search step, compared with the same step in eager PyTorch, which the authors' code uses.

    pip install torch   # used only by this script and, if installed, by gpu.py
    python benchmarks/pytorch_step.py [--batch-size 128] [--repeats 15]

ResNet-20 with one score per weight of its 3x3 convolutions. A step computes masks from scores, forward and backward
pass, and updates weights and scores with SGD and Nesterov momentum. The PyTorch code is written from the paper. The
PyTorch step gets normalised images on the device. The cs_jax step also selects, augments and normalises its batch.
The steps run interleaved in one process, on all CPU cores or one GPU, in float32. Both libraries use their default
precision of matrix products, which on a GPU may be TF32.
"""

# pyright: reportMissingImports=false

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from step import Settings, device_title, make_steps
from timing import interleave, median_ratio, start
from torch import nn
from torch.nn import functional

TEMPERATURE, PENALTY_WEIGHT, RATE, DECAY = 3.0, 1e-8, 0.01, 1e-4


class MaskedConv(nn.Module):
    """3x3 convolution without bias; its kernel is multiplied by the soft mask of its scores."""

    def __init__(self, features_in: int, features_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.kernel = nn.Parameter(torch.empty(features_out, features_in, 3, 3))
        nn.init.xavier_normal_(self.kernel)
        self.score = nn.Parameter(torch.zeros_like(self.kernel))
        self.mask = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mask = torch.sigmoid(TEMPERATURE * self.score) / 0.5  # scores start at 0
        return functional.conv2d(x, self.kernel * self.mask, stride=self.stride, padding=1)


class Block(nn.Module):
    def __init__(self, features_in: int, features: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = MaskedConv(features_in, features, stride), nn.BatchNorm2d(features)
        self.second, self.second_norm = MaskedConv(features, features, 1), nn.BatchNorm2d(features)
        changes = stride != 1 or features_in != features
        self.shortcut = nn.Conv2d(features_in, features, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = MaskedConv(3, 16, 1), nn.BatchNorm2d(16)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        strides = (1, 1, 1, 2, 1, 1, 2, 1, 1)
        self.blocks = nn.Sequential(*map(Block, widths, widths[1:], strides))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(functional.relu(self.stem_norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class TorchStepper:
    """Search steps in PyTorch, with the method `run` that `timing.interleave` calls."""

    def __init__(self, batch_size: int, device: str, steps: int = 1) -> None:
        self.device, self.steps = device, steps
        self.network = ResNet20().to(device)
        self.convolutions = [module for module in self.network.modules() if isinstance(module, MaskedConv)]
        scores = {id(module.score) for module in self.convolutions}
        weights = [parameter for parameter in self.network.parameters() if id(parameter) not in scores]
        self.optimizers = [
            torch.optim.SGD(weights, RATE, momentum=0.9, nesterov=True, weight_decay=DECAY),
            torch.optim.SGD([module.score for module in self.convolutions], RATE, momentum=0.9, nesterov=True),
        ]
        self.images = torch.randn(batch_size, 3, 32, 32, device=device)
        self.labels = torch.arange(batch_size, device=device) % 10

    def run(self) -> float:
        """Mean seconds of a step, over `steps` steps and one synchronisation."""
        started = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / self.steps

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        cross_entropy = functional.cross_entropy(self.network(self.images), self.labels)
        penalty = sum(module.mask.sum() for module in self.convolutions)
        (cross_entropy + PENALTY_WEIGHT * penalty).backward()
        for optimizer in self.optimizers:
            optimizer.step()


def main(settings: Settings) -> None:
    peer = TorchStepper(settings.batch_size, "cuda" if torch.cuda.is_available() else "cpu")
    times = interleave({"PyTorch, eager": peer, "cs_jax": make_steps(settings)["search"]}, settings.repeats)
    title = f"search step, {device_title(settings)}, torch {torch.__version__}"
    table = Table("step", "median ms", "min ms", "ratio to PyTorch", title=title)
    for name, seconds in times.items():
        milliseconds = (1e3 * statistics.median(seconds), 1e3 * min(seconds))
        ratio = median_ratio(seconds, times["PyTorch, eager"])
        table.add_row(name, *(f"{ms:.1f}" for ms in milliseconds), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    start(main, Settings, __doc__)
