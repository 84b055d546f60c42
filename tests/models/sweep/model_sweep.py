"""One architecture through all paths of the product, against plain passes over each row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_models
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward import scoring
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import decoder_of
from sdft_lightning.forward.hidden import (
    PromptCache,
    apply_head,
    completion_hidden_states,
    output_head,
)
from sdft_lightning.forward.kv_cache import without_cache
from sdft_lightning.forward.layout import can_share, takes_own_mask
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.lora import LoRA, adapter_parameters, merged_copy
from sdft_lightning.models.precision import eval_mode
from sdft_lightning.rollout import Sampling, generate_rollout, greedy_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import ScoringBatch, Tokens

# Greatest error as a part of what tells positions apart; a wrong path is off by a tenth and more.
TOLERANCE = 2e-2
STOPS = list(range(200, 256))  # many, so that rows end at different steps
PAD, SHARED, STEPS = 2, 9, 10


@dataclass
class Verdict:
    """What came of an architecture.

    Attributes:
        name: Its model type, or a variant's name.
        model: The class that transformers builds.
        refusal: Why it cannot be loaded, in the words that a user gets; empty where it can.
        adapters: Why it cannot be trained with adapters; empty where it can.
        decoding: How tokens are appended, see `ForwardPaths`.
        drops_rows: Finished rows leave the batch.
        shares: What prompts begin with is computed once.
        packs: Short rows stand side by side.
        keeps_prompts: A frozen teacher's prompts can be kept.
        fused: It is computed in fused blocks on a CPU.
    """

    name: str
    model: str = ""
    refusal: str = ""
    adapters: str = ""
    decoding: str = ""
    drops_rows: bool = False
    shares: bool = False
    packs: bool = False
    keeps_prompts: bool = False
    fused: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Batch:
    """Prompts that begin alike, completions of several lengths, and each row by itself."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(count: int) -> Tensor:
            return torch.randint(5, 199, (count,), generator=generator)

        start = draw(SHARED)
        # The first tokens behind the shared ones differ, so that no more is shared.
        self.prompts = [
            torch.cat([start, torch.tensor([10 + row]), draw(count)])
            for row, count in enumerate((2, 8, 0))
        ]
        self.completions = [draw(count) for count in (6, 2, 4)]
        self.prompt_ids, self.prompt_mask = pad_left(self.prompts)
        self.ids, self.mask = pad_right(self.completions)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.prompt_ids, self.prompt_mask, self.ids, self.mask, self.mask


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_right([row.flip(0) for row in rows])
    return ids.flip(1), mask.flip(1)


def pad_right(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True).bool()
    return ids, mask


def check_close(what: str, ours: Tensor, plain: Tensor) -> None:
    """Compare values `(N, D)`, position by position."""
    assert ours.shape == plain.shape, f"{what}: shape {ours.shape}, not {plain.shape}"
    ours, plain = ours.detach().float(), plain.detach().float()
    errors = (ours - plain).square().mean(dim=-1).sqrt()
    spread = (plain - plain.mean(dim=0)).square().mean().sqrt()
    worst = float(errors.max() / spread)
    size = float(plain.square().mean().sqrt() / spread)
    assert worst <= TOLERANCE + 1e-5 * size, f"{what}: wrong by {worst:.2g} of the spread"


def plain_states(model: Any, prompts: list[Tensor], completions: list[Tensor]) -> Tensor:
    """States `(N, D)` that predict the completions, of each row alone, unpadded and uncached."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = torch.cat([prompt, completion])
        base = model.base_model
        states = base(input_ids=row[None], **without_cache(base)).last_hidden_state[0]  # (L, D)
        found.append(states[len(prompt) - 1 : -1])
    return torch.cat(found)


def gradients(model: Any, states: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum in which every value counts otherwise."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    (states * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_gradients(what: str, ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    largest = max(float(each.norm()) for each in plain.values())
    for name, expected in plain.items():
        error = float((ours[name] - expected).norm()) if name in ours else float(expected.norm())
        allowed = TOLERANCE * float(expected.norm()) + 1e-3 * largest
        assert error <= allowed, f"{what}: gradient of {name} wrong by {error / largest:.2g}"


def check_training(model: Any, batch: Batch) -> None:
    """States and gradients at completion tokens, in train mode, by every path."""
    model.train()
    with eval_mode(model):
        plain = plain_states(model, batch.prompts, batch.completions)
        expected = gradients(model, plain)
        others = plain_states(model, batch.prompts[::-1], batch.completions)
    # A model whose states say nothing about their row would hide every fault.
    assert float((plain - others).detach().norm() / plain.detach().norm()) > 1e-2
    for share, pack, fuse in ((True, True, True), (True, True, False), (False, True, False),
                              (True, False, False), (False, False, False)):  # fmt: skip
        what = f"training, share_prefix={share}, pack={pack}, fuse={fuse}"
        states = completion_hidden_states(
            model,
            Tokens(*batch.arguments[:2]),
            Tokens(*batch.arguments[2:4]),
            batch.arguments[4],
            share_prefix=share,
            pack=pack,
            fuse=fuse,
        )
        check_close(what, states, plain)
        check_gradients(what, gradients(model, states), expected)


def check_kept_prompts(model: Any, batch: Batch) -> bool:
    """States on a teacher's cached prompts; whether the model allows it."""
    with eval_mode(model), torch.no_grad():
        plain = plain_states(model, batch.prompts, batch.completions)
        cache = PromptCache()
        try:
            for what in ("new prompts", "kept prompts"):
                check_close(
                    what,
                    completion_hidden_states(
                        model,
                        Tokens(*batch.arguments[:2]),
                        Tokens(*batch.arguments[2:4]),
                        batch.arguments[4],
                        cache=cache,
                    ),
                    plain,
                )
        except UserError as error:
            if "teacher.cache_prompts" not in str(error):
                raise
            return False
        some = [part[1:] for part in batch.arguments]
        states = completion_hidden_states(
            model, Tokens(*some[:2]), Tokens(*some[2:4]), some[4], cache=cache
        )
        check_close("kept prompts in another batch", states, plain[6:])
    return True


def check_rollouts(model: Any, prompts: list[Tensor]) -> None:
    """Greedy and sampled completions, two of each prompt, against the plain logits."""
    ids, mask = pad_left(prompts)
    names = [str(row) for row in range(len(prompts))]
    uniforms = row_uniforms(1, 0, names, 2, STEPS)
    sampling = Sampling(max_new_tokens=STEPS, completions_per_prompt=2)
    greedy = greedy_rollout(model, Tokens(ids, mask), STEPS, STOPS, PAD)
    sampled = generate_rollout(model, Tokens(ids, mask), sampling, uniforms, STOPS, PAD)
    assert sampled.completion_mask.sum(dim=1).unique().numel() > 1  # rows end at different steps
    for what, rollout, copies in (("greedy", greedy, 1), ("sampled", sampled, 2)):
        for row, (tokens, kept) in enumerate(
            zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        ):
            prompt, completion = prompts[row // copies], tokens[kept]
            with eval_mode(model), torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
            logits = logits[len(prompt) - 1 : -1].float()  # (T, V)
            plain = logits.log_softmax(dim=-1).gather(-1, completion[:, None]).squeeze(-1)
            spread = float(logits.std())
            error = float((rollout.sampled_log_probs[row][kept] - plain).abs().max())
            assert error <= 3 * TOLERANCE * spread, f"{what} rollout: off by {error:.2g} nats"
            if what == "greedy":
                short = logits.max(dim=-1).values - logits.gather(-1, completion[:, None])[:, 0]
                assert float(short.max()) <= TOLERANCE * spread, "greedy rollout: not the likeliest"


def check_scoring(model: Any, batch: Batch) -> None:
    """Log-likelihoods of several continuations of each context, by both shared paths."""
    owner = torch.tensor([0, 0, 1, 2, 2])
    continuations = [*batch.completions, batch.completions[0][:1], batch.completions[1]]
    ids, mask = pad_right(continuations)
    scored = ScoringBatch(batch.prompt_ids, batch.prompt_mask, ids, mask, owner, [0] * 5)
    with eval_mode(model), torch.no_grad():
        contexts = [batch.prompts[row] for row in owner]
        states = plain_states(model, contexts, continuations)
        logits = apply_head(output_head(model), states).float()  # (N, V)
    chosen = logits.log_softmax(dim=-1).gather(-1, torch.cat(continuations)[:, None])[:, 0]
    sums = [float(part.sum()) for part in chosen.split([len(each) for each in continuations])]
    allowed = 10 * TOLERANCE * float(logits.std())
    for longest in (scoring._LONGEST_BRANCH, 0):
        with patch.object(scoring, "_LONGEST_BRANCH", longest):
            found = [score.log_likelihood for score in scoring.score_continuations(model, scored)]
        error = max(abs(ours - plain) for ours, plain in zip(found, sums, strict=True))
        assert error <= allowed, f"scoring: off by {error:.2g} nats"


def check_adapters(folder: Path, batch: Batch) -> str:
    """The same with adapters that have moved; why there can be none, or nothing."""
    try:
        model = load_policy(Policy(str(folder), lora=LoRA(r=2))).model
    except UserError as error:
        return str(error)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    with eval_mode(model), torch.no_grad():
        plain = plain_states(model, batch.prompts, batch.completions)
        merged = plain_states(merged_copy(model), batch.prompts, batch.completions)
        check_close("merged adapters", merged, plain)
    model.train()
    expected = gradients(model, plain_states(model, batch.prompts, batch.completions))
    states = completion_hidden_states(
        model, Tokens(*batch.arguments[:2]), Tokens(*batch.arguments[2:4]), batch.arguments[4]
    )
    check_close("training with adapters", states, plain)
    check_gradients("training with adapters", gradients(model, states), expected)
    check_rollouts(model, batch.prompts)
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    former = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(former)


def sweep(name: str, tokenizer: Any, folder: Path) -> Verdict:
    """Load an architecture as a user would, and compare everything that is done with it.

    Raises:
        AssertionError: If a path is wrong.
    """
    with quiet():
        built = tiny_models.tiny_model(name)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        verdict = Verdict(name, type(built).__name__)
        try:
            model = load_policy(Policy(str(folder))).model
        except UserError as error:
            verdict.refusal = str(error).replace(str(folder), "…")
            return verdict
        batch = Batch()
        check_training(model, batch)
        check_rollouts(model, batch.prompts)
        check_scoring(model, batch)
        verdict.keeps_prompts = check_kept_prompts(model, batch)
        verdict.adapters = check_adapters(folder, batch).replace(str(folder), "…")
        paths = paths_of(model)
        verdict.decoding, verdict.drops_rows = paths.decoding, paths.drops_rows
        model.eval()
        verdict.shares, verdict.packs = can_share(model), takes_own_mask(model)
        verdict.fused = decoder_of(model) is not None
        return verdict
