"""200,000 rows of 300 bytes are read and tokenized within a gigabyte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = "the ferry leaves harbour at seven and returns before tide turns while gulls follow".split()

START = """
import sys, time
from pathlib import Path
from sdft_lightning.data import DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle

begun = time.monotonic()
data = DemonstrationDataModule(
    model_name="embedded", train=sys.argv[1], prompts=PromptStyle("turns")
)
data.prepare_data()
data.setup("fit")
# Not `ru_maxrss`, which a process takes over from the one that started it.
status = Path("/proc/self/status").read_text(encoding="ascii")
peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
print(len(data.training_rows()), peak, round(time.monotonic() - begun))
"""


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_two_hundred_thousand_rows_start_in_a_gigabyte(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(200_000):
            question = " ".join(draw.choices(WORDS, k=38))
            answer = " ".join(draw.choices(WORDS, k=9))
            file.write(f'{{"prompt": "{number}: {question}?", "demonstration": "{answer}"}}\n')
    done = subprocess.run(
        [sys.executable, "-c", START, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    rows, megabytes, _ = map(int, done.stdout.split())  # seconds depend on what else runs here
    assert rows == 200_000
    assert megabytes < 1024
