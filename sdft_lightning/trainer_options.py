"""Options of Lightning's Trainer that cannot work here, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdft_lightning.errors import UserError, check_at_least
from sdft_lightning.strategies import check_strategy


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse what would end in another library's traceback, or in a run that is none.

    Args:
        options: `trainer` of the config.

    Raises:
        UserError: Names the option.
    """
    check_strategy(options.get("strategy"))
    clip = options.get("gradient_clip_val") or 0.0
    if clip < 0:  # torch would turn every gradient around
        raise UserError(
            f"trainer.gradient_clip_val: got {clip}, allowed are 0 (no clipping) and more."
        )
    window = options.get("accumulate_grad_batches")
    if window is not None:
        check_at_least("trainer.accumulate_grad_batches", window, 1)
    overfit = options.get("overfit_batches") or 0
    if overfit:  # Lightning puts samplers of its own into the loaders, which hold whole batches
        raise UserError(
            f"trainer.overfit_batches: got {overfit}, allowed is 0: training batches come in an "
            "order that a resumed run continues. To train on few rows set "
            "--trainer.limit_train_batches, or give data.train and data.validation a small file."
        )
