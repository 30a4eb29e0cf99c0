"""Decoding: exact values, raw palette indices, and one sentence for every file that cannot be used."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import cv2
import numpy as np
import pytest
from PIL import Image
from voc_folders import write_label, write_picture

from svf_fast.train.data.cache import PairCache
from svf_fast.train.data.reading import image_size, read_image, read_label, read_pair


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 17)])
def test_png_pictures_are_read_as_rgb(tmp_path: Path, shape: tuple[int, int]) -> None:
    picture = write_picture(tmp_path / "a.png", *shape)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)
    assert image_size(tmp_path / "a.png") == shape


@pytest.mark.parametrize("mode", ["P", "L"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (31, 17)])
def test_labels_are_raw_values_whatever_the_palette(tmp_path: Path, mode: str, shape: tuple[int, int]) -> None:
    label = np.random.default_rng(1).choice(np.array([0, 1, 5, 20, 255], np.uint8), shape)
    write_label(tmp_path / "a.png", label, mode)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), label)


def test_opencv_would_not_have_read_palette_indices(tmp_path: Path) -> None:
    label = np.full((4, 4), 5, np.uint8)
    write_label(tmp_path / "a.png", label)
    for flag in (cv2.IMREAD_UNCHANGED, cv2.IMREAD_GRAYSCALE):
        decoded = np.asarray(cv2.imread(str(tmp_path / "a.png"), flag))
        assert not np.array_equal(decoded, label)


def test_a_palette_of_four_colours_is_read_as_indices(tmp_path: Path) -> None:
    label = np.array([[0, 1], [2, 3]], np.uint8)
    image = Image.fromarray(label)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(tmp_path / "a.png", bits=2)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), label)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_labels_of_other_modes_are_refused(tmp_path: Path, mode: str) -> None:
    write_label(tmp_path / "a.png", np.zeros((4, 4), np.uint8), mode)
    with pytest.raises(ValueError, match=r"a\.png.*mode.*expected one 8-bit channel"):
        read_label(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
def test_a_missing_file_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, read, content: bytes) -> None:
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.png (cannot be decoded|is truncated)"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, read) -> None:
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match=r"b\.png cannot be"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("read", [read_image, image_size])
@pytest.mark.parametrize("kept_share", [0.5, 0.9, 0.999])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str, read, kept_share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    write_picture(path, 60, 80)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept_share * len(content))])
    with pytest.raises(ValueError, match=r"a\.\w+ is truncated"):
        read(path)


def test_truncated_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_label(path, np.random.default_rng(0).integers(0, 20, (80, 80), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded as a label"):
        read_label(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_picture(path, 20, 30)
    before = read_image(path)
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert image_size(path) == (20, 30)
    np.testing.assert_array_equal(read_image(path), before)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_follows_exif_orientation_as_decoding_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape[:2]


def test_a_pair_of_different_sizes_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", 20, 30)
    write_label(tmp_path / "a.png", np.zeros((20, 31), np.uint8))
    with pytest.raises(ValueError, match=r"a\.jpg is 30x20 pixels .*a\.png is 31x20"):
        read_pair(tmp_path / "a.jpg", tmp_path / "a.png")


def test_an_orientation_that_only_xmp_states_turns_nothing_as_opencv_has_it(tmp_path: Path) -> None:
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", xmp=xmp)
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape[:2] == (20, 30)


@pytest.mark.parametrize(("limit_pairs", "kept_pairs"), [(0, 0), (1, 1), (2.5, 2), (9, 4)])
def test_the_cache_keeps_what_fits_and_answers_the_same(tmp_path: Path, limit_pairs: float, kept_pairs: int) -> None:
    paths = small_pairs(tmp_path, 4)
    cache = PairCache(int(limit_pairs * 400))
    for _ in range(2):
        for i, pair in enumerate(paths):
            image, label = cache.pair(*pair)
            np.testing.assert_array_equal(image, read_image(pair[0]))
            assert (label == i).all()
            assert not image.flags.writeable
            assert not label.flags.writeable
    assert cache.kept_bytes == 400 * kept_pairs


def small_pairs(root: Path, count: int) -> list[tuple[Path, Path]]:
    """Of 400 bytes each when decoded."""
    pairs = [(root / f"{i}.png", root / f"label{i}.png") for i in range(count)]
    for i, (image_path, label_path) in enumerate(pairs):
        write_picture(image_path, 10, 10, seed=i)
        write_label(label_path, np.full((10, 10), i, np.uint8))
    return pairs


def test_the_cache_keeps_what_came_first(tmp_path: Path) -> None:
    a, b, c = pairs = small_pairs(tmp_path, 3)
    cache = PairCache(800)
    for pair in (a, b, c, c, a):
        cache.pair(*pair)
    for image_path, label_path in pairs:
        image_path.unlink()
        label_path.unlink()
    cache.pair(*a)
    cache.pair(*b)
    with pytest.raises(FileNotFoundError):
        cache.pair(*c)


def test_a_picture_too_large_for_what_is_left_leaves_room_for_a_smaller_one(tmp_path: Path) -> None:
    (small, _) = small_pairs(tmp_path, 2)
    write_picture(tmp_path / "large.png", 30, 30)
    write_label(tmp_path / "large_label.png", np.zeros((30, 30), np.uint8))
    cache = PairCache(500)
    cache.pair(tmp_path / "large.png", tmp_path / "large_label.png")
    cache.pair(*small)
    assert cache.kept_bytes == 400


def test_several_threads_keep_to_the_bound_and_count_no_picture_twice(tmp_path: Path) -> None:
    pairs = small_pairs(tmp_path, 12)
    cache = PairCache(5 * 400 + 399)
    with ThreadPoolExecutor(8) as pool:
        for kept_bytes in pool.map(lambda pair: cache.pair(*pair) and cache.kept_bytes, pairs * 20):
            assert kept_bytes <= cache.limit_bytes
        found = list(pool.map(lambda pair: int(cache.pair(*pair)[1][0, 0]), pairs * 5))
    assert cache.kept_bytes == 5 * 400
    assert found == list(range(12)) * 5


def test_a_picture_that_two_threads_read_at_once_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair,) = small_pairs(tmp_path, 1)
    both_read = Barrier(2, timeout=10)

    def slowly(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
        found = read_pair(image_path, label_path)
        both_read.wait()
        return found

    monkeypatch.setattr("svf_fast.train.data.cache.read_pair", slowly)
    cache = PairCache(1000)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: cache.pair(*pair), range(2)))
    assert cache.kept_bytes == 400


def test_a_negative_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_bytes is -1"):
        PairCache(-1)
