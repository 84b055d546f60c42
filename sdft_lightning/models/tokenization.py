"""Model names resolved, and the tokenizer with what the rest needs to know of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sdft_lightning.errors import UserError, printable
from sdft_lightning.models.chat_template import turn_end_ids
from sdft_lightning.models.embedded import embedded_model_path

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
# Tokenizers without a limit name an astronomical one.
_NO_LIMIT = 1 << 40
# Sizes in a config, and the most that a model of this world has; beyond it building one never ends.
_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**24,
    "intermediate_size": 2**26,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": _NO_LIMIT,
}
# Model names and added stop ids of which the user has been told.
_TOLD: set[tuple[str, tuple[int, ...]]] = set()
# What a folder without config.json is, by a file in it.
_OTHER_FOLDERS = {
    "adapter_config.json": "an adapter of peft, not a whole model. Merge it into its base first "
    "(ours: `sdft export --format=merged`) and name the merged folder.",
    "model_index.json": "a pipeline of diffusers. Name a causal language model of transformers.",
}


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
    try:
        path = Path(model_name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of nobody
        raise UserError(
            f"model.policy.name: there is no folder {printable(model_name, 80)}. Correct the name."
        ) from error
    if is_folder:
        if not (path / "config.json").is_file():
            for name, what in _OTHER_FOLDERS.items():
                if (path / name).is_file():
                    raise UserError(f"model.policy.name: the folder {path} is {what}")
            raise UserError(
                f"model.policy.name: the folder {path} has no config.json. Name a folder written "
                "by save_pretrained (for a checkpoint of ours, run `sdft export` first)."
            )
        return str(path)
    looks_like_hub_id = model_name.count("/") <= 1 and not model_name.startswith((".", "/", "~"))
    if not looks_like_hub_id or path.suffix in {".ckpt", ".safetensors", ".gguf"}:
        raise UserError(
            f"model.policy.name: there is no folder {model_name}. Allowed are `{EMBEDDED}`, a "
            "folder written by save_pretrained, or a Hub id like Qwen/Qwen2.5-7B-Instruct."
        )
    return model_name


def unloadable(what: str, model_name: str, error: BaseException) -> UserError:
    """What to say where transformers cannot load a part of a model, in whatever words it fails.

    Args:
        what: The part: model, config or tokenizer.
        model_name: As the user gave it.
        error: What transformers raised.
    """
    text = printable(str(error)) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError | IndexError):
        text = f"{type(error).__name__}: {text}"  # the text alone says nothing
    return UserError(
        f"model.policy.name: no {what} could be loaded from {model_name}: {text} Allowed are "
        f"`{EMBEDDED}`, a folder written by save_pretrained with safetensors, or a Hub id that "
        "this machine can reach."
    )


def check_folder(model_name: str) -> None:
    """Refuse a folder whose JSON files say what cannot be used, before anything is loaded from it.

    Args:
        model_name: See `resolve_model`; a Hub id is left to transformers.

    Raises:
        UserError: If a file is no JSON object, or the model has no known type, needs code of its
            own, names an attention kernel on the Hub, or has odd stop ids.
    """
    folder = Path(resolve_model(model_name))
    if not folder.is_dir():
        return
    config = _json_object(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UserError(
            f"model.policy.name: {folder / 'config.json'} names no model_type (got {kind!r}), by "
            "which transformers knows a model, e.g. llama. Name a folder written by "
            "save_pretrained."
        )
    _check_known(config, kind, folder)
    check_attention(config, f"{folder / 'config.json'}")
    files = {"config.json": config}
    if (folder / "generation_config.json").is_file():
        files["generation_config.json"] = _json_object(folder / "generation_config.json")
    for name, found in files.items():
        if found.get("eos_token_id") is not None:
            _check_stop_ids(found["eos_token_id"], folder / name)


def check_attention(config: dict[str, Any] | str | None, where: str) -> None:
    """Refuse an attention implementation that names a repository on the Hub, whose code would run.

    Args:
        config: A config's values, with those inside it, or the implementation itself.
        where: What the user finds it by.

    Raises:
        UserError: If it has a slash in it.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            if str(name).strip("_").startswith("attn_implementation"):
                for each in value.values() if isinstance(value, dict) else [value]:
                    check_attention(each, f"{where}, {name}")
            elif isinstance(value, dict):
                check_attention(value, where)
    elif isinstance(config, str) and "/" in config:
        raise UserError(
            f"{where}: the attention implementation {config!r} names a repository on the Hub, "
            "whose code would run here. Allowed are those of transformers, e.g. sdpa, eager or "
            "flash_attention_2."
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"model.policy.name: {path} is no JSON file ({error}). Copy the folder anew, whole."
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"model.policy.name: {path} holds a {type(found).__name__}, allowed is a JSON object. "
            "Copy the folder anew, whole."
        )
    return found


def _check_known(config: dict[str, Any], kind: str, folder: Path) -> None:
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise UserError(
            f"model.policy.name: {folder} is a model of its own code (auto_map in config.json), "
            "which is never run here. Use a model that transformers itself knows."
        )
    raise UserError(
        f"model.policy.name: {folder} has the model_type {kind!r}, which this version of "
        "transformers does not know. Correct config.json, or install a newer transformers."
    )


def _check_stop_ids(found: Any, path: Path) -> None:
    for each in found if isinstance(found, list) else [found]:
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise UserError(
                f"model.policy.name: {path}: eos_token_id is {found!r}; allowed are a token id "
                "from 0 or a list of them. Correct the file."
            )


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
    check_folder(model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # transformers fails in many ways on files that are not whole
        raise unloadable("tokenizer", model_name, error) from error
    if not callable(tokenizer) or not len(tokenizer):
        raise UserError(
            f"model.policy.name: the tokenizer of {model_name} has no tokens. Copy tokenizer.json "
            "and tokenizer_config.json of the model into its folder."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.policy.name: the tokenizer of {model_name} has no end-of-sequence token, with "
            "which an answer ends. Set eos_token in its tokenizer_config.json."
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"model.policy.name: model_max_length of the tokenizer of {model_name} is "
            f"{printable(repr(tokenizer.model_max_length), 80)}; allowed is a number. Correct "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = vocabulary_size(model_name, revision)
    if tokenizer.pad_token_id >= rows:  # masks never depend on it, but embeddings are looked up
        inside = tokenizer.eos_token_id < rows
        tokenizer.pad_token_id = tokenizer.eos_token_id if inside else 0
    return tokenizer


def vocabulary_size(model_name: str, revision: str | None = None) -> int:
    """Token ids that a model has embeddings for, by its config; tokenizers may have more tokens.

    Args:
        model_name: See `resolve_model`.
        revision: Branch, tag or commit on the Hub.
    """
    size = getattr(load_config(model_name, revision), "vocab_size", None)
    return _NO_LIMIT if size is None else int(size)


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
                    f"model.policy.name: the model's {type(config).__name__} has the eos_token_id "
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
    check_folder(model_name)
    stops = stop_ids(tokenizer, *_stop_configs(model_name, revision))
    added = turn_end_ids(tokenizer, stops, model_name)
    if added and (model_name, tuple(added)) not in _TOLD:
        _TOLD.add((model_name, tuple(added)))
        ends, known = (
            " or ".join(str(tokenizer.decode([token])) for token in ids) for ids in (added, stops)
        )
        log.warning(
            f"model.policy.name: the chat template of {model_name} ends an answer with {ends}, and "
            f"the model's files name {known} only. Sampling stops at {ends}, too."
        )
    return sorted({*stops, *added})


def _stop_configs(model_name: str, revision: str | None) -> list[Any]:
    """The model's config, that of its language model, and its generation config if there is one."""
    from transformers import GenerationConfig

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        generation = GenerationConfig.from_pretrained(resolve_model(model_name), **options)
    except OSError:  # many models have no generation_config.json
        generation = None
    except Exception as error:
        raise unloadable("generation_config.json", model_name, error) from error
    try:
        configs = [_whole_config(model_name, revision), load_config(model_name, revision)]
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # there is one, but it is damaged
            raise
        configs = []
    return [*configs, generation]


def load_config(model_name: str, revision: str | None = None) -> Any:
    """The config of a model by name, that of its language model where it has several parts.

    Raises:
        UserError: If there is no such model, the Hub cannot be reached, or its sizes are those of
            no model.
    """
    config = _whole_config(model_name, revision)
    config = getattr(config, "text_config", None) or config
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"model.policy.name: the text_config of {model_name} is {printable(repr(config), 80)}; "
            "allowed is a config of its own. Correct config.json."
        )
    for name, most in _SIZES.items():
        if isinstance(getattr(type(config), name, None), property):
            continue  # transformers' own word and not the file's: -1 where XLNet has no limit
        size = config_value(config, name)
        if isinstance(size, int) and not 1 <= size <= most:
            raise UserError(
                f"model.policy.name: {name} of {model_name} is {size}; allowed are 1 to {most}. "
                "Correct config.json, or copy it anew."
            )
    return config


def config_value(config: Any, name: str) -> Any:
    """A value of a config; None where there is none, or each layer has its own (Gemma 4).

    Args:
        config: A config of transformers.
        name: Its attribute.
    """
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has an error of its own for values that differ by layer
        return None


def _whole_config(model_name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    check_folder(model_name)
    try:
        config = AutoConfig.from_pretrained(
            resolve_model(model_name), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # transformers fails in many ways on configs that are not whole
        raise unloadable("config", model_name, error) from error
    return config


def check_causal(model_name: str, revision: str | None = None) -> None:
    """Refuse an encoder, a sequence-to-sequence model and the like.

    Args:
        model_name: See `resolve_model`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: If transformers has no causal language model for its config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    whole = _whole_config(model_name, revision)
    if type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model.policy.name: {model_name} is of the type {whole.model_type}, which is no "
            "causal language model (encoders and sequence-to-sequence models are not trained "
            "here). Name one that writes text, such as Qwen/Qwen2.5-7B-Instruct."
        )


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
        length = config_value(config, name)
        if length is not None and length > 0:
            return int(length)
    longest = int(tokenizer.model_max_length)
    return 2048 if longest > _NO_LIMIT else longest


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
