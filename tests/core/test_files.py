"""Atomic file writes: on a full disk, where a folder has the name, and while another process reads."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import small

from cs_jax.core.files import write_all, write_whole


def contents(folder: Path) -> dict[str, bytes | None]:
    """Contents of all files in a folder, hidden ones too, by name; None for a folder."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_a_file_is_made_and_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"first", b"", b"a longer one\0\xff"):
        write_whole(tmp_path / "file", content)
        assert contents(tmp_path) == {"file": content}


def test_a_file_has_the_mode_of_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_whole(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * 255), b"content")
    assert contents(tmp_path) == {"x" * 255: b"content"}


def test_a_relative_path_is_one_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_whole(Path("file"), b"content")
    assert contents(tmp_path) == {"file": b"content"}


@pytest.mark.parametrize("before", [{}, {"a": b"old a", "b": b"old b"}])
def test_a_full_disk_changes_no_file_and_leaves_none(tmp_path: Path, before: dict[str, bytes]) -> None:
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match="File too large"), small.largest_file(100):
        write_all({tmp_path / "a": b"new", tmp_path / "b": bytes(101)})
    assert contents(tmp_path) == before


def test_a_folder_in_the_place_of_a_file_stays_and_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError):
        write_all({tmp_path / "a": b"new", tmp_path / "b": b"new", tmp_path / "c": b"new"})
    assert contents(tmp_path) == {"a": b"new", "b": None}


def test_a_folder_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_all({tmp_path / "a": b"new", tmp_path / "folder" / "b": b"new"})
    assert contents(tmp_path) == {}


def test_whatever_goes_wrong_nothing_is_left(tmp_path: Path) -> None:
    no_bytes: Any = "text"
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", no_bytes)
    assert contents(tmp_path) == {}


def test_content_is_on_the_disk_before_any_file_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, seen = os.fsync, []

    def watched(file: int) -> None:
        fsync(file)
        hidden = all(path.name.startswith(".") for path in tmp_path.iterdir())
        seen.append((os.fstat(file).st_size, hidden))

    monkeypatch.setattr(os, "fsync", watched)
    write_all({tmp_path / "a": b"12", tmp_path / "b": b"345"})
    assert seen == [(2, True), (3, True)]


def test_who_reads_meanwhile_gets_one_of_the_contents_whole(tmp_path: Path) -> None:
    path, either = tmp_path / "file", {b"a" * 100_000, b"b" * 50_000}
    write_whole(path, b"a" * 100_000)
    writer = threading.Thread(target=lambda: [write_whole(path, content) for content in [*either] * 20])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= either and contents(tmp_path).keys() == {"file"}
