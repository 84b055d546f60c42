"""What `make` starts keeps compiled modules, also where the environment forbids it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = 'show: ; @$(PYTHON_BIN) -c "import sys; print(sys.dont_write_bytecode)"'


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lets_python_keep_compiled_modules() -> None:
    done = subprocess.run(
        ["make", "--silent", f"--eval={SHOW}", "show", f"PYTHON_BIN={sys.executable}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"]
