"""tools.tiny_base.image_file: the training images of the base, written and read again."""

from pathlib import Path

import numpy as np

from tools.tiny_base import image_file


def test_a_file_gives_back_the_very_images_and_is_the_same_each_time(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    concepts, styles = ["owl", "rocket", "piñata"], ["noto", "noto", "fluent"]
    paths = [tmp_path / "new" / name for name in ("one.zip", "two.zip")]
    for path in paths:
        image_file.write(path, images, concepts, styles)
    found = image_file.read(paths[0])
    assert np.array_equal(found[0], images) and found[1:] == (concepts, styles)
    assert paths[0].read_bytes() == paths[1].read_bytes()
