"""Known totals of reference networks, written here in Flax and in plain jax."""

import flax.linen as nn
import jax
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff import costs

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class VGG(nn.Module):
    """The convolutions of VGG-16 (configuration D)."""

    @nn.compact
    def __call__(self, x):
        for width in VGG16:
            if width == "M":
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = nn.relu(nn.Conv(width, (3, 3))(x))
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with an option-A shortcut: strided, padded with zero channels."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=True)(y)
        x = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.width - x.shape[-1]))))


class ResNet56(nn.Module):
    """ResNet-56 for CIFAR without its classifier."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), use_bias=False)(x))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(9):
                x = BasicBlock(width, 2 if stage and not block else 1)(x)
        return x.mean((1, 2))


def images(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def flax_report(model, x, **options):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return costs.analyze(model.apply, variables, x, **options)


def vgg_in_plain_jax(kernels, x):
    kernels = iter(kernels)
    for index, width in enumerate(VGG16):
        with jax.named_scope(f"layer{index}"):
            if width == "M":
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            else:
                numbers = ("NHWC", "HWIO", "NHWC")
                x = jax.nn.relu(lax.conv_general_dilated(x, next(kernels), (1, 1), "SAME", dimension_numbers=numbers))
    return x


@pytest.mark.parametrize(("size", "expected"), [(32, 313_196_544), (224, 15_346_630_656)])
def test_vgg16_in_flax(size, expected):
    assert flax_report(VGG(), images(size)).total.macs == expected


@pytest.mark.parametrize(("size", "expected"), [(32, 313_196_544), (224, 15_346_630_656)])
def test_vgg16_in_plain_jax(size, expected):
    widths = [3, *(width for width in VGG16 if width != "M")]
    kernels = [jax.ShapeDtypeStruct((3, 3, a, b), jnp.float32) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    report = costs.analyze(vgg_in_plain_jax, kernels, images(size))
    assert report.total.macs == expected
    assert report.total.params == sum(9 * a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def test_resnet56_without_classifier():
    report = flax_report(ResNet56(), images(32), residuals=False)
    assert report.total.macs == 125_485_056


def test_xla_convention_counts_no_more_than_the_paper_convention():
    assert 0 < flax_report(VGG(), images(32), residuals=False, convention="xla").total.macs < 313_196_544


def test_rows_are_flax_modules_in_order_of_first_appearance():
    names = [row.name for row in flax_report(VGG(), images(32), residuals=False).rows]
    assert names[0] == "VGG/Conv_0"
    assert [name for name in names if "Conv" in name] == [f"VGG/Conv_{index}" for index in range(13)]


@pytest.mark.slow
def test_depth_folds_blocks_into_one_row_and_keeps_the_totals():
    folded = flax_report(ResNet56(), images(32), depth=2)
    full = flax_report(ResNet56(), images(32))
    assert folded.layer("ResNet56/BasicBlock_0").macs == 2 * 32 * 32 * 9 * 16 * 16
    assert folded.layer("ResNet56/BasicBlock_0").params == full.layer("ResNet56/BasicBlock_0/Conv_0").params * 2 + 128
    for field in ("macs", "params", "residual_bytes"):
        assert getattr(folded.total, field) == getattr(full.total, field)
    assert folded.total.moved_bytes < full.total.moved_bytes
    assert len(flax_report(ResNet56(), images(32), depth=1, residuals=False).rows) == 1


def test_activation_bytes_of_a_convolution_are_its_output():
    report = flax_report(VGG(), images(32), residuals=False)
    assert report.layer("VGG/Conv_0").activation_bytes == 32 * 32 * 64 * 4
    row = report.layer("VGG/Conv_1")
    assert row.moved_bytes == 4 * (32 * 32 * 64 + row.params + 32 * 32 * 64)


def test_training_step_keeps_the_names_of_the_forward_pass():
    model = VGG()
    variables = jax.eval_shape(model.init, jax.random.key(0), images(32))
    step = jax.grad(lambda variables, x: model.apply(variables, x).sum())
    forward = costs.analyze(model.apply, variables, images(32), residuals=False)
    backward = costs.analyze(step, variables, images(32), residuals=False)
    assert {row.name for row in forward.rows} <= {row.name for row in backward.rows}
    first = forward.layer("VGG/Conv_0").macs
    assert backward.total.macs == 3 * forward.total.macs - first
    assert backward.layer("VGG/Conv_5").macs == 3 * forward.layer("VGG/Conv_5").macs
