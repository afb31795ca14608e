"""Generator and discriminator of a small SNGAN (Miyato et al. 2018, arXiv 1802.05957, their table of CNNs).

Both are architectures like any other, so `spec.quadratize` makes them quadratic, `costs` counts them and `Network` runs
them. The spectral norm is not in them: it acts on parameters, see `jaxeff.training.spectral_normalise`.
"""

from collections.abc import Sequence

from jaxeff.spec import Architecture, Conv, Dense, Flatten, Layer, Reshape, Upsample


def sngan_generator(
    widths: Sequence[int] = (64, 32, 16),
    *,
    latent: int = 64,
    output_shape: tuple[int, int, int] = (28, 28, 1),
    norm: str | None = "batch",
) -> Architecture:
    """Latent vector to image: a dense layer to a small map, then doublings, each with a 3x3 convolution, norm and ReLU.

    Nearest-neighbour upsampling and a convolution stand in place of the paper's transposed convolutions, which leave
    checkerboards (Odena et al. 2016, distill.pub/2016/deconv-checkerboard).

    Args:
      widths: channels of the first map and after each doubling; n of them make images 2^(n-1) times the first map, so
        three go from 7x7 to 28x28 and four from 4x4 to 32x32.
      latent: size of the latent vector, the input.
      output_shape: (H, W, C) of the images.
      norm: norm after every hidden convolution.

    Returns:
      The architecture; layers are project, map, up1, conv1, up2, ..., image. Images are in [-1, 1] (tanh). The first
      and the last layer are not of role "body", so edits leave them as they are unless told otherwise.

    Raises:
      ValueError: if there are fewer than two widths, or the size of the images does not halve that often.
    """
    doublings = len(widths) - 1
    height, width, channels = output_shape
    if doublings < 1:
        raise ValueError(f"widths must name the first map and at least one doubling, got {tuple(widths)}")
    if height % 2**doublings or width % 2**doublings:
        raise ValueError(
            f"output_shape={tuple(output_shape)}: {doublings} doublings ({len(widths)} widths) need a height and width "
            f"that divide by {2**doublings}; choose other widths"
        )
    first = (height // 2**doublings, width // 2**doublings, widths[0])
    layers: list[Layer] = [Dense("project", first[0] * first[1] * first[2], role="stem"), Reshape("map", first)]
    for index, features in enumerate(widths[1:], start=1):
        layers += [Upsample(f"up{index}"), Conv(f"conv{index}", features, norm=norm)]
    layers.append(Conv("image", channels, act="tanh", role="head"))
    return Architecture("sngan_generator", (latent,), tuple(layers))


def sngan_discriminator(
    widths: Sequence[int] = (32, 64, 128),
    *,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    act: str | None = "relu",
) -> Architecture:
    """Image to one score: 4x4 convolutions of stride 2 without norms, then a dense layer on the flattened map.

    A kernel whose size the stride divides sees every inner pixel equally often. One of 3x3 at stride 2 does not, and so
    gives the generator gradients that are stronger in every second row and column (Odena et al. 2016, as above).

    Args:
      widths: channels of each convolution.
      input_shape: (H, W, C).
      act: activation of the convolutions.

    Returns:
      The architecture; layers are conv1, conv2, ..., flatten, head.

    Raises:
      ValueError: if `widths` is empty.
    """
    if not widths:
        raise ValueError("widths must name at least one convolution, for example (32, 64, 128)")
    layers: list[Layer] = [
        Conv(f"conv{index}", features, (4, 4), (2, 2), act=act) for index, features in enumerate(widths, start=1)
    ]
    layers += [Flatten("flatten"), Dense("head", 1)]
    return Architecture("sngan_discriminator", tuple(input_shape), tuple(layers))
