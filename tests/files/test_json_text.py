"""What is written is JSON, whatever was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sdft_lightning.files.run_folder import append_lines
from sdft_lightning.files.texts import json_text
from sdft_lightning.files.whole_files import append_record


def test_what_is_no_number_is_null_at_every_depth() -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, "é", None, True)}], "d": 2}
    assert (
        json_text(value) == '{"a": null, "b": [1.5, null, {"c": [null, "é", null, true]}], "d": 2}'
    )
    assert json.loads(json_text(value, indent=2))["b"][0] == 1.5


def test_logs_and_records_of_a_run_that_diverged_can_be_read(tmp_path: Path) -> None:
    lines, records = tmp_path / "metrics.jsonl", tmp_path / "results.jsonl"
    append_lines(lines, [{"test/drift/general": math.nan}])
    append_record(records, {"drift": {"general": math.nan}})
    for path in (lines, records):
        text = path.read_text(encoding="utf-8")
        assert "NaN" not in text
        json.loads(text)
