"""The gallery: predictions above truth, at their places and unblurred."""

import numpy as np

from sgw_jax.pictures.gallery import LEAST_WIDTH, gallery
from sgw_jax.pictures.panels import GAP, MARGIN, TEXT_SIZE, Lettering


def test_gallery_shows_every_task_of_the_first_images() -> None:
    rng = np.random.default_rng(0)

    def pictures(n: int) -> np.ndarray:
        return rng.integers(0, 256, (n, 32, 48, 3), dtype=np.uint8)

    truth, prediction = pictures(3), pictures(3)
    tasks = {name: {"pictures": {"truth": truth, "prediction": prediction}} for name in ("depth", "human_parts")}
    picture = gallery({"image": pictures(3), "tasks": tasks}, count=2)
    pixels = np.asarray(picture)
    # Tiles are 192 x 128 (4 times the image), three columns; the last tile is the truth of the second image.
    assert picture.width == 2 * MARGIN + 3 * 192 + 2 * 4
    corner = pixels[picture.height - MARGIN - 128 : picture.height - MARGIN, picture.width - MARGIN - 192 : -MARGIN]
    np.testing.assert_array_equal(corner, truth[1].repeat(4, 0).repeat(4, 1))
    above = pixels[picture.height - MARGIN - 2 * 128 - 4 :][:128, picture.width - MARGIN - 192 : -MARGIN]
    np.testing.assert_array_equal(above, prediction[1].repeat(4, 0).repeat(4, 1))
    assert picture.height > 4 * 128 + GAP // 2


def test_what_stands_beside_the_rows_is_not_cut_off() -> None:
    """An upright image of 112 columns is enlarged, one that is wide enough is not."""
    for width, tile in ((112, 224), (168, 168)):
        images = np.zeros((1, 2 * width, width, 3), np.uint8)
        found = gallery({"image": images, "tasks": {"edges": {"pictures": {"truth": images, "prediction": images}}}})
        assert found.width == 2 * MARGIN + 2 * tile + 4
    assert Lettering(TEXT_SIZE).length("upper row: predicted") <= LEAST_WIDTH
