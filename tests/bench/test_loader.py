"""The loader's benchmark speaks only of equal episodes, and counts cores as it says."""

import pytest
import torch

from svf_fast.bench import loader
from svf_fast.bench.loader import Setting, cores_for_one_gpu, require_equal
from svf_fast.bench.loader_photos import CLASS_IDS, LIST_FILE, write_photos
from svf_fast.train.data import episodes
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Placed
from svf_fast.train.data.voc import VOCFolder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = tmp_path_factory.mktemp("photos") / "voc"
    write_photos(root, 16, 150, 200, seed=1)
    return VOCFolder(root).split(LIST_FILE, CLASS_IDS)


@pytest.mark.parametrize("transforms", ["training", "test"])
@pytest.mark.parametrize(("shots", "size"), [(1, 73), (2, 161), (1, 257)])
def test_both_loaders_make_the_same_episodes(split: Split, shots: int, size: int, transforms: str) -> None:
    assert require_equal(Setting(size, shots, transforms), split) < 1e-6


def darker(placed: Placed, planes) -> None:
    planes[...] = 0


def test_no_speed_is_reported_for_other_pictures(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "normalise", darker)
    with pytest.raises(SystemExit, match=r"images differ by .*, labels are equal; no speed is reported"):
        require_equal(Setting(73, 1, "training"), split)


def test_no_speed_is_reported_for_other_labels(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "_episode_label", lambda classes: classes * 0)
    with pytest.raises(SystemExit, match="labels are not equal; no speed is reported"):
        require_equal(Setting(73, 1, "test"), split)


def test_every_loader_is_timed_on_as_many_episodes(split: Split) -> None:
    threads = torch.get_num_threads()
    timed = loader.time_setting(Setting(33, 1, "test"), split, rounds=2, batches=1)
    assert {len(seconds) for seconds in timed["seconds"].values()} == {2}
    assert set(timed["episodes_per_cpu_second"]) == {"reference", "cold", "warm"}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("rate", "step_ms", "cores"), [(100.0, 80.0, 1), (100.0, 79.0, 2), (150.0, 20.2, 3)])
def test_cores_make_a_batch_of_eight_in_a_step(rate: float, step_ms: float, cores: int) -> None:
    assert cores_for_one_gpu(rate, step_ms) == cores
