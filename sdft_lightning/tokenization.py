"""Model names resolved, and the tokenizer with what the rest needs to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_lightning.embedded import embedded_model_path
from sdft_lightning.errors import UserError
from sdft_lightning.foreign_text import printable

EMBEDDED = "embedded"
# Tokenizers without a limit name an astronomical one.
_NO_LIMIT = 1 << 40


def resolve_model(model_name: str) -> str:
    """The folder or Hub id that a model name stands for.

    Args:
        model_name: `embedded`, a folder written by `save_pretrained`, or a Hub id.

    Returns:
        What transformers' `from_pretrained` takes.

    Raises:
        UserError: If a folder is named that does not exist or holds no config.
    """
    if model_name == EMBEDDED:
        return str(embedded_model_path())
    path = Path(model_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model_name: the folder {path} has no config.json. Name a folder written by "
                "save_pretrained (for a checkpoint of ours, run `sdft export` first)."
            )
        return str(path)
    looks_like_hub_id = model_name.count("/") <= 1 and not model_name.startswith((".", "/", "~"))
    if not looks_like_hub_id or path.suffix in {".ckpt", ".safetensors", ".gguf"}:
        raise UserError(
            f"model_name: there is no folder {model_name}. Allowed are `{EMBEDDED}`, a folder "
            "written by save_pretrained, or a Hub id like Qwen/Qwen2.5-7B-Instruct."
        )
    return model_name


def load_tokenizer(model_name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, with a padding token.

    Args:
        model_name: See `resolve_model`.
        revision: Branch, tag or commit on the Hub.

    Returns:
        A tokenizer of transformers. Where it has no padding token, the end-of-sequence token
        stands in; masks never depend on the padding id.

    Raises:
        UserError: If there is no such model or tokenizer, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = resolve_model(model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name: no tokenizer could be loaded from {model_name}: "
            f"{printable(str(error))} Allowed are `{EMBEDDED}`, a folder written by "
            "save_pretrained, or a Hub id that "
            "this machine can reach."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model_name: the tokenizer of {model_name} has no end-of-sequence token, with which "
            "an answer ends. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """All token ids that end a completion, sorted.

    Args:
        tokenizer: A tokenizer of transformers.
        generation_config: The model's; its `eos_token_id` may be a list.

    Returns:
        At least one id.
    """
    found = {tokenizer.eos_token_id}
    listed = getattr(generation_config, "eos_token_id", None)
    found.update(listed if isinstance(listed, list) else [listed])
    return sorted(token for token in found if token is not None)


def load_stop_ids(model_name: str, tokenizer: Any, revision: str | None = None) -> list[int]:
    """The stop ids of a model by name, without loading its weights; see `stop_ids`."""
    from transformers import GenerationConfig

    try:
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        generation = GenerationConfig.from_pretrained(resolve_model(model_name), **options)
    except OSError:  # many models have no generation_config.json
        generation = None
    return stop_ids(tokenizer, generation)


def load_config(model_name: str, revision: str | None = None) -> Any:
    """The config of a model by name, that of its language model where it has several parts.

    Raises:
        UserError: If there is no such model, or the Hub cannot be reached.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            resolve_model(model_name), revision=revision, trust_remote_code=False
        )
    except OSError as error:
        raise UserError(
            f"model_name: no config could be loaded from {model_name}: "
            f"{printable(str(error))} Allowed are `{EMBEDDED}`, a folder written by "
            "save_pretrained, or a Hub id that this machine can "
            "reach."
        ) from error
    return getattr(config, "text_config", None) or config


def load_max_length(model_name: str, tokenizer: Any, revision: str | None = None) -> int:
    """Longest sequence that a model takes, as lm-evaluation-harness reckons it.

    Args:
        model_name: See `resolve_model`.
        tokenizer: Its tokenizer, asked where the config does not say.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Tokens.

    Raises:
        UserError: If there is no such model, or the Hub cannot be reached.
    """
    config = load_config(model_name, revision)
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = int(tokenizer.model_max_length)
    return 2048 if length > _NO_LIMIT else length


def has_rotary_positions(model_name: str, revision: str | None = None) -> bool:
    """Whether positions are computed, so that there is one behind `load_max_length`, too.

    Args:
        model_name: See `resolve_model`.
        revision: Branch, tag or commit on the Hub.
    """
    names = load_config(model_name, revision).to_dict()
    return any(name.startswith("rope_") or name.startswith("rotary_") for name in names)


def token_id(tokenizer: Any, text: str) -> int | None:
    """Id of a text such as `</think>` where it is one token of the vocabulary, else None."""
    token = tokenizer.convert_tokens_to_ids(text)
    return None if token is None or token == tokenizer.unk_token_id else int(token)
