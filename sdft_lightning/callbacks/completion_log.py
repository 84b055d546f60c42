"""Writes sampled completions down, and draws one token by token, coloured by the divergence."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np

from sdft_lightning.data.prompts import demonstration_text
from sdft_lightning.errors import check_at_least
from sdft_lightning.files.run_folder import append_lines, run_folder, tensorboard
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


_TOKENS_A_LINE = 7
_MOST_TOKENS = 120


class KLStrip(L.Callback):
    """Adds a picture of per-token divergence to TensorBoard.

    Args:
        every_n_steps: Optimizer steps between two pictures.
        rows: Completions in a picture.
    """

    def __init__(self, every_n_steps: int = 10, rows: int = 3) -> None:
        check_at_least("KLStrip.every_n_steps", every_n_steps, 1)
        check_at_least("KLStrip.rows", rows, 1)
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._drawn_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._drawn_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first completions of this step, if its turn has come."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == 1
        writer = tensorboard(trainer) if trainer.is_global_zero else None
        if not due or step == self._drawn_at or writer is None or "rollout" not in (outputs or {}):
            return
        self._drawn_at = step
        rollout, keep = outputs["rollout"], outputs["keep"]
        divergences = outputs["divergence"].float().cpu().split(keep.sum(dim=1).tolist())
        strips = []
        for i in range(min(self.rows, len(divergences))):
            ids = rollout.completion_ids[i][keep[i]].tolist()
            tokens = [module.tokenizer.decode([token]) for token in ids]
            strips.append((tokens, divergences[i].numpy()))
        writer.add_figure("divergence/tokens", draw_strips(strips), step)


def draw_strips(strips: list[tuple[list[str], np.ndarray]]) -> Any:
    """A figure in which each token stands on a field coloured by its divergence.

    Args:
        strips: Tokens of each completion, and their divergences in nats.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    strips = [(tokens[:_MOST_TOKENS], values[:_MOST_TOKENS]) for tokens, values in strips]
    lines = sum(-(-max(1, len(tokens)) // _TOKENS_A_LINE) + 1 for tokens, _ in strips)
    highest = max((float(values.max()) for _, values in strips if len(values)), default=1.0)
    colours = ScalarMappable(Normalize(0, max(highest, 1e-6)), "YlOrRd")
    figure = Figure(figsize=(7, 0.42 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, _TOKENS_A_LINE), ylim=(lines, 0), xticks=[], yticks=[])
    axes.set_title("divergence from the teacher, nats a token", fontsize=11)
    line = 0
    for tokens, values in strips:
        for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
            row, column = line + place // _TOKENS_A_LINE, place % _TOKENS_A_LINE
            axes.fill_between([column, column + 1], row, row + 0.92, color=colours.to_rgba(value))
            dark = value > 0.6 * max(highest, 1e-6)
            # `$` would start mathematical typesetting.
            label = repr(token)[1:-1][:11].replace("$", r"\$")
            axes.text(
                column + 0.5, row + 0.48, label, ha="center", va="center", fontsize=10,
                color="white" if dark else "black",
            )  # fmt: skip
        line += -(-max(1, len(tokens)) // _TOKENS_A_LINE) + 1
    figure.colorbar(colours, ax=axes, fraction=0.03)
    return figure
