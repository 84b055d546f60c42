"""What is checked of a run before any model is loaded, in scripts as on the command line."""

from __future__ import annotations

from typing import Any

from sdft_lightning.files.whole_windows import check_whole_windows
from sdft_lightning.modules.monitors import check_monitors
from sdft_lightning.modules.trainer_options import check_trainer
from sdft_lightning.types import TaskData


def check_run(module: Any, data: TaskData | None, trainer: Any, command: str) -> None:
    """Refuse, or warn of, what cannot work.

    Args:
        module: The `PolicyModule`.
        data: The data module, set up; None for one that is not asked.
        trainer: Who carries out the command.
        command: fit, validate, test or predict.

    Raises:
        UserError: Names the option, or the row.
    """
    check_trainer(trainer, command)
    if data is not None:
        data.check_model_takes(module.new_tokens, module.eval_max_new_tokens)
    if command != "fit":
        return
    module.check_before_fit([] if data is None else data.training_rows())
    if data is not None and data.batches_per_epoch is not None:
        check_whole_windows(trainer, data.batches_per_epoch)
    check_monitors(module, trainer, data)
    ends = trainer.max_steps != -1 or trainer.max_epochs not in (None, -1)
    module.schedule.check_end(ends)
