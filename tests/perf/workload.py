"""What all steps are timed on: rows of given lengths, made from the example's own texts."""

from __future__ import annotations

import json
import resource
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sdft_lightning.data.sources import read_rows
from sdft_lightning.models.tokenization import load_tokenizer, resolve_model

# One turn: the question, then the demonstration. TRL's default template, and ours for these runs.
TEACHER_TEMPLATE = "{prompt}\n\n{privileged_context}"


@dataclass(frozen=True)
class Workload:
    """One training setting.

    Args:
        model: Model name or folder.
        micro_batch: Prompts of a micro-batch.
        accumulate: Micro-batches of an optimizer step.
        prompt_tokens: Tokens of a student prompt, chat template included.
        demonstration_tokens: Tokens of a demonstration, stop token included.
        new_tokens: Longest completion.
        forced: Every completion is as long as that; otherwise they end where the model ends them.
        completions: Completions of a prompt.
        precision: float32, or bfloat16 autocast (`bf16`).
        steps: Optimizer steps, of which the first is not counted.
        checkpointing: Recompute activations in the backward pass.
        frozen_teacher: A frozen teacher instead of the moving average.
        device: `cpu` or `cuda`.
    """

    model: str = "embedded"
    micro_batch: int = 16
    accumulate: int = 1
    prompt_tokens: int = 93
    demonstration_tokens: int = 48
    new_tokens: int = 48
    forced: bool = True
    completions: int = 1
    precision: str = "float32"
    steps: int = 4
    checkpointing: bool = False
    frozen_teacher: bool = False
    device: str = "cpu"

    @staticmethod
    def load(text: str) -> Workload:
        """From the JSON of `dump`."""
        return Workload(**json.loads(text))

    def dump(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))


def make_rows(workload: Workload, count: int) -> list[dict[str, str]]:
    """Rows whose prompts and demonstrations have the lengths that the workload names.

    Args:
        workload: The lengths.
        count: How many rows.
    """
    tokenizer = load_tokenizer(workload.model, None)
    examples = read_rows("example:front_desk/train.jsonl", "train").rows
    text = " ".join(f"{row['context']} {row['prompt']}" for row in examples)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    frame = len(_rendered(tokenizer, ""))
    rows = []
    for index in range(count):
        start = 37 * index
        prompt = _text_of(tokenizer, ids, start, workload.prompt_tokens - frame)
        # The stop token is the last one.
        demonstration = _text_of(tokenizer, ids, start + 911, workload.demonstration_tokens - 1)
        rows.append({"prompt": prompt, "demonstration": demonstration})
    return rows


def _rendered(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )


def _text_of(tokenizer: Any, ids: list[int], start: int, length: int) -> str:
    """A piece of the text that has so many tokens also when it is tokenized again."""
    for offset in range(len(ids)):
        begin = (start + offset) % (len(ids) - length)
        piece = str(tokenizer.decode(ids[begin : begin + length])).strip()
        if len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == length:
            return piece
    raise ValueError(f"no piece of {length} tokens")


def write_rows(rows: list[dict[str, str]]) -> Path:
    """The rows as a JSON Lines file of their own."""
    path = Path(tempfile.mkdtemp(prefix="sdft-perf-")) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_model(**changes: int) -> Path:
    """A folder with a model of SmolLM2-360M's sizes, random weights and the embedded tokenizer.

    Args:
        changes: Other sizes of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, folder = resolve_model("embedded"), Path(tempfile.mkdtemp(prefix="sdft-perf-model-"))
    config = AutoConfig.from_pretrained(source)
    sizes = {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        **changes,
    }
    config.update(sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer("embedded", None).save_pretrained(folder)
    return folder


def resident_gigabytes() -> float:
    """Memory that this process holds, in GB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e9


def peak_gigabytes() -> float:
    """The most memory that this process has held, in GB; of a GPU, that its tensors have."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    # Not `ru_maxrss`, which a process takes over from the one that started it.
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def report(step_ends: list[float], phases: dict[str, list[float]], **more: Any) -> None:
    """Print the result line of a worker.

    Args:
        step_ends: Time at the end of each optimizer step; the first step is not counted.
        phases: Seconds of each phase in each step.
        more: Further figures.
    """
    steps = [end - begin for begin, end in pairwise(step_ends)]
    figures = {
        "step": steps,
        "phases": {name: values[1:] for name, values in phases.items()},
        "peak_gigabytes": peak_gigabytes(),
        "threads": torch.get_num_threads(),
        **more,
    }
    print("RESULT " + json.dumps(figures), flush=True)
