"""The same networks in torch, in its fastest form: channels_last, and torch.compile where that helps."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxeff import spec


def train_step(
    architecture: spec.Architecture, batch: Mapping[str, Any], *, bf16: bool = False, compiled: bool = False
) -> Callable[[], Any]:
    """A function that runs one train step (SGD with momentum, softmax cross entropy) of a first-order architecture.

    Args:
      architecture: VGG or ResNet of `jaxeff.models`.
      batch: {"image": float [N, H, W, C], "label": int [N]}.
      bf16: autocast to bfloat16.
      compiled: use torch.compile; the CPU build has no advantage from it here.

    Returns:
      The step; on a GPU it waits for its end.

    Raises:
      ImportError: if torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError('this peer needs torch: pip install "jaxeff[bench]"') from error

    device = "cuda" if torch.cuda.is_available() and bf16 else "cpu"
    if device == "cpu":
        # As many threads as XLA's pool has.
        torch.set_num_threads(os.cpu_count() or 1)
    network = _module(torch, architecture).to(device, memory_format=torch.channels_last)
    images = torch.from_numpy(np.array(batch["image"]).transpose(0, 3, 1, 2).copy()).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(np.array(batch["label"]).astype(np.int64)).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    forward = torch.compile(network) if compiled else network

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _module(torch: Any, architecture: spec.Architecture) -> Any:
    nn = torch.nn
    shapes = spec.shapes(architecture)

    def conv(layer, channels):
        parts = [
            nn.Conv2d(
                channels, layer.features, layer.kernel, layer.strides, layer.kernel[0] // 2,
                groups=layer.groups or channels, bias=layer.norm is None,
            )
        ]  # fmt: skip
        parts += [nn.BatchNorm2d(layer.features)] if layer.norm else []
        parts += [nn.ReLU(inplace=True)] if layer.act else []
        return parts

    class Block(nn.Module):
        def __init__(self, layer, path):
            super().__init__()
            self.body = nn.Sequential(*build(layer.body, f"{path}/"))
            self.shape = shapes[path]
            self.pads = layer.shortcut == "pad"

        def forward(self, x):
            y = self.body(x)
            if self.pads:
                stride = -(-self.shape.input[0] // self.shape.output[0])
                extra = self.shape.output[-1] - self.shape.input[-1]
                x = nn.functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))
            return nn.functional.relu(y + x)

    def build(layers, prefix=""):
        parts = []
        for layer in layers:
            path = prefix + layer.name
            if isinstance(layer, spec.Conv):
                parts += conv(layer, shapes[path].input[-1])
            elif isinstance(layer, spec.Dense):
                parts.append(nn.Linear(shapes[path].input[-1], layer.features))
                parts += [nn.ReLU(inplace=True)] if layer.act else []
            elif isinstance(layer, spec.Pool):
                parts.append(nn.MaxPool2d(layer.window))
            elif isinstance(layer, spec.GlobalPool):
                parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            elif isinstance(layer, spec.Flatten):
                parts.append(nn.Flatten())
            elif isinstance(layer, spec.Residual):
                parts.append(Block(layer, path))
            else:
                raise TypeError(f"{type(layer).__name__} has no torch peer")
        return parts

    return nn.Sequential(*build(architecture.layers))
