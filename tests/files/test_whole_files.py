"""Files appear whole or not at all: a full disk, a kill, a half-written line."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.files.checkpoint_io import WholeCheckpointIO
from sdft_lightning.files.run_folder import append_lines
from sdft_lightning.files.whole_files import whole_file, whole_folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a quota does: writing beyond `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_that_does_not_fit_is_an_error_and_the_older_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1, "w": torch.zeros(10)}, path)
    before = path.read_bytes()
    with (
        files_of_at_most(100_000),
        pytest.raises(UserError, match=r"last\.ckpt could not be written: .*ulimit") as found,
    ):
        WholeCheckpointIO().save_checkpoint({"step": 2, "w": torch.zeros(100_000)}, path)
    for words in ("What was there before is untouched", "--run.root", "--ckpt_path=last"):
        assert words in str(found.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "you may not write there"),
    ],
)
def test_what_the_system_refuses_is_told_in_words(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=words):
        WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=words), whole_folder(tmp_path / "final") as folder:
        (folder / "model.safetensors").write_bytes(b"half")
    assert names(tmp_path) == []


def test_file_in_the_place_of_the_folder_is_told_and_not_taken_for_a_full_disk(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FileExistsError):
        WholeCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")


def test_no_reader_ever_sees_half_a_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with whole_file(tmp_path / "a") as file:
        file.write(b"ne")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"old"
        file.write(b"w")
    assert (tmp_path / "a").read_bytes() == b"new"
    with whole_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "b" / "x").read_text() == "x"
    assert names(tmp_path) == ["a", "b"]


def test_error_of_the_writer_itself_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "b"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_a_killed_process_left_unfinished_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".step-6.ckpt.123.part").write_bytes(b"half")
    (tmp_path / ".step-7.ckpt.123.part").write_bytes(b"of another file")
    (tmp_path / ".final.99.part").mkdir()
    WholeCheckpointIO().save_checkpoint({"step": 6}, tmp_path / "step-6.ckpt")
    with whole_folder(tmp_path / "final"):
        pass
    assert names(tmp_path) == [".step-7.ckpt.123.part", "final", "step-6.ckpt"]


def test_half_a_line_of_a_killed_process_goes_before_the_next_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    append_lines(path, [{"step": 1}, {"step": 2}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "train/lo')
    append_lines(path, [{"step": 3, "text": "ä\u2028"}])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "text": "ä\u2028"},
    ]
    path.write_text('{"step": 3, "tr')
    append_lines(path, [{"step": 4}])
    assert path.read_text() == '{"step": 4}\n'


def test_line_that_does_not_fit_is_an_error_and_half_of_it_goes_before_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"step": 1}])
    with (
        files_of_at_most(20),
        pytest.raises(UserError, match=r"metrics\.jsonl could not be written: .*ulimit"),
    ):
        append_lines(path, [{"step": 2, "loss": "0" * 50}])
    append_lines(path, [{"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_export_appears_whole(
    fit_module: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.callbacks.export import export_model

    module = fit_module()
    seen: list[list[str]] = []
    save = module.student.save_pretrained

    def watched(folder: Path, **options: Any) -> None:
        seen.append(names(tmp_path / "exported"))
        save(folder, **options)

    monkeypatch.setattr(module.student, "save_pretrained", watched, raising=False)
    export_model(module, tmp_path / "exported" / "final")
    assert seen == [[f".final.{os.getpid()}.part"]]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        names(tmp_path / "exported" / "final")
    )
