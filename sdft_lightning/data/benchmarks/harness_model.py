"""Two models for lm-evaluation-harness: one that collects its requests, one that answers them.

Neither computes anything. The harness encodes its requests with the first, the policy scores them
in Lightning's loop, and the harness's own `evaluate` computes the metrics with the second.
"""

from __future__ import annotations

import json
import logging
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM

from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template import Conversation, first_missing, template_error, try_all
from sdft_lightning.types import ContinuationScore, GenerationSettings

log = logging.getLogger(__name__)

RequestKey = str
_GENERATION_KEYS = {"until", "do_sample", "max_gen_toks", "temperature", "top_p", "top_k"}


def request_key(kind: str, arguments: tuple[Any, ...]) -> RequestKey:
    """What makes two requests of the harness the same."""
    return json.dumps([kind, *arguments], sort_keys=True, default=str)


class Part(NamedTuple):
    """A continuation to be scored: a whole request, or a window of a long text.

    Attributes:
        context: At least one token.
        continuation: Tokens whose log-likelihood is asked for.
    """

    context: list[int]
    continuation: list[int]


class Prompt(NamedTuple):
    """A prompt to be answered so many times."""

    ids: list[int]
    settings: GenerationSettings
    copies: int


class _TokenizedModel(TemplateLM):  # type: ignore[misc]
    """What both models share: the tokenizer and the chat template, used as the harness's HFLM.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Longest sequence that the policy takes, in tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._told = False

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else int(beginning)

    @property
    def tokenizer_name(self) -> str:
        """Name in the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text brings its first along."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages with the chat template; system turns that it refuses are left out.

        Raises:
            UserError: If the template fails.
        """
        # An assistant turn at the end is one to go on with.
        args = {"continue_final_message": not add_generation_prompt}
        asked = Conversation(chat_history, args, add_generation_prompt, "data.benchmarks.tasks")
        (found,) = try_all(self.tokenizer, [asked])
        if found.refused:
            rest = [message for message in chat_history if message["role"] != "system"]
            if rest != chat_history:
                self._tell(
                    f"refuses a system turn ({found.reason}): as in the harness it is left out"
                )
                asked = asked._replace(messages=rest)
                (found,) = try_all(self.tokenizer, [asked])
        if found.text is None:
            raise template_error(asked, found)
        missing = first_missing(asked.messages, found.text)
        if missing is not None:
            self._tell(f"leaves out {missing.text[:60]!r} of a {missing.message['role']} turn")
        return found.text

    def _tell(self, what: str) -> None:
        """Say once what the chat template does to the tasks' turns."""
        if not self._told:
            self._told = True
            log.warning(f"data.benchmarks.tasks: the model's chat template {what}.")


class RequestCollector(_TokenizedModel):
    """Encodes requests; the answers that it gives are placeholders and not used.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Longest sequence that the policy takes, in tokens.
        vocabulary: Token ids that the model has embeddings for.

    Attributes:
        task: Name of the task whose requests come next, for messages.
        parts: What is to be scored, by request.
        prompts: What is to be answered, by request.
    """

    def __init__(self, tokenizer: Any, max_length: int, vocabulary: int) -> None:
        super().__init__(tokenizer, max_length)
        self.vocabulary = vocabulary
        self.task = ""
        self.parts: dict[RequestKey, list[Part]] = {}
        self.prompts: dict[RequestKey, Prompt] = {}

    def _checked(self, ids: list[int]) -> list[int]:
        """The token ids, unless one of them has no embedding."""
        highest = max(ids, default=0)
        if highest >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"data.benchmarks.tasks: a request of {self.task} has the token {token!r} with the "
                f"id {highest}, and the model has only {self.vocabulary} embeddings. Use the "
                "tokenizer that belongs to the model, or leave the task out."
            )
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for arguments, context, continuation in requests:
            # As the harness: what does not fit is cut off on the left.
            room = self.max_length + 1 - len(continuation)
            part = Part(self._checked(context[-room:] if room > 0 else []), continuation)
            self._checked(continuation)
            self.parts[request_key("loglikelihood", arguments)] = [part]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Cut texts into windows that do not overlap, each after one token of the last."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self._checked(self.tok_encode(request.args[0])),
                prefix_token=self._checked([self.prefix_token_id])[0],
                max_seq_len=self.max_length,
                context_len=1,
            )
            self.parts[request_key("loglikelihood_rolling", request.args)] = [
                Part(*make_disjoint_window(window)) for window in windows
            ]
        return [0.0] * len(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Encode prompts as HFLM does in its batches; what does not fit is cut off on the left."""
        for request in requests:
            text, options = request.args
            settings = _generation_settings(options)
            if settings.max_new_tokens >= self.max_length:
                raise UserError(
                    f"data.benchmarks.tasks: {request.task_name} wants answers of up to "
                    f"{settings.max_new_tokens} tokens, and the model takes {self.max_length} with "
                    "the prompt. Leave it out, or set generation_kwargs.max_gen_toks in a task "
                    "YAML of your own (same_as)."
                )
            beginning = self.tokenizer.bos_token
            own = (
                {}
                if beginning is None or not text.startswith(beginning)
                else {"add_special_tokens": False}
            )
            ids = list(self.tokenizer(text, **own)["input_ids"])
            ids = ids[-(self.max_length - settings.max_new_tokens) :]
            copies = request.repeats if settings.temperature > 0 else 1
            self.prompts[request_key("generate_until", request.args)] = Prompt(
                self._checked(ids), settings, copies
            )
        return [""] * len(requests)


def _generation_settings(options: dict[str, Any]) -> GenerationSettings:
    from lm_eval.models.utils import normalize_gen_kwargs

    found: dict[str, Any] = dict(normalize_gen_kwargs(options))
    unknown = sorted(found.keys() - _GENERATION_KEYS)
    if unknown:
        raise UserError(
            f"data.benchmarks.tasks: generation_kwargs {', '.join(unknown)} are not supported; "
            f"allowed are {', '.join(sorted(_GENERATION_KEYS))}. Leave the task out."
        )
    greedy = not found.get("do_sample")
    return GenerationSettings(
        stop=tuple(text for text in found["until"] if text),
        max_new_tokens=found["max_gen_toks"],
        temperature=0.0 if greedy else float(found.get("temperature", 1.0)),
        top_p=1.0 if greedy else float(found.get("top_p", 1.0)),
        top_k=0 if greedy else int(found.get("top_k", 0)),
    )


class ResponsePlayer(_TokenizedModel):
    """Answers requests with what the policy has given for them.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Longest sequence that the policy takes, in tokens.
        scores: Log-likelihoods by request.
        texts: Answers by request, one for each copy.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        scores: dict[RequestKey, ContinuationScore],
        texts: dict[RequestKey, list[str]],
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.scores = scores
        self.texts = texts
        self._given: dict[RequestKey, int] = {}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The scores of continuations."""
        scores = [self.scores[request_key("loglikelihood", r.args)] for r in requests]
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("Never called: loglikelihood answers without tokens.")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts."""
        return [
            self.scores[request_key("loglikelihood_rolling", r.args)].log_likelihood
            for r in requests
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers; a request that is repeated gets its copies in turn."""
        answers = []
        for request in requests:
            key = request_key("generate_until", request.args)
            given = self._given.get(key, 0)
            self._given[key] = given + 1
            answers.append(self.texts[key][given % len(self.texts[key])])
        return answers
