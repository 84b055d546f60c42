"""Time TRL's SDFTTrainer: `python tests/perf/trl_step.py '<workload as JSON>'`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from workload import TEACHER_TEMPLATE, Workload, make_rows, report

from sdft_lightning.models.tokenization import resolve_model


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step ended, and what its phases took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.phases: dict[str, list[float]] = defaultdict(list)
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.window: dict[str, float] = defaultdict(float)
        self.window_tokens = 0

    def timed(self, name: Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds added to a phase."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            phase, start = name(), time.perf_counter()
            result = function(*args, **kwargs)
            self.window[phase] += time.perf_counter() - start
            return result

        return wrapped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window."""
        self.ends.append(time.perf_counter())
        for name, seconds in self.window.items():
            self.phases[name].append(seconds)
        self.tokens.append(self.window_tokens)
        self.window.clear()
        self.window_tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def config(workload: Workload, folder: str) -> SDFTConfig:
    """TRL's options for the same step: exact forward KL, moving average, no clipping of ratios."""
    return SDFTConfig(
        output_dir=folder,
        use_cpu=workload.device == "cpu",
        bf16=workload.precision == "bf16",
        per_device_train_batch_size=workload.micro_batch,
        gradient_accumulation_steps=workload.accumulate,
        num_generations=workload.completions,
        max_steps=workload.steps,
        max_completion_length=workload.new_tokens,
        max_prompt_length=None,
        teacher_prompt_template=TEACHER_TEMPLATE,
        teacher_model_kind="base" if workload.frozen_teacher else "ema",
        teacher_update_rate=0.01,
        distillation_mode="full_logits",
        distillation_alpha=0.0,
        distillation_is_clip=None,
        temperature=1.0,
        learning_rate=1e-6,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=workload.checkpointing,
        generation_kwargs={"min_new_tokens": workload.new_tokens} if workload.forced else None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=42,
    )


def main(workload: Workload) -> None:
    """Run the steps and print the result line."""
    rows = make_rows(workload, workload.micro_batch * workload.accumulate * workload.steps)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "privileged_context": row["demonstration"],
            }
            for row in rows
        ]
    )
    folder = resolve_model(workload.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    trainer = SDFTTrainer(
        model=model,
        args=config(workload, tempfile.mkdtemp(prefix="trl-perf-")),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    instrument(trainer, clock)
    trainer.train()
    report(clock.ends, clock.phases, tokens=clock.tokens[1:], losses=clock.losses)


def instrument(trainer: Any, clock: Clock) -> None:
    """Time the phases under the names that ours have."""
    generate = clock.timed(lambda: "rollout", trainer._generate_transformers)

    def counted(prompt_ids: Any) -> Any:
        prompts, completions = generate(prompt_ids)
        clock.window_tokens += sum(len(ids) for ids in completions)
        return prompts, completions

    trainer._generate_transformers = counted
    role = lambda: "student" if torch.is_grad_enabled() else "teacher"  # noqa: E731
    trainer._forward_logits = clock.timed(role, trainer._forward_logits)
    trainer.accelerator.backward = clock.timed(lambda: "backward", trainer.accelerator.backward)


if __name__ == "__main__":
    main(Workload.load(sys.argv[1]))
