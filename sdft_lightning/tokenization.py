"""Model names resolved, and the tokenizer with what the rest needs to know of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sdft_lightning.chat_template import turn_end_ids
from sdft_lightning.embedded import embedded_model_path
from sdft_lightning.errors import UserError

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
# Tokenizers without a limit name an astronomical one.
_NO_LIMIT = 1 << 40
# Model names and added stop ids of which the user has been told.
_TOLD: set[tuple[str, tuple[int, ...]]] = set()


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
            f"model_name: no tokenizer could be loaded from {model_name}: {error} "
            f"Allowed are `{EMBEDDED}`, a folder written by save_pretrained, or a Hub id that "
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


def stop_ids(tokenizer: Any, *configs: Any) -> list[int]:
    """All token ids that end a completion by the model's files, sorted.

    Args:
        tokenizer: A tokenizer of transformers.
        configs: The model's config and generation config; their `eos_token_id` may be a list. None
            stands for one that there is not.

    Returns:
        At least one id.

    Raises:
        UserError: If an `eos_token_id` is no token id.
    """
    found = {tokenizer.eos_token_id}
    for config in configs:
        listed = getattr(config, "eos_token_id", None)
        for token in listed if isinstance(listed, list | tuple) else [listed]:
            if token is not None and (type(token) is not int or token < 0):
                raise UserError(
                    f"model_name: the model's {type(config).__name__} has the eos_token_id "
                    f"{listed!r}; allowed are a token id (0 and more) and a list of such. Correct "
                    "its config.json or generation_config.json."
                )
            found.add(token)
    return sorted(token for token in found if token is not None)


def load_stop_ids(model_name: str, tokenizer: Any, revision: str | None = None) -> list[int]:
    """The stop ids of a model by name, without loading its weights.

    Args:
        model_name: See `resolve_model`.
        tokenizer: Its tokenizer.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Those of tokenizer, config and generation config, and the token with which the chat template
        ends an answer; where that had to be added, it is told once.

    Raises:
        UserError: If the chat template ends an answer with what cannot stop sampling.
    """
    config, generation = _stop_configs(model_name, revision)
    stops = stop_ids(tokenizer, config, generation)
    added = turn_end_ids(tokenizer, stops, model_name)
    if added and (model_name, tuple(added)) not in _TOLD:
        _TOLD.add((model_name, tuple(added)))
        ends, known = (
            " or ".join(str(tokenizer.decode([token])) for token in ids) for ids in (added, stops)
        )
        log.warning(
            f"model_name: the chat template of {model_name} ends an answer with {ends}, and the "
            f"model's files name {known} only. Sampling stops at {ends}, too."
        )
    return sorted({*stops, *added})


def _stop_configs(model_name: str, revision: str | None) -> tuple[Any, Any]:
    """The config and the generation config of a model; None where there is none."""
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    source = resolve_model(model_name)
    found: list[Any] = []
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (AutoConfig, {"trust_remote_code": False}),
        (GenerationConfig, {}),
    ]
    for kind, more in kinds:
        try:
            found.append(kind.from_pretrained(source, **options, **more))
        except (OSError, ValueError):  # many models have no generation_config.json
            found.append(None)
    config, generation = found
    return getattr(config, "text_config", None) or config, generation


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
            f"model_name: no config could be loaded from {model_name}: {error} Allowed are "
            f"`{EMBEDDED}`, a folder written by save_pretrained, or a Hub id that this machine can "
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
