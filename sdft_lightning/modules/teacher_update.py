"""When the teacher moves: once an optimizer step, before a checkpoint can be written."""

from __future__ import annotations

from typing import Any

import lightning as L


class TeacherUpdate(L.Callback):
    """Calls `teacher.update_` after each optimizer step, whatever the accumulation.

    A callback rather than a hook of the module: checkpoints are written by callbacks, which run
    before the module's own hook of the same name.
    """

    def __init__(self) -> None:
        self.updated_at = 0

    def step_names(self, module: Any, trainer: Any) -> list[str]:
        """What is logged of a step."""
        return ["train/teacher_distance"] if trainer.log_every_n_steps else []

    def state_dict(self) -> dict[str, int]:
        """The optimizer step after which the teacher moved last."""
        return {"updated_at": self.updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step."""
        self.updated_at = state_dict["updated_at"]

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the teacher if the optimizer has stepped."""
        step = trainer.global_step
        if step == self.updated_at:
            return
        module.teacher.update_(module.student, step)
        self.updated_at = step
        every = trainer.log_every_n_steps  # 0 is never
        if every and step % every == 0:
            module.log("train/teacher_distance", module.teacher.distance(module.student))
