"""Cropping, value ranges, grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from utils import images


def picture(array):
    return Image.fromarray(np.asarray(array, np.uint8))


def test_crop_takes_the_middle_where_the_size_fits():
    rows, columns = np.mgrid[:4, :7]
    array = np.stack([rows * 10, columns * 10, rows + columns], axis=-1)
    # Width 7 to 4: (7 - 4) // 2 = 1 column falls off on the left, two on the right.
    cropped = np.asarray(images.center_crop(picture(array), 4))
    np.testing.assert_array_equal(cropped, array[:, 1:5])
    tall = np.asarray(images.center_crop(picture(array.transpose(1, 0, 2)), 4))
    np.testing.assert_array_equal(tall, array.transpose(1, 0, 2)[1:5])


def test_crop_halves_with_a_box_while_the_short_side_is_twice_the_size():
    array = np.zeros((8, 8), np.uint8)
    array[:4, :4] = np.arange(16).reshape(4, 4) * 16  # means of 4x4 boxes: 120, 0, 0, 0
    # 8 -> 4 -> 2 by two box halvings; a bicubic reduction would mix the quarters.
    np.testing.assert_array_equal(
        np.asarray(images.center_crop(picture(array), 2)), [[120, 0], [0, 0]]
    )


def test_crop_halves_odd_sides_to_the_smaller_integer():
    # 9x5 -> (4, 2) by one halving, then the middle 2 of 4 columns.
    array = np.tile(np.arange(9, dtype=np.uint8) * 20, (5, 1))
    halved = picture(array).resize((4, 2), Image.Resampling.BOX)
    expected = np.asarray(halved)[:, 1:3]
    np.testing.assert_array_equal(np.asarray(images.center_crop(picture(array), 2)), expected)


def test_crop_below_twice_the_size_is_bicubic():
    # A ramp 0, 30, ..., 150 of 6 pixels to 4 pixels: scale 1.5. Bicubic (a = -0.5) with the
    # support widened by the scale reproduces a ramp away from the edges: centres 0.25 + 1.5 i
    # (in source pixels) for i = 1, 2 are 1.75 and 3.25 -> 52.5 and 97.5.
    array = np.tile(np.arange(6) * 30, (6, 1))
    cropped = np.asarray(images.center_crop(picture(array), 4)).astype(int)
    assert np.abs(cropped[:, 1] - 52.5).max() <= 1.5 and np.abs(cropped[:, 2] - 97.5).max() <= 1.5
    # The end pixels see more of their own side: a box reduction would give 10 and 140.
    assert (cropped[:, 0] < 10).all() and (cropped[:, 3] > 140).all()


@pytest.mark.parametrize("width,height", [(40, 40), (41, 97), (500, 33), (64, 63), (33, 32)])
def test_crop_has_the_size_asked_for(width, height):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    assert images.center_crop(picture(array), 32).size == (32, 32)


@pytest.mark.parametrize("module", [np, jnp])
def test_ranges_are_inverse_of_each_other(module):
    values = module.arange(256, dtype=module.uint8).reshape(1, 16, 16, 1)
    x = images.to_float(values)
    assert x.dtype == module.float32 and x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(images.to_uint8(x), values)


def test_to_uint8_truncates_and_clips_also_in_jit():
    x = np.array([-2, -1, -0.00393, 0, 0.0039, 0.996, 1, 1.1], np.float32)
    # 127.5 x + 128 = -127, 0.5, 127.499, 128, 128.497, 254.99, 255.5, 268.25
    expected = [0, 0, 127, 128, 128, 254, 255, 255]
    np.testing.assert_array_equal(images.to_uint8(x), expected)
    np.testing.assert_array_equal(jax.jit(images.to_uint8)(x), expected)
    assert jax.jit(images.to_uint8)(x.astype(jnp.bfloat16)).dtype == jnp.uint8


def test_grid_goes_row_by_row_and_is_black_at_the_end():
    cells = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    laid = images.grid(cells, 2)
    assert laid.shape == (6, 6, 1)
    np.testing.assert_array_equal(laid[::2, ::3, 0], [[1, 2], [3, 4], [5, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels_and_leaves_nothing_else(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    images.save_png(tmp_path / "a.png", array)
    with Image.open(tmp_path / "a.png") as file:
        read = np.asarray(file).reshape(array.shape)
    np.testing.assert_array_equal(read, array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
