"""Reading rows: every form of file, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.sources import HubSource, read_rows
from sdft_lightning.errors import UserError

ROWS = [{"prompt": "Q?", "n": [1, 2]}, {"prompt": "Ä\u2028B", "n": []}]


def text_file(folder: Path, text: str | bytes, name: str = "rows.jsonl") -> str:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(data)
    return str(folder / name)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    path = str(folder / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_folder(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def write_splits(folder: Path) -> str:
    import datasets

    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return str(folder / "splits") + ":train"


FORMS: dict[str, tuple[Callable[[Path], str], str]] = {
    "jsonl": (lambda folder: text_file(folder, lines(ROWS)), "line"),
    "jsonl_without_last_newline": (lambda folder: text_file(folder, lines(ROWS).rstrip()), "line"),
    "jsonl_with_byte_order_mark": (lambda f: text_file(f, "\ufeff" + lines(ROWS)), "line"),
    "jsonl_with_windows_line_ends": (
        lambda folder: text_file(folder, lines(ROWS).replace("\n", "\r\n")),
        "line",
    ),
    "json_suffix_with_lines": (lambda f: text_file(f, lines(ROWS), "rows.json"), "line"),
    "json_array": (lambda f: text_file(f, json.dumps(ROWS, indent=1), "rows.json"), "row"),
    "parquet": (write_parquet, "row"),
    "save_to_disk": (write_folder, "row"),
    "save_to_disk_with_splits": (write_splits, "row"),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_rows_in_order_and_say_where_each_stands(
    form: str, tmp_path: Path
) -> None:
    make, word = FORMS[form]
    found = read_rows(make(tmp_path), "data.train")
    assert found.rows == ROWS
    assert found.places == [f"{word} 1", f"{word} 2"]


def test_line_separator_inside_a_string_does_not_cut_the_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\u2029c\x85d"}, {"prompt": "e"}]
    assert read_rows(text_file(tmp_path, lines(rows)), "data.train").rows == rows


def test_blank_lines_are_left_out_and_still_counted_in_messages(tmp_path: Path) -> None:
    source = text_file(tmp_path, '\n{"prompt": "a"}\n\n  \n{"prompt": "b"}\n\n')
    found = read_rows(source, "data.train")
    assert [row["prompt"] for row in found.rows] == ["a", "b"]
    assert found.places == ["line 2", "line 5"]


def test_split_is_named_behind_a_colon(tmp_path: Path) -> None:
    source = write_splits(tmp_path).removesuffix("train")
    assert len(read_rows(source + "test", "data.train").rows) == 1


def test_example_that_the_package_ships_is_found_by_its_prefix() -> None:
    found = read_rows("example:front_desk/train.jsonl", "data.train")
    assert len(found.rows) >= 200
    assert {"prompt", "demonstration"} <= set(found.rows[0])


ERRORS: dict[str, tuple[str | bytes | None, str, list[str]]] = {
    "missing_file": (None, "absent.jsonl", ["data.train", "absent.jsonl", "{repo: owner/name"]),
    "malformed_json": (
        '{"prompt": "a"}\n\n{"prompt": "b",}\n',
        "rows.jsonl",
        ["rows.jsonl, line 3", "malformed JSON", "column", "one JSON object"],
    ),
    "malformed_array": ('[{"prompt": "a"},]', "rows.json", ["rows.json", "malformed JSON"]),
    "cut_off_line": ('{"prompt": "a"}\n{"pro', "rows.jsonl", ["line 2", "malformed JSON"]),
    "bare_text": ('"Q?"\n', "rows.jsonl", ["rows.jsonl, line 1", "JSON object", "got str"]),
    "list_line": ('{"a": 1}\n[1]\n', "rows.jsonl", ["rows.jsonl, line 2", "got list"]),
    "array_of_texts": ('["a", "b"]', "rows.json", ["rows.json, row 1", "got str"]),
    "empty_file": ("", "rows.jsonl", ["data.train", "rows.jsonl has no rows", "at least one"]),
    "blank_file": ("\n \n", "rows.jsonl", ["rows.jsonl has no rows"]),
    "empty_array": ("[]", "rows.json", ["rows.json has no rows"]),
    "wrong_suffix": ("a,b\n", "rows.csv", ["data.train", ".csv", ".jsonl, .json, .parquet"]),
    "no_suffix": ("a", "rows", ["ends in nothing", ".jsonl"]),
    "not_utf8": ('{"prompt": "Ä"}'.encode("latin-1"), "rows.jsonl", ["rows.jsonl", "UTF-8"]),
    "utf16": ('{"prompt": "a"}\n'.encode("utf-16"), "rows.jsonl", ["rows.jsonl", "UTF-8"]),
    "not_parquet": ("PAR?", "rows.parquet", ["data.train", "rows.parquet", "Parquet"]),
    "deep_brackets": ("[" * 100_000, "rows.jsonl", ["rows.jsonl", "malformed JSON"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_file_is_named_with_its_fault(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, file, words = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        text_file(tmp_path, content, file)
    with pytest.raises(UserError) as error:
        read_rows(file, "data.train")
    for word in words:
        assert word in str(error.value)


def test_folder_that_save_to_disk_did_not_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data\.test: the folder .*data.* save_to_disk"):
        read_rows(str(tmp_path / "data"), "data.test")


@pytest.mark.parametrize("split", ["", ":dev"])
def test_unknown_or_missing_split_is_refused_with_those_there_are(
    split: str, tmp_path: Path
) -> None:
    source = write_splits(tmp_path).removesuffix(":train")
    with pytest.raises(UserError, match=r"splits train, test.*colon: .*splits:train"):
        read_rows(source + split, "data.train")


def test_unknown_example_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"ships no 'example:shop\.jsonl'.*front_desk/train\.jsonl"):
        read_rows("example:shop.jsonl", "data.train")


def test_hub_failure_names_the_data_set_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as error:
        read_rows(HubSource(repo="owner/name", split="train", config="small"), "data.train")
    for word in ("data.train", "owner/name", "small", "train", "no network", "path of the file"):
        assert word in str(error.value)


def test_hub_rows_are_read_with_split_config_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_rows(
        HubSource(repo="owner/name", split="dev", config="small", revision="abc"), "data.train"
    )
    assert asked == [(("owner/name", "small"), {"split": "dev", "revision": "abc"})]
    assert found.rows == ROWS
    assert found.name == "owner/name, split dev"
    assert read_rows("hub:owner/name:train[:10%]", "data.train").rows == ROWS
    assert asked[1] == (("owner/name", None), {"split": "train[:10%]", "revision": None})


@pytest.mark.parametrize("source", ["hub:owner/name", "hub:o/name:", "hub:a/b/c:train", "hub::x"])
def test_a_hub_name_without_a_split_or_owner_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"data\.train: got hub:.* is hub:owner/name:split, e\.g\."):
        read_rows(source, "data.train")
