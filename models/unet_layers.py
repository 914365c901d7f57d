"""The blocks of the U-Net in their order, and what they cost."""

import math
from typing import NamedTuple

from models.network import sides


class Layer(NamedTuple):
    """One residual block."""

    name: str
    sides: tuple[int, int]  # of its output
    width_in: int  # channels of its input
    width: int  # channels of its output
    attention: bool = False
    resample: str = ""  # down | up, or at the same side
    joins: bool = False  # takes the newest output of the encoder that is left beside its input

    signal: bool = False  # of height 1 on all levels

    @property
    def has_skip(self):
        return bool(self.resample) or self.width_in != self.width


def layers(size, first, widths, num_blocks, attn_resolutions):
    """Lists the blocks in their order, (encoder, decoder), for images of this size.

    Args:
      size: their side, or (height, width).
      first: channels that come into the first block.
      widths: channels by level; level i has the sides `side >> i`.
      num_blocks: of a level of the encoder; the decoder has one more.
      attn_resolutions: longer sides at which every block of the encoder, and the last of the
        decoder, has attention; the innermost block always has.
    """
    encoder, decoder, skips = [], [], [first]
    signal = sides(size)[0] == 1

    def level_of(level):
        h, w = (side >> level for side in sides(size))
        h = 1 if signal else h

        def layer(name, *channels, **options):
            return Layer(name.format(f"{h}x{w}"), (h, w), *channels, **options, signal=signal)

        return layer, max(h, w) in attn_resolutions

    for level, width in enumerate(widths):
        layer, attends = level_of(level)
        if level:
            encoder.append(layer("enc_{}_down", skips[-1], skips[-1], resample="down"))
            skips.append(skips[-1])
        for i in range(num_blocks):
            encoder.append(layer(f"enc_{{}}_block{i}", skips[-1], width, attends))
            skips.append(width)
    before = skips[-1]
    for level, width in reversed(list(enumerate(widths))):
        layer, attends = level_of(level)
        if level == len(widths) - 1:
            decoder.append(layer("dec_{}_in0", before, before, attention=True))
            decoder.append(layer("dec_{}_in1", before, before))
        else:
            decoder.append(layer("dec_{}_up", before, before, resample="up"))
        for i in range(num_blocks + 1):
            last, joined = attends and i == num_blocks, before + skips.pop()
            decoder.append(layer(f"dec_{{}}_block{i}", joined, width, last, joins=True))
            before = width
    return encoder, decoder


def window(signal):
    """Returns what the convolutions have in common: 3 x 3, of signals 1 x 3."""
    size = (1, 3) if signal else (3, 3)
    return dict(kernel_size=size, padding=tuple((n // 2, n // 2) for n in size))


def products(layer, E):
    """Counts the products of numbers in one block for one image."""
    N, width = math.prod(layer.sides), layer.width
    total = (
        math.prod(window(layer.signal)["kernel_size"]) * N * (layer.width_in + width) * width
        + E * width
    )
    if layer.has_skip:
        total += N * layer.width_in * width
    if layer.attention:
        total += 4 * N * width**2 + 2 * N**2 * width
    return total
