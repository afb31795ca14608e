"""Networks: architectures of the field, and the one module that runs them all."""

from jaxeff.models.cnn import cnn, mlp
from jaxeff.models.mobilenet import mobilenet
from jaxeff.models.network import Network, first_order_conv, first_order_dense
from jaxeff.models.resnet import resnet
from jaxeff.models.sngan import sngan_discriminator, sngan_generator
from jaxeff.models.vgg import vgg, vgg9
from jaxeff.models.zoo import ZOO, architecture

__all__ = [
    "ZOO",
    "Network",
    "architecture",
    "cnn",
    "first_order_conv",
    "first_order_dense",
    "mlp",
    "mobilenet",
    "resnet",
    "sngan_discriminator",
    "sngan_generator",
    "vgg",
    "vgg9",
]
