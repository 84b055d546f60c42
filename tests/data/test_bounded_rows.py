"""What is read of a set is bounded: only the columns asked for, and no more memory than allowed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_lightning.data import DemonstrationDataModule
from sdft_lightning.data.json_rows import MAX_ROW_BYTES, Rows, memory_of, messages_from_json
from sdft_lightning.data.sources import HubSource, read_rows
from sdft_lightning.errors import UserError

pytestmark = pytest.mark.attack

MEGABYTE = 2**20
CLIP = {"bytes": b"RIFF", "path": "clip.wav"}


def audio_set(**columns: list[Any]) -> datasets.Dataset:
    """Two rows with a column of sound, which nothing here could decode."""
    rows = {"prompt": ["a", "b"], "demonstration": ["c", "d"], "clip": [CLIP, CLIP], **columns}
    found = datasets.Dataset.from_dict(rows)
    return found.cast_column("clip", datasets.Audio(decode=True))


def test_a_column_of_sound_that_nobody_asked_for_is_not_decoded(tmp_path: Path) -> None:
    audio_set().save_to_disk(str(tmp_path / "saved"))
    found = read_rows(str(tmp_path / "saved"), "data.train", ["prompt", "demonstration"])
    assert found.rows == [
        {"prompt": "a", "demonstration": "c"},
        {"prompt": "b", "demonstration": "d"},
    ]
    assert set(found.columns) == {"prompt", "demonstration", "clip"}


def test_a_hub_set_with_sound_is_read_by_its_other_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: audio_set())
    found = read_rows(HubSource(repo="a/b", split="train"), "data.train", ["prompt"])
    assert found.rows == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "feature",
    [
        datasets.Audio(),
        datasets.Image(),
        datasets.List(datasets.Image()),
        {"inner": datasets.Audio()},
    ],
)
def test_a_mapped_column_that_holds_no_text_is_refused_before_it_is_decoded(
    feature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "clip": feature})
    found = datasets.Dataset.from_dict({"prompt": [], "clip": []}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)
    kind = "Audio" if "Audio" in str(feature) else "Image"
    with pytest.raises(UserError, match=rf"data\.train: the column 'clip' of a/b.* holds {kind}"):
        read_rows(HubSource(repo="a/b", split="train"), "data.train", ["prompt", "clip"])


def test_a_saved_format_of_tensors_gives_plain_values(tmp_path: Path) -> None:
    found = datasets.Dataset.from_dict({"prompt": ["a"], "n": [[1, 2]]}).with_format("numpy")
    found.save_to_disk(str(tmp_path / "saved"))
    assert read_rows(str(tmp_path / "saved"), "data.train").rows == [{"prompt": "a", "n": [1, 2]}]


def test_a_run_trains_on_a_folder_with_sound_that_is_not_mapped(
    tmp_path: Path, model_folder: Path
) -> None:
    audio_set().save_to_disk(str(tmp_path / "saved"))
    data = DemonstrationDataModule(
        model_name=str(model_folder), train=str(tmp_path / "saved"), batch_size=2
    )
    data.prepare_data()
    data.setup("fit")
    assert [row.prompt[-1]["content"] for row in data.training_rows()] == ["a", "b"]


def test_columns_that_are_not_read_are_still_named_where_one_is_missing(
    tmp_path: Path, model_folder: Path
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
    data = DemonstrationDataModule(model_name=str(model_folder), train=str(path), batch_size=1)
    data.prepare_data()
    with pytest.raises(UserError, match=r"no column 'prompt'. Its columns are answer, question"):
        data.setup("fit")


def repeated(path: Path, **options: Any) -> None:
    """1,500 rows of a megabyte each, in a file of some hundred bytes to some kilobytes."""
    pq.write_table(pa.table({"prompt": ["x" * 1_000_000] * 1500}), path, **options)


def nested(path: Path) -> None:
    message = [{"role": "user", "content": "x" * 1_000_000}]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    array = pa.array([message], kind)
    table = pa.table({"prompt": pa.concat_arrays([array] * 100)})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as file:
        for _ in range(9):
            file.write_table(table)


BOMBS: dict[str, Callable[[Path], None]] = {
    "dictionary": lambda path: repeated(
        path, compression="zstd", dictionary_pagesize_limit=2**30, row_group_size=1500
    ),
    "plain": lambda path: repeated(path, compression="zstd", use_dictionary=False),
    "prefixes": lambda path: repeated(
        path,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"prompt": "DELTA_BYTE_ARRAY"},
    ),
    "one_text": lambda path: pq.write_table(
        pa.table({"prompt": ["z" * 400_000_000]}), path, compression="zstd"
    ),
    "empty_lists": lambda path: pq.write_table(
        pa.table({"prompt": pa.array([[]] * 17_000_000, pa.list_(pa.string()))}),
        path,
        compression="zstd",
    ),
    "messages": nested,
}

READ = """
import sys
from pathlib import Path
import pyarrow.parquet
from sdft_lightning.data.sources import read_rows

def peak():  # not `ru_maxrss`, which a process takes over from the one that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

before = peak()
try:
    read_rows(sys.argv[1], "data.train", ["prompt"])
except ValueError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_parquet_file_that_becomes_gigabytes_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    BOMBS[name](path)
    assert path.stat().st_size < MEGABYTE
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    message, grown = done.stdout.splitlines()
    assert re.match(rf"data\.train: {path}: .* more than 256 MB of memory", message)
    assert "--data.max_megabytes" in message
    assert int(grown) < 800


def test_parquet_rows_come_in_order_from_several_row_groups_and_batches(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{i}" if i % 7 else None, "messages": [{"role": "user", "content": str(i)}]}
        for i in range(2500)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1100)
    found = read_rows(str(tmp_path / "rows.parquet"), "data.train")
    assert found.rows == rows
    assert found.places[-1] == "row 2500"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": "%s"}\n', "line 2"),
        ("rows.jsonl", "%s\n", "line 1"),
        ("rows.json", '[{"prompt": "a"}, {"prompt": "%s"}]', "row 2"),
        ("rows.json", '[{"prompt": "%s', "row 1"),
    ],
)
def test_a_json_row_of_many_megabytes_is_refused_by_its_place(
    name: str, text: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text % ("x" * (MAX_ROW_BYTES + 1)))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}, {place}: more than 16 MB in one row"):
        read_rows(str(tmp_path / name), "data.train")
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_ROW_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "row"), [("rows.jsonl", "{}\n"), ("rows.json", "{},"), ("rows.json", "[],")]
)
def test_rows_that_take_more_memory_than_their_file_are_counted_as_what_they_take(
    name: str, row: str, tmp_path: Path
) -> None:
    text = row * 50_000
    (tmp_path / name).write_text(text if name == "rows.jsonl" else f"[{text}{{}}]")
    with pytest.raises(UserError, match=r"more than 1 MB of memory|expected a JSON object"):
        read_rows(str(tmp_path / name), "data.train", max_megabytes=1)


def test_the_limit_is_an_option_of_the_data(
    write_rows: Callable[..., Path], model_folder: Path
) -> None:
    rows = [{"prompt": "x" * 1000, "demonstration": "y"} for _ in range(2000)]
    path = str(write_rows(rows))
    data = DemonstrationDataModule(model_name=str(model_folder), train=path, max_megabytes=1)
    data.prepare_data()
    with pytest.raises(UserError, match=r"data\.train: .*rows up to line \d+ take.* 1 MB"):
        data.setup("fit")
    assert len(read_rows(path, "data.train", max_megabytes=4).rows) == 2000


def test_columns_that_are_not_wanted_take_no_memory(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"prompt": "a", "picture": "x" * 10_000} for _ in range(200)])
    assert len(read_rows(str(path), "data.train", ["prompt"], max_megabytes=1).rows) == 200
    with pytest.raises(UserError, match="more than 1 MB"):
        read_rows(str(path), "data.train", max_megabytes=1)


def test_memory_of_counts_what_is_inside() -> None:
    text = "x" * 5000
    assert 10_000 < memory_of({"a": [text, {"b": text}]}) < 11_000


def test_a_million_brackets_and_quotes_are_read_in_linear_time(tmp_path: Path) -> None:
    inner = json.dumps('[{"a\\' * 200_000)
    (tmp_path / "rows.json").write_text(f'[{{"prompt": {inner}}}, {{"prompt": "b"}}]')
    found = read_rows(str(tmp_path / "rows.json"), "data.train")
    assert [len(row["prompt"]) for row in found.rows] == [1_000_000, 1]
    (tmp_path / "rows.json").write_text(f"[{inner[:-1]}")  # the text is never closed
    with pytest.raises(UserError, match="never closed"):
        read_rows(str(tmp_path / "rows.json"), "data.train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}] {"b": 2}', "something stands behind"),
        ('[{"a": 1}', "never closed"),
        ('[{"a": 1} {"b": 2}]', "malformed JSON"),
        ('[{"a": 1}, , {"b": 2}]', "malformed JSON"),
        ('[{"a": 1}]]', "something stands behind"),
        ('[{"a": [}]', "malformed JSON"),
    ],
)
def test_a_malformed_array_is_never_read_in_part(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_rows(str(tmp_path / "rows.json"), "data.train")


@pytest.mark.parametrize("count", [33, 100_000])
def test_more_loader_processes_than_could_help_are_refused(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(UserError, match=rf"data\.num_workers: got {count}, allowed are at most 32"):
        DemonstrationDataModule(num_workers=count)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert DemonstrationDataModule(num_workers=33).num_workers == 33


def test_a_long_text_that_looks_like_a_list_is_not_parsed_as_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(text: str) -> None:
        raise AssertionError("its syntax tree would take gigabytes")

    monkeypatch.setattr("ast.literal_eval", refuse)
    text = "[" + "'role', " * 200_000 + "]"
    (row,) = messages_from_json(Rows("f", [{"prompt": text}], ["row 1"]), ["prompt"]).rows
    assert row["prompt"] == text
