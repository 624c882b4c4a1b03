"""The gallery: predictions above truth, at their places and unblurred."""

import numpy as np

from sgw_jax.pictures.gallery import gallery
from sgw_jax.pictures.panels import GAP, MARGIN


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
