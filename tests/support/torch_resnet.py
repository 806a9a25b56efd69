"""A standard PyTorch ResNet with torchvision's names and trained statistics."""

from collections.abc import Sequence
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")
nn, F = torch.nn, torch.nn.functional


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> Any:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """torchvision's BasicBlock or Bottleneck, from its convs (outputs, size, stride)."""

    def __init__(self, inputs: int, convs: list[tuple[int, int, int]], stride: int) -> None:
        super().__init__()
        self.number = len(convs)
        before = inputs
        for number, (outputs, size, step) in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv(before, outputs, size, step))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
            before = outputs
        self.downsample = None
        if stride != 1 or inputs != before:
            self.downsample = nn.Sequential(conv(inputs, before, 1, stride), nn.BatchNorm2d(before))

    def forward(self, x: Any) -> Any:
        y = x
        for number in range(1, self.number + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = F.relu(y) if number < self.number else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(
        self,
        stages: Sequence[int],
        bottleneck: bool = False,
        classes: int = 1000,
        width: int = 64,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.stages = len(stages)
        self.conv1, self.bn1 = conv(channels, width, 7, 2), nn.BatchNorm2d(width)
        inputs = width
        for stage, blocks in enumerate(stages, 1):
            made = []
            for number in range(blocks):
                w, stride = width * 2 ** (stage - 1), 2 if stage > 1 and not number else 1
                convs = [(w, 3, stride), (w, 3, 1)]
                if bottleneck:
                    convs = [(w, 1, 1), (w, 3, stride), (4 * w, 1, 1)]
                made.append(Block(inputs, convs, stride))
                inputs = convs[-1][0]
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def trained(model: Any, x: Any, steps: int = 2) -> Any:
    """The model with scales, biases and running statistics that differ from the initial ones.

    The statistics are those of its activations with some noise in each channel, so that every
    layer affects the logits and none of them explodes.
    """
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.2)
                layer.momentum = 0.5
        for _ in range(steps):
            model.train()(x)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1
                layer.running_mean += 0.1 * torch.randn_like(layer.running_mean)
                layer.running_var *= torch.empty_like(layer.running_var).uniform_(0.8, 1.25)
    return model.eval()
