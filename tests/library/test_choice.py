"""The choice by measurement: the fastest is taken, nothing slower than the baseline ever, and it is remembered on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svf_fast.choice import Chooser, cache_folder

KEY = ("forward", (2, 8, 9, 9), None, True)


class TooLarge(Exception):
    """What a way raises that does not fit on a device."""


def chooser(
    seconds: dict[str, float], environment: str = "a GPU torch 2"
) -> tuple[Chooser, dict[str, Callable[[], str]]]:
    """A chooser whose clock reads `seconds` by the name that a way returns, and those ways."""
    ways = {name: (lambda name=name: name) for name in seconds}
    return Chooser(environment, lambda way: [seconds[str(way())]] * 3, (TooLarge,)), ways


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVF_FAST_CACHE_DIR", str(tmp_path / "cache"))


def test_the_fastest_is_taken_and_remembered() -> None:
    first, ways = chooser({"plain": 3.0, "fused": 1.0, "project": 2.0})
    assert first.known(KEY) is None
    assert first.choose(KEY, ways, "plain") == "fused"
    assert first.known(KEY) == "fused"
    # another process reads it from disk; another device or version does not
    assert chooser({})[0].known(KEY) == "fused"
    assert chooser({}, "another GPU torch 2")[0].known(KEY) is None
    assert chooser({})[0].known(("backward", *KEY)) is None


def test_nothing_slower_than_the_baseline_is_taken() -> None:
    slow, ways = chooser({"plain": 1.0, "fused": 1.5, "project": 0.995})
    # within the noise of a measurement counts as slower
    assert slow.choose(KEY, ways, "plain") == "plain"


def test_a_way_that_does_not_fit_is_left_out() -> None:
    some, ways = chooser({"plain": 3.0, "fused": 1.0})

    def refuse() -> str:
        raise TooLarge("shared memory")

    assert some.choose(KEY, {**ways, "project": refuse}, "plain") == "fused"

    def fail() -> str:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        some.choose(KEY, {**ways, "project": fail}, "plain")
    with pytest.raises(TooLarge):
        some.choose(KEY, {**ways, "plain": refuse}, "plain")


def test_what_another_process_wrote_meanwhile_is_kept() -> None:
    one, ways = chooser({"plain": 3.0, "fused": 1.0})
    other, _ = chooser({"plain": 3.0, "fused": 1.0})
    one.choose(KEY, ways, "plain")
    other.choose(("backward",), ways, "plain")
    stored = json.loads(one.path.read_text(encoding="utf-8"))
    assert stored == {"environment": "a GPU torch 2", "choices": {repr(KEY): "fused", "('backward',)": "fused"}}
    assert not list(one.path.parent.glob("*.part"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"environment": "a GPU torch 2", "choices": 3}', '{"environment": "x", "choices": {}}']
)
def test_a_damaged_file_costs_a_warning_and_is_replaced(content: str) -> None:
    some, ways = chooser({"plain": 3.0, "fused": 1.0})
    some.path.parent.mkdir(parents=True)
    some.path.write_text(content, encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert some.known(KEY) is None
    with pytest.warns(UserWarning, match="cannot be read"):
        assert some.choose(KEY, ways, "plain") == "fused"
    assert chooser({})[0].known(KEY) == "fused"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SVF_FAST_CACHE_DIR", str(tmp_path / "file"))
    some, ways = chooser({"plain": 3.0, "fused": 1.0})
    with pytest.warns(UserWarning, match="cannot be"):
        assert some.choose(KEY, ways, "plain") == "fused"
    assert some.known(KEY) == "fused"


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SVF_FAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "svf_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "svf_fast"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container started with a bare user id."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SVF_FAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    some, ways = chooser({"plain": 3.0, "fused": 1.0})
    assert some.choose(KEY, ways, "plain") == "fused"


def test_what_does_not_last_is_not_written() -> None:
    some, ways = chooser({"plain": 3.0, "fused": 1.0})
    assert some.choose(KEY, ways, "plain", is_lasting=False) == "fused"
    assert some.known(KEY) == "fused"
    assert chooser({})[0].known(KEY) is None
