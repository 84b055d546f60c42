"""A tiny random model with a tokenizer and chat template, and small data, built on the spot."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - now: its log handler keeps the stderr of its import
import pytest
import torch

# Two cores and small tensors: threads of a pool only get in each other's way.
torch.set_num_threads(1)

# Files that take longest begin first, so that no worker is left alone with one at the end.
SLOW_FILES = (
    "continual/test_kill.py",
    "callbacks/test_collapse_guard.py",
    "notebooks/test_continual.py",
    "cli/test_faults.py",
    "test_soak.py",
    "notebooks/test_read_a_run.py",
    "notebooks/test_quickstart.py",
    "continual/test_lora_chain.py",
    "continual/test_whole.py",
    "cli/test_wrong_commands.py",
    "cli/test_cli_bad_input.py",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; the order within a file stays."""
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(SLOW_FILES)}
    missing = [str(path) for path in places if not path.is_file()]
    if missing:
        raise pytest.UsageError(f"SLOW_FILES of tests/conftest.py names no file: {missing}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


def build_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level tokenizer of 256 bytes and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **changes,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer; its padding token is its end-of-sequence token."""
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """A fresh tiny model."""
    return build_model(tokenizer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model as a `save_pretrained` folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def example_rows(count: int = 12) -> list[dict[str, Any]]:
    """Short rows with all columns."""
    return [
        {
            "id": f"row-{i}",
            "prompt": f"Q{i}?",
            "demonstration": f"It is {i}.",
            "context": f"Text {i}.",
            "reference": [str(i)],
        }
        for i in range(count)
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines and return the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def train_file(write_rows: Callable[..., Path]) -> Path:
    """Twelve training rows."""
    return write_rows(example_rows(), "train.jsonl")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SDFT_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SDFT_SHARED_DATA to its folder")
    return folder


@pytest.fixture
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """Build a tiny model, with changes to its config (`seed=` for other weights)."""

    def make(**changes: Any) -> Any:
        return build_model(tokenizer, **changes)

    return make


@pytest.fixture
def make_adapted(tokenizer: Any) -> Callable[..., Any]:
    """Build a tiny model with adapters that have moved from their start (unless `moved=False`)."""
    from sdft_lightning.models.lora import LoRA, add_adapter_

    def make(lora: LoRA | None = None, moved: bool = True, **changes: Any) -> Any:
        model = build_model(tokenizer, **changes)
        add_adapter_(model, lora or LoRA(r=4), seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if moved and "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """Build a tiny tokenizer with another chat template, or with none."""
    return build_tokenizer


@pytest.fixture
def pad_left() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Pad rows of token ids on the left; ids `(B, P)` and mask `(B, P)`."""

    def pad(rows: list[list[int]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = [[pad_id] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    return pad


@pytest.fixture(scope="session")
def make_rows() -> Callable[[int], list[dict[str, Any]]]:
    """The function that makes short rows."""
    return example_rows


@pytest.fixture
def make_model_folder(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Save a tiny model with other config values."""

    def make(name: str = "other", **changes: Any) -> Path:
        folder = tmp_path / name
        build_model(tokenizer, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def fit_args(model_folder: Path, train_file: Path) -> list[str]:
    """A fit of two steps on the tiny model; later options win over these."""
    options = {
        "model": "SDFTModule",
        "model.policy.name": model_folder,
        "model.sampling.max_new_tokens": 8,
        "model.evaluation.max_new_tokens": 8,
        "model.policy.sampling_dtype": "same",  # exact comparisons, also where there is bfloat16
        "data.train": train_file,
        "data.prompts.style": "turns",
        "data.batch_size": 2,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": "false",
        "run.name": "a",
    }
    return ["fit", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run the command line in this process and in `tmp_path`; put the logs back."""
    from sdft_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sdft"])
    ours = logging.getLogger("sdft_lightning")
    found = ours.handlers[:], ours.level, ours.propagate
    with warnings.catch_warnings():
        yield lambda *args: main([str(arg) for arg in args])
    ours.handlers[:], ours.level, ours.propagate = found


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 also where oneDNN does not multiply it: slowly, by torch itself."""
    import torch

    from sdft_lightning.forward.fused.structure import LaidOut, joined
    from sdft_lightning.models import precision

    if precision.multiplies_bfloat16():
        return

    def of(parts: list[Any], rows: int) -> LaidOut:
        return LaidOut(*joined(parts, parts[0].weight.dtype))

    def call(self: LaidOut, inputs: Any) -> Any:
        return torch.nn.functional.linear(inputs, self.weight, self.bias)

    monkeypatch.setattr(LaidOut, "of", staticmethod(of))
    monkeypatch.setattr(LaidOut, "__call__", call)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def no_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not multiply bfloat16, whichever this is."""
    from sdft_lightning.models import precision

    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)


@pytest.fixture(params=["bfloat16_products", "no_bfloat16_products"])
def either_processor(request: pytest.FixtureRequest) -> bool:
    """A processor that multiplies bfloat16, and one that does not; whether it does."""
    request.getfixturevalue(request.param)
    return str(request.param) == "bfloat16_products"


@pytest.fixture
def module_options(model_folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes arguments of a module on the tiny model; policy, evaluation, original may be dicts."""
    from sdft_lightning.forward.policy import Policy
    from sdft_lightning.modules.evaluation import Evaluation

    defaults: dict[str, dict[str, Any]] = {
        # same: exact comparisons, also where there is bfloat16
        "policy": {"name": str(model_folder), "sampling_dtype": "same"},
        "evaluation": {"max_new_tokens": 8},
    }
    kinds: dict[str, Any] = {"policy": Policy, "evaluation": Evaluation, "original": Policy}

    def make(given: dict[str, Any]) -> dict[str, Any]:
        options = {**defaults, **given}
        for name in kinds.keys() & options.keys():
            if isinstance(options[name], dict):
                options[name] = kinds[name](**{**defaults.get(name, {}), **options[name]})
        return options

    return make


@pytest.fixture
def fit_module(
    module_options: Callable[[dict[str, Any]], dict[str, Any]], train_file: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Fit a module on the twelve rows for one step, without the command line; returns it."""
    import lightning as L

    from sdft_lightning.data import Columns, DemonstrationDataModule
    from sdft_lightning.data.prompts import PromptStyle
    from sdft_lightning.modules import SDFTModule
    from sdft_lightning.rollout import Sampling

    def fit(
        method: Any = SDFTModule,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        callbacks: Any = (),
        **trainer: Any,
    ) -> Any:
        sampling = (
            {"sampling": Sampling(max_new_tokens=8)} if issubclass(method, SDFTModule) else {}
        )
        module = method(**module_options({**sampling, **(model or {})}))
        defaults: dict[str, Any] = {
            "train": str(train_file),
            "prompts": PromptStyle("turns"),
            "batch_size": 2,
            "columns": Columns(reference="reference", id="id"),
        }
        rows = DemonstrationDataModule(**{**defaults, **(data or {})})
        options: dict[str, Any] = {
            "max_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        L.Trainer(**{**options, **trainer}, callbacks=list(callbacks)).fit(module, rows)
        return module

    return fit


@pytest.fixture
def hostile() -> Iterator[Any]:
    """A server that sends whatever a test wants (tests/hostile_server.py)."""
    path = Path(__file__).with_name("hostile_server.py")
    spec = importlib.util.spec_from_file_location("hostile_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield from module.running()


@pytest.fixture(scope="session")
def config_of_7b(tokenizer: Any) -> Any:
    """Qwen2.5-7B-Instruct's published sizes, with the stop token of the small tokenizer."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen2ForCausalLM"],
    )
