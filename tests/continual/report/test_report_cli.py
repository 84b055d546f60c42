"""`sdft report ...`: dispatch, help and errors of users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.cli import main


def test_report_is_written_beside_the_results(
    by_hand: list[dict[str, Any]], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(by_hand)
    main(["report", str(path)])
    assert (tmp_path / "report" / "index.html").is_file()
    main(["report", str(path), f"--output_dir={tmp_path / 'deep' / 'other'}"])
    assert (tmp_path / "deep" / "other" / "index.html").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "is empty"),
        ('{"format": 1,\n{}\n', "line 1: malformed JSON"),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path), f"--output_dir={tmp_path / 'out'}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_the_command_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: sdft report [-h]")
    assert "--output_dir" in printed
    assert "RESULTS" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "\n    report " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
