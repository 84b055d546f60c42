"""Sampling completions with a transformers model, row by row independent of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import Decoder, DecodingSteps, ReadPrompts, read_prompts
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.rollout.decode_mode import decode_mode
from sdft_lightning.rollout.plain_steps import plain_steps, split_prompts_of
from sdft_lightning.rollout.sampling import Sampling, choose_tokens
from sdft_lightning.rollout.stop_texts import StopTexts
from sdft_lightning.types import Rollout

# Finished rows are dropped from the batch when at least this fraction of it is finished.
_COMPACT_AT = 0.25


def greedy_rollout(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_id: int,
    stop_texts: StopTexts | None = None,
) -> Rollout:
    """The likeliest completion of each prompt, token by token; see `generate_rollout`."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return generate_rollout(
        model, prompt_ids, prompt_mask, sampling, None, stop_ids, pad_id, stop_texts
    )


@torch.no_grad()
def generate_rollout(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    uniforms: Tensor | None,
    stop_ids: list[int],
    pad_id: int,
    stop_texts: StopTexts | None = None,
    read: list[ReadPrompts] | None = None,
) -> Rollout:
    """Sample completions; the model is in eval mode meanwhile.

    Each token is the inverse CDF at the uniform number of its (row, position), so a row's
    completion does not depend on the batch around it (up to floating-point ties).

    Args:
        model: A causal language model of transformers.
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)` boolean.
        sampling: Temperature, truncation, length, completions per prompt (n).
        uniforms: `(B · n, max_new_tokens)` in [0, 1), see `uniforms.row_uniforms`; None samples
            greedily.
        stop_ids: Ids of which any ends a completion; it is part of the completion.
        pad_id: Id that fills the rest of a row.
        stop_texts: Texts that end a completion besides; the tokens that hold them are kept.
        read: The same prompts, read by the same weights, in one piece or several; its keys and
            values are dropped.

    Returns:
        The rollout, as long as its longest completion.

    Raises:
        UserError: If the model's logits are no numbers.
    """
    paths_of(model)  # found out before anything of the model is changed for decoding
    samples = sampling.completions_per_prompt
    rows = prompt_ids.shape[0] * samples
    shape = (rows, sampling.max_new_tokens)
    device = prompt_ids.device
    ids = torch.full(shape, pad_id, dtype=torch.long, device=device)  # (R, T)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)  # (R, T)
    log_probs = torch.zeros(shape, dtype=torch.float32, device=device)  # (R, T)
    stops = torch.tensor(stop_ids, device=device)  # (S,)
    alive = torch.arange(rows, device=device)  # rows that are still sampled
    length = 0
    with decode_mode(model, rows, sampling.max_new_tokens) as fused:
        decoder = _Decoder(model, prompt_ids, prompt_mask, sampling, fused, read)
        logits = decoder.prefill()  # (R, V)
        for step in range(sampling.max_new_tokens):
            numbers = None if uniforms is None else uniforms[alive.cpu(), step]
            tokens, chosen = choose_tokens(logits, sampling, numbers)  # (A,)
            ids[alive, step], mask[alive, step], log_probs[alive, step] = tokens, True, chosen
            length = step + 1
            going = ~torch.isin(tokens, stops)  # (A,)
            if stop_texts is not None:
                going &= ~stop_texts.found(ids[alive, :length])
            alive, tokens = alive[going], tokens[going]
            if alive.numel() == 0 or length == sampling.max_new_tokens:
                break
            logits = decoder.step(tokens, going)  # (A, V)
        decoder.finish(ids[:, :length], mask[:, :length])
    _check_finite(log_probs)
    truncated = torch.zeros(rows, dtype=torch.bool, device=device)  # (R,)
    truncated[alive] = True
    return Rollout(ids[:, :length], mask[:, :length], log_probs[:, :length], truncated)


def _check_finite(log_probs: Tensor) -> None:
    """Refuse completions `(R, T)` of a model that has diverged; asked once, not a token."""
    broken = int((~log_probs.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"rollout: the model's logits are not finite (NaN or infinity) in {broken} of "
            f"{log_probs.shape[0]} completions. Its weights have diverged, or the precision "
            "overflows. Go on from an earlier checkpoint (--ckpt_path) with a lower learning rate "
            "(--model.optimizer.init_args.lr), or set --trainer.precision to bf16-mixed or 32-true."
        )


class _Decoder:
    """Keys and values of the rows that go on, and the next logits of each.

    Finished rows stay in the batch until enough of them can be dropped at once, or to the end where
    the model's cache cannot drop any.

    Args:
        model: A causal language model of transformers.
        prompt_ids: `(B, P)`.
        prompt_mask: `(B, P)`.
        sampling: Completions per prompt (n), and their length.
        fused: The model's parts, where its steps are fused.
        read: The prompts, where fused parts have read them.
    """

    def __init__(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        fused: Decoder | None,
        read: list[ReadPrompts] | None,
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.fused = fused
        self.read = read
        self.steps: Any = None
        self.drops_rows = fused is not None or paths_of(model).drops_rows
        self.mask = prompt_mask.bool()  # (B, P)
        rows = prompt_ids.shape[0] * sampling.completions_per_prompt
        self.going = torch.ones(rows, dtype=torch.bool)  # (A,)

    def prefill(self) -> Tensor:
        """Read the prompts once for all samples of each; logits `(B · n, V)`."""
        samples = self.sampling.completions_per_prompt
        if self.fused is not None:
            return self._fused_prefill(self.fused, samples)
        self.steps = plain_steps(self.model, self.prompt_ids, self.mask, samples)
        logits: Tensor = self.steps.logits
        return logits

    def _fused_prefill(self, fused: Decoder, samples: int) -> Tensor:
        head = self.model.get_output_embeddings()
        read, self.read = self.read, None  # so that nothing is held longer than it is needed
        if read is None:
            split = split_prompts_of(self.model, self.prompt_ids, self.mask)
            read = [read_prompts(fused, split, product_dtype(head.weight.dtype))]
        steps = DecodingSteps(fused, head, read, samples, self.sampling.max_new_tokens)
        self.steps = steps
        return steps.logits

    def step(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Append one token to each row that goes on.

        Args:
            tokens: `(A,)` for the rows that go on.
            going: Which of the rows of the last call they are.

        Returns:
            Logits `(A, V)`.
        """
        slots = self.going.to(going.device).nonzero().squeeze(-1)[going]  # (A,) places in the batch
        size = self.going.numel()
        if self.drops_rows and slots.numel() <= (1 - _COMPACT_AT) * size:
            self.steps.select(slots)
            size = slots.numel()
            slots = torch.arange(size, device=slots.device)
        self.going = torch.zeros(size, dtype=torch.bool, device=slots.device)
        self.going[slots] = True
        inputs = torch.zeros(size, dtype=torch.long, device=slots.device)  # (S,)
        inputs[slots] = tokens
        logits: Tensor = self.steps(inputs)  # (S, V)
        return logits if slots.numel() == size else logits[slots]  # (A, V)

    def finish(self, completion_ids: Tensor, completion_mask: Tensor) -> None:
        """Leave with the prompts what steps have found, where it is wanted."""
        if isinstance(self.steps, DecodingSteps):
            self.steps.finish(completion_ids, completion_mask)
