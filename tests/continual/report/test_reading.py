"""Results files that are absent, empty, torn, malformed or of another version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report.records import read_records
from sdft_lightning.errors import UserError

Raw = dict[str, Any]
Write = Callable[..., Path]


def test_every_field_is_read(records: list[Raw], write: Write) -> None:
    raw = records[1]
    read, problems = read_records([write(records)])
    assert (len(read), problems) == (len(records), [])
    record = read[1]
    assert record.source.endswith("results.jsonl, line 2")
    assert (record.method, record.seed, record.stage, record.updates) == ("sdft", 42, 1, 48)
    assert (record.tokens, record.selected_step, record.run) == (12345, 48, raw["run"])
    assert record.seconds == {"fit": 61.5, "evaluate": 20.25}
    task = record.tasks["front_desk"]
    assert (task.metric, task.value, task.n) == (
        "accuracy",
        raw["tasks"]["front_desk"]["accuracy"],
        40,
    )
    assert task.items == raw["tasks"]["front_desk"]["items"]
    hella = record.capabilities["hellaswag"]
    assert (hella.metric, hella.items) == ("acc", {})  # the first metric, not acc_norm
    assert (hella.low, hella.high) == pytest.approx((hella.value - 0.0392, hella.value + 0.0392))
    assert record.curve[1]["step"] == 16
    assert read[0].seed is None


def test_a_last_line_that_is_cut_short_is_named_and_left_out(
    records: list[Raw], write: Write
) -> None:
    path = write(records)
    whole = path.read_bytes()
    for cut in (whole + b'{"format": 1, "sta', whole[:-30], whole + '{"x": "ä'.encode()[:-1]):
        path.write_bytes(cut)
        read, problems = read_records([path])
        assert len(read) == cut.count(b"\n")
        assert [problem.kind for problem in problems] == ["torn line"]
        assert f"line {len(read) + 1}:" in problems[0].text


def test_a_last_line_without_its_line_end_is_whole(records: list[Raw], write: Write) -> None:
    path = write(records)
    path.write_bytes(path.read_bytes()[:-1])
    read, problems = read_records([path])
    assert (len(read), problems) == (len(records), [])


def test_malformed_json_before_the_end_names_file_and_line(
    records: list[Raw], write: Write
) -> None:
    path = write(records)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], '{"format": 1, "sta\n', *lines[3:]]))
    with pytest.raises(UserError, match=r"results\.jsonl, line 4: malformed JSON"):
        read_records([path])
    path.write_text("".join([*lines, '{"format": 1, "sta\n']))  # ended, so it was not cut
    with pytest.raises(UserError, match=rf"line {len(lines) + 1}: malformed JSON"):
        read_records([path])


def test_names_may_hold_characters_that_look_like_line_ends(
    records: list[Raw], write: Write
) -> None:
    for record in records[1:]:
        record["method"] = "a\u2028b\x85c"
    read, problems = read_records([write(records)])
    assert (len(read), problems) == (len(records), [])
    assert read[1].method == "a b c"


def test_nan_is_refused(records: list[Raw], write: Write) -> None:
    records[1]["drift"]["general"] = float("nan")
    with pytest.raises(UserError, match=r"line 2: malformed JSON \(NaN is no JSON number"):
        read_records([write(records)])


def test_unknown_formats_are_left_out_and_named(records: list[Raw], write: Write) -> None:
    records[2]["format"] = records[5]["format"] = 2
    del records[3]["format"]
    read, problems = read_records([write(records)])
    assert len(read) == len(records) - 3
    assert [problem.kind for problem in problems] == ["unknown format"] * 2
    assert "2 records (lines 3, 6) have format 2" in problems[0].text
    assert "1 records (lines 4) have format None" in problems[1].text


def test_nothing_but_unknown_formats_is_an_error(records: list[Raw], write: Write) -> None:
    path = write([{**record, "format": 9} for record in records])
    with pytest.raises(UserError, match=r"no record to report.*format 9; this version reads 1"):
        read_records([path])


def test_a_file_given_twice_is_read_once(records: list[Raw], write: Write) -> None:
    path = write(records)
    read, _ = read_records([path, path.parent / "." / path.name])
    assert len(read) == len(records)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"results\.jsonl is empty"):
        read_records([path])


def test_absent_file_folder_and_other_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*absent\.jsonl"):
        read_records([tmp_path / "absent.jsonl"])
    with pytest.raises(UserError, match=r"is a folder\. Name a results\.jsonl file"):
        read_records([tmp_path])
    path = tmp_path / "results.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"is a folder\. Name .*results\.jsonl\."):
        read_records([tmp_path])
    with pytest.raises(UserError, match="line 1: a record is a JSON object; got list"):
        read_records([path])


BAD: dict[str, tuple[Raw, str]] = {
    "status": ({"status": "done"}, "status must be finished or failed; got 'done'"),
    "stage_too_high": ({"stage": 4}, r"stage must be 0 \(the base\) to 3"),
    "stage_name": ({"stage_name": "garden"}, "stage_name must be 'front_desk'"),
    "stages": ({"stages": []}, "stages must be a list of different names"),
    "stages_twice": ({"stages": ["front_desk"] * 3}, "stages must be a list of different names"),
    "seed_text": ({"seed": "42"}, "seed must be a whole number"),
    "seed_true": ({"seed": True}, "seed must be a whole number"),
    "no_seed": ({"seed": None}, "seed must be a whole number, or null for the base"),
    "base_after_training": ({"method": "base"}, "method must be base at stage 0"),
    "empty_method": ({"method": " "}, "method must be a text"),
    "no_plan": ({"plan": None}, "plan must be a text"),
    "tasks": ({"tasks": [1]}, "tasks must be an object"),
    "task": ({"tasks": {"a": 1}}, "tasks must be an object of objects"),
    "accuracy": ({"tasks": {"a": {"accuracy": 64}}}, "tasks.a: accuracy must be between 0 and 1"),
    "no_metric": ({"tasks": {"a": {"n": 64}}}, "tasks.a: it has no metric"),
    "interval": (
        {"tasks": {"a": {"accuracy": 0.5, "low": 0.6, "high": 0.7}}},
        "low must be at most accuracy",
    ),
    "items": (
        {"tasks": {"a": {"accuracy": 0.5, "items": {"x": 2}}}},
        "items must be an object of scores between 0 and 1",
    ),
    "drift": ({"drift": {"general": "far"}}, "drift must be an object of finite numbers"),
    "curve": ({"curve": [{"x": 1}]}, "curve must be a list of objects, each with its step"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_fields_name_file_line_and_field(
    name: str, records: list[Raw], write: Write
) -> None:
    change, message = BAD[name]
    path = write([records[0], {**records[1], **change}])
    with pytest.raises(UserError, match=message) as caught:
        read_records([path])
    assert "results.jsonl, line 2" in str(caught.value)


def test_a_failed_record_needs_no_figures(records: list[Raw], write: Write) -> None:
    failed = {
        key: value
        for key, value in records[1].items()
        if key not in ("tasks", "capabilities", "drift", "curve", "seconds", "updates", "tokens")
    }
    failed |= {"status": "failed", "error": "line one\nline two", "selected_step": None}
    read, _ = read_records([write([records[0], failed])])
    assert (read[1].finished, read[1].error) == (False, "line one line two")
    assert json.dumps(dict(read[1].tasks)) == "{}"
