"""From files to pixels: what an image looks like when it is read, and what is said of one that cannot be."""

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from pipeline.decoding import decode_image, decode_images, warn_once
from pipeline.large import centre_crop


def test_images_are_upright_opaque_and_cut_to_the_centre_square(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode_image(tmp_path / "wide.png", 20).min() == 200
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 40, 20))  # the top is white, until the tag turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    half.save(tmp_path / "turned.jpg", exif=exif)
    turned = decode_image(tmp_path / "turned.jpg", 40)
    assert turned[:, :15].max() < 20 and turned[:, 25:].min() > 235
    for mode in ("L", "P", "RGBA", "CMYK"):
        Image.new(mode, (9, 9)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        assert decode_image(next(tmp_path.glob(f"{mode}.*")), 9).shape == (3, 9, 9)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits_keep_their_grey_and_say_so_once(tmp_path, capsys, ending):
    warn_once.cache_clear()
    values = np.arange(0, 65_536, 16, dtype=np.uint16).reshape(64, 64)
    paths = [tmp_path / f"{number}.{ending}" for number in range(3)]
    for path in paths:
        Image.fromarray(values).save(path)
    images = decode_images(paths, 64)
    assert np.array_equal(images[2, 1], (values / 257 + 0.5).astype(np.uint8))
    assert np.array_equal(centre_crop(paths[0], 64, crop_pct=1.0), images[0])
    assert capsys.readouterr().err.count("warning: grey images of 16 bits are scaled to 8") == 1


def test_pixels_of_32_bits_are_refused(tmp_path):
    for name, kind in (("int.tif", np.int32), ("float.tif", np.float32)):
        Image.fromarray(np.full((8, 8), 1000, kind)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} cannot be decoded as an image .*32 bits.*save it with 8 or 16"):
            decode_image(tmp_path / name, 8)


def test_all_images_that_cannot_be_decoded_are_named_at_once(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path in paths:
        path.write_text("no image")
    Image.new("RGB", (8, 8)).save(paths[4])
    with pytest.raises(UserError, match="0.png cannot .*; .*1.png cannot .*; .*2.png cannot .*; and 5 more files$"):
        decode_images(paths, 8)
