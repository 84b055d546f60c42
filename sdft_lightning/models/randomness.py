"""No randomness in forward passes: dropout and the like off, checked, and kept in saved configs.

Sampling, training and the teacher must compute the same function of the weights. transformers
reads rates of dropout, layer drop and router noise from modules and from configs, under many names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.precision import eval_mode

# What transformers calls such rates: attention_dropout, resid_pdrop, layerdrop, drop_path_rate,
# router_jitter_noise, moe_jitter_eps.
_RATES = re.compile("drop|jitter|noise|stochastic")
# Under this name a model keeps the rates that its config had, by their paths in it.
_KEPT = "rates_of_the_base"
# Routers that draw experts in training by the very rate that chooses them in evaluation.
_SAMPLING_ROUTERS = ("PhimoeTopKRouter",)
_TOKENS = 16  # of the row that is computed twice
# With a generator in use, a rare event (a dropped layer) is given so many chances to show.
_PASSES, _PASSES_THAT_DRAW = 2, 8
# Greatest relative difference between two passes by rounding alone, on devices whose kernels
# add in any order. Dropout moves logits by their own size.
_ROUNDING = 2e-2


def turn_off_randomness_(model: nn.Module) -> None:
    """Set all rates of randomness to zero, in modules and configs, whatever they are called.

    Args:
        model: A model of transformers. It remembers what its config said, see `base_config`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)
    kept: dict[str, float] = dict(getattr(model, _KEPT, {}))
    for path, config in _configs(getattr(model, "config", None)):
        for name, value in list(vars(config).items()):
            if _is_rate(name, value) and value != 0.0:
                kept[f"{path}{name}"] = value
                setattr(config, name, 0.0)
    setattr(model, _KEPT, kept)


@contextmanager
def base_config(model: Any) -> Iterator[None]:
    """Inside, the model's config has the rates that it was loaded with, as it is to be saved."""
    kept: dict[str, float] = getattr(model, _KEPT, {})
    _write(model, kept)
    try:
        yield
    finally:
        _write(model, dict.fromkeys(kept, 0.0))


@torch.no_grad()
def check_no_randomness(model: Any) -> None:
    """Compare passes over one row in train mode with each other, and with one in eval mode.

    Args:
        model: A causal language model of transformers.

    Raises:
        UserError: If they differ, so that something is random that no known rate turns off.
    """
    if any(type(part).__name__ in _SAMPLING_ROUTERS for part in model.modules()):
        raise UserError(
            f"model.policy.name: {type(model).__name__} draws its experts at random in training, "
            "and its answers change where that is turned off; it cannot be trained here. Use "
            "another model."
        )
    device = next(model.parameters()).device
    count = min(_TOKENS, model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(count, device=device).unsqueeze(0)  # (1, L)
    with eval_mode(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        evaluated = _logits(model, ids)  # (1, L, V)
        model.train()
        first, draws = _seeded_logits(model, ids, 0)
        for seed in range(1, _PASSES_THAT_DRAW if draws else _PASSES):
            logits, _ = _seeded_logits(model, ids, seed)  # (1, L, V)
            if not _same(logits, first):
                raise _random(model, logits, first, "two passes over one row in train mode")
        if _distance(first, evaluated) > _ROUNDING:
            raise _random(model, first, evaluated, "passes in train and in eval mode")


def _is_rate(name: str, value: object) -> bool:
    # JSON may hold a whole number where a rate is meant, and models whole numbers of other things.
    whole = type(value) is int and name.endswith(("dropout", "drop"))
    return (isinstance(value, float) or whole) and _RATES.search(name) is not None


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and those inside it, each with the path to it, such as `text_config.`."""
    if config is None:
        return
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value, f"{path}{name}.")


def _write(model: Any, rates: dict[str, float]) -> None:
    for path, rate in rates.items():
        *parents, name = path.split(".")
        config = model.config
        for parent in parents:
            config = getattr(config, parent)
        setattr(config, name, rate)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().nan_to_num()  # (1, L, V)


def _seeded_logits(model: Any, ids: Tensor, seed: int) -> tuple[Tensor, bool]:
    """Logits `(1, L, V)`, and whether a random number was drawn on the way to them."""
    cuda = ids.device.type == "cuda"
    torch.manual_seed(seed)
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state(ids.device) if cuda else None
    logits = _logits(model, ids)
    drawn = not torch.equal(before[0], torch.random.get_rng_state())
    if before[1] is not None:
        drawn = drawn or not torch.equal(before[1], torch.cuda.get_rng_state(ids.device))
    return logits, drawn


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit on the CPU; elsewhere sums may be in another order."""
    if one.device.type == "cpu":
        return torch.equal(one, other)
    return _distance(one, other) <= _ROUNDING


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


def _random(model: Any, one: Tensor, other: Tensor, what: str) -> UserError:
    return UserError(
        f"model.policy.name: {type(model).__name__} is random in training: {what} differ (by "
        f"{_distance(one, other):.2g} of the largest logit), though every rate of dropout, layer "
        "drop and noise that its config and modules name is zero. Training it would be wrong; use "
        "another model, and please report this one's name."
    )
