"""What the parts of gpu_check.py share: reports, random models, seconds and peaks."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
_DIGITS = 5  # of a figure


class SkippedError(Exception):
    """A part cannot run here; the message says why."""


class WrongError(Exception):
    """What a part found is not what it must be."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how large it is.

    Args:
        device: `cuda` or `cpu`.
        small: Tiny shapes, so that a CPU has done with it in seconds.
        report: Called with each figure as it is found.
    """

    device: str
    small: bool
    report: Callable[[dict[str, Any]], None]

    def figure(self, what: str, **values: Any) -> None:
        """Report what was measured.

        Args:
            what: In words.
            values: Numbers and texts by name.
        """
        self.report({"what": what, **{name: _short(value) for name, value in values.items()}})

    def pick(self, full: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.small else full


def _short(value: Any) -> Any:
    """A number with as many digits as a figure needs; None for one that JSON does not know."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


# --- models ---------------------------------------------------------------------------------------

_SIZES: dict[str, dict[str, Any]] = {  # those that were published for Qwen2.5
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    },
}


def config_of(name: str) -> Any:
    """The config of a Qwen2 with published sizes, whose answers end with the tokenizer's token.

    Args:
        name: 0.5B, 7B or tiny.
    """
    from transformers import Qwen2Config

    stop = tokenizer().eos_token_id
    return Qwen2Config(
        max_position_embeddings=32768,
        eos_token_id=stop,
        pad_token_id=stop,
        bos_token_id=None,
        architectures=["Qwen2ForCausalLM"],
        **_SIZES[name],
    )


def tests_conftest() -> Any:
    """tests/conftest.py, whose tokenizer of single bytes serves here, too."""
    name = "sdft_tests_conftest"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tokenizer() -> Any:
    """256 bytes and the special tokens; a byte is a token."""
    return tests_conftest().build_tokenizer()


def random_model(config: Any, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """A causal language model with weights drawn on the device, always the same there."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def write_model(folder: Path, config: Any, weights: bool = True) -> Path:
    """Write a model's folder.

    Args:
        folder: Made if absent.
        config: Of the model.
        weights: Draw weights on the CPU and write them, too.
    """
    if weights:
        random_model(config, torch.float32, "cpu").save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def drawn_weights(config: Any, device: str) -> Iterator[None]:
    """Let transformers draw weights on the device where it would read them from a folder."""
    from transformers import AutoModelForCausalLM

    def drawn(*args: Any, dtype: torch.dtype, **options: Any) -> Any:
        known = ("attn_implementation",)
        kept = {name: options[name] for name in known if name in options}
        model = random_model(config, dtype, device, **kept)
        return model, {"mismatched_keys": [], "missing_keys": []}

    with patch.object(AutoModelForCausalLM, "from_pretrained", drawn):
        yield


def write_rows(path: Path, count: int, prompt: int, demonstration: int) -> Path:
    """Write rows of a prompt and a demonstration, of about so many tokens each."""
    rows = []
    for place in range(count):
        rows.append(
            {
                "id": f"row-{place}",
                "prompt": f"Question {place}: " + "why so " * (prompt // 7),
                "demonstration": f"Answer {place}: " + "as it is " * (demonstration // 9),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- seconds and memory ---------------------------------------------------------------------------


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The least seconds of several calls, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = now(device)
        call()
        found.append(now(device) - start)
    return min(found)


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def forget_peak(device: str) -> None:
    """Count the peak of memory from here; of a CPU only Linux can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # then it is that of the whole process, which is no less
        pass


def held_bytes(device: str) -> int:
    """What is held now: of a GPU by tensors, of a CPU by the process."""
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most that was held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def random_tokens(rows: int, length: int, most: int, device: str) -> Tensor:
    """`(rows, length)` token ids below `most`, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(8, most, (rows, length), generator=generator).to(device)
