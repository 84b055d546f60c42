"""Large tensors lie in large pages, unless the user says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = "THP_MEM_ALLOC_ENABLE"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# 256 MB are written, and what of this process lies in large pages is printed, in kB.
PROGRAM = """
import re
import sdft_lightning, sdft_lightning.rollout
import torch
weights = torch.ones(64, 1 << 20)
text = open("/proc/self/smaps_rollup").read()
print(re.search(r"AnonHugePages: +([0-9]+) kB", text).group(1))
"""


def large_pages(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name != SETTING}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(
    not KERNEL.exists() or "[madvise]" not in KERNEL.read_text(),
    reason="this system gives large pages always or never",
)
def test_weights_lie_in_large_pages_unless_turned_off() -> None:
    assert large_pages() > 200_000
    assert large_pages(**{SETTING: "0"}) < 100_000
