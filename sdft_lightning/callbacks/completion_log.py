"""Writes sampled completions down: into completions.jsonl and as TensorBoard text."""

from __future__ import annotations

from typing import Any

import lightning as L

from sdft_lightning.callbacks.run_files import append_lines, run_folder, tensorboard
from sdft_lightning.data.prompts import demonstration_text
from sdft_lightning.errors import check_at_least
from sdft_lightning.types import Demonstration


class CompletionLog(L.Callback):
    """Logs prompt, completion, demonstration, score and per-token KL.

    Args:
        every_n_steps: Optimizer steps between two logged training batches.
        rows: Completions logged of a training or validation batch.
    """

    def __init__(self, every_n_steps: int = 10, rows: int = 4) -> None:
        check_at_least("CompletionLog.every_n_steps", every_n_steps, 1)
        check_at_least("CompletionLog.rows", rows, 1)
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._logged_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._logged_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log completions of this step, if its turn has come."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == 1
        if not due or step == self._logged_at or "rollout" not in (outputs or {}):
            return
        self._logged_at = step
        rollout, keep = outputs["rollout"], outputs["keep"]
        texts = module.evaluator.decode(rollout)
        samples = len(texts) // len(batch.rows)
        divergences = outputs["divergence"].split(keep.sum(dim=1).tolist())
        records = [
            {
                **_record("train", step, batch.task, batch.rows[i // samples], texts[i]),
                "truncated": bool(rollout.truncated[i]),
                "divergence": [round(float(value), 4) for value in divergences[i]],
            }
            for i in range(min(self.rows, len(texts)))
        ]
        self._write(trainer, "train", batch.task, records)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first completions of each set with their scores."""
        if batch_idx > 0 or trainer.sanity_checking:
            return
        for role in ("graded", "teacher"):
            if role in outputs:
                graded = outputs[role]
                scores = graded.scores or [None] * len(graded.rows)
                stage = "validation" if role == "graded" else "validation_teacher"
                records = [
                    {**_record(stage, trainer.global_step, batch.task, row, text), "score": score}
                    for row, text, score in zip(
                        graded.rows, graded.completions, scores, strict=True
                    )
                ]
                self._write(trainer, stage, batch.task, records[: self.rows])

    def _write(
        self, trainer: L.Trainer, stage: str, task: str, records: list[dict[str, Any]]
    ) -> None:
        if not trainer.is_global_zero:
            return
        append_lines(run_folder(trainer) / "completions.jsonl", records)
        writer = tensorboard(trainer)
        if writer is not None:
            text = "\n\n---\n\n".join(_markdown(record) for record in records)
            writer.add_text(f"completions/{stage}/{task}", text, trainer.global_step)


def _record(
    stage: str, step: int, task: str, row: Demonstration, completion: str
) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "task": task,
        "id": row.id,
        "prompt": row.prompt[-1]["content"],
        "completion": completion,
        "demonstration": demonstration_text(row),
    }


def _markdown(record: dict[str, Any]) -> str:
    score = "" if record.get("score") is None else f"\n\n**score** {record['score']:g}"
    shown = [("prompt", record["prompt"]), ("completion", record["completion"])]
    if record["demonstration"]:
        shown.append(("demonstration", record["demonstration"]))
    # Indented by four spaces it is a code block: no markup in a completion takes effect.
    blocks = [
        f"**{name}**\n\n" + "\n".join("    " + line for line in (text or " ").splitlines())
        for name, text in shown
    ]
    return "\n\n".join(blocks) + score
