"""How much of its expected movement a model really makes (METHOD §4: bfloat16 starves updates)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from sdft_lightning.teacher import EMATeacher

_TENSORS = 16
_ENTRIES = 255  # of each; below 4096 in all torchao's optimizer keeps its averages exact
# Each entry of a parameter moves by its own gradients alone, so a sample can be followed.
_ELEMENTWISE = {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad"}
_ELEMENTWISE |= {"_AdamBase"}  # of torchao


class Sample(NamedTuple):
    """Entries of some parameters, by the parameter's name."""

    entries: dict[str, Tensor]

    def values(self, named: dict[str, Any], of: Callable[[Any], Tensor | None]) -> Tensor | None:
        """The sampled entries, `(entries,)` in float64 (float32 on MPS); None if one is absent.

        Args:
            named: Parameters by name.
            of: What of a parameter is read: itself, or its gradient.
        """
        found: list[Tensor] = []
        for name, entries in self.entries.items():
            tensor = of(named[name])
            if tensor is None or tensor.numel() <= int(entries[-1]):
                return None
            picked = tensor.detach().reshape(-1)[entries.to(tensor.device)]
            found.append(picked.to(torch.float32 if picked.device.type == "mps" else torch.float64))
        return torch.cat(found) if found else None


def draw_sample(named: dict[str, nn.Parameter]) -> Sample:
    """Choose entries, the same ones for the same shapes.

    Args:
        named: The trained parameters by name.
    """
    generator = torch.Generator().manual_seed(0)
    names = [name for name, value in named.items() if value.numel()]
    spread = torch.linspace(0, len(names) - 1, min(_TENSORS, len(names))).long().tolist()
    return Sample(
        {
            name: torch.randint(named[name].numel(), (_ENTRIES,), generator=generator)
            .unique()
            .cpu()
            for name in (names[i] for i in spread)
        }
    )


def effective_movement(realised: Tensor, expected: Tensor) -> float | None:
    """⟨realised, expected⟩ / ⟨expected, expected⟩: 1 where all of it is made, 0 where none is.

    A projection rather than a ratio of norms: the noise of stochastic rounding is no movement.

    Args:
        realised: How far entries have moved, any shape.
        expected: How far they should have, the same shape.

    Returns:
        The ratio; None where no movement is expected.
    """
    size = float(expected.square().sum())
    return float((realised * expected).sum()) / size if size > 0 else None


class EffectiveUpdate(L.Callback):
    """Logs train/effective_update, and train/effective_teacher_update for an averaging teacher.

    Expected is what a second optimizer of the same kind does to a float64 copy of sampled entries,
    with the gradients, clipped as they were, and learning rates of the run; for the teacher, a
    float64 average of the student's real weights. Both count from the start of the run. Not logged
    for optimizers that do not move each entry by itself or have several parameter groups, nor where
    parameters are sharded.
    """

    def __init__(self) -> None:
        self._sample = Sample({})
        self._optimizer: Any = None
        self._copy: nn.Parameter | None = None
        self._tensors: dict[str, Tensor] = {}
        self._loaded: dict[str, Any] = {}
        self._stepped_at = 0

    def step_names(self, module: Any, trainer: Any) -> list[str]:
        """What may be logged of a step."""
        kinds = {kind.__name__ for kind in type(module.trial_optimizer()).__mro__}
        if not (trainer.log_every_n_steps and kinds & _ELEMENTWISE):
            return []
        averages = isinstance(getattr(module, "teacher", None), EMATeacher)
        teachers = ["train/effective_teacher_update"] if averages else []
        return ["train/effective_update", *teachers]

    def state_dict(self) -> dict[str, Any]:
        """The float64 copies and where they started."""
        if self._copy is None:
            return {}
        copy = self._copy.detach()
        return {
            "tensors": {**self._tensors, "copy": copy},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them when training starts."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Draw the sample and copy it."""
        self._stepped_at = trainer.global_step
        self._copy = None
        named = _trained(module)
        kinds = {kind.__name__ for kind in type(trainer.optimizers[0]).__mro__}
        one_group = len(trainer.optimizers[0].param_groups) == 1
        whole = all(type(each) is nn.Parameter for each in named.values())
        if not (kinds & _ELEMENTWISE and one_group and whole):
            return
        self._sample = draw_sample(named)
        start = self._sample.values(named, lambda value: value)
        if start is None or (trainer.global_step > 0 and not self._loaded):
            return
        self._tensors = {"start": start.clone()}
        teacher = self._teacher(module)
        if teacher is not None:
            self._tensors |= {"teacher_start": teacher.clone(), "teacher_copy": teacher.clone()}
        self._copy = nn.Parameter(start.clone())
        self._optimizer = module.optimizer_factory([self._copy])
        if self._loaded:
            tensors = {name: value.to(start) for name, value in self._loaded["tensors"].items()}
            self._copy.data = tensors.pop("copy")
            self._tensors = tensors
            self._optimizer.load_state_dict(self._loaded["optimizer"])

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Take the learning rates over; the schedule has moved on when the step is over."""
        if self._copy is not None:
            for mine, real in zip(
                self._optimizer.param_groups, optimizer.param_groups, strict=True
            ):
                if isinstance(mine["lr"], Tensor):
                    mine["lr"].fill_(float(real["lr"]))
                else:
                    mine["lr"] = float(real["lr"])

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the copies follow the optimizer step, and compare."""
        step = trainer.global_step
        if step == self._stepped_at or self._copy is None:
            return
        self._stepped_at = step
        named = _trained(module)
        gradient = self._sample.values(named, lambda value: value.grad)
        student = self._sample.values(named, lambda value: value)
        if gradient is None or student is None:
            self._copy = None
            return
        if bool(gradient.isfinite().all()):  # a scaler skips the step otherwise
            self._copy.grad = gradient
            self._optimizer.step()
        self._follow_teacher(module, student, step)
        every = trainer.log_every_n_steps  # 0 is never
        if every and step % every == 0:
            self._log(module, student)

    def _follow_teacher(self, module: Any, student: Tensor, step: int) -> None:
        if "teacher_copy" in self._tensors and step % module.teacher.every == 0:
            self._tensors["teacher_copy"].lerp_(student, module.teacher.update_rate)

    def _teacher(self, module: Any) -> Tensor | None:
        """The sampled entries of a teacher that averages all that the student trains."""
        if not isinstance(getattr(module, "teacher", None), EMATeacher):
            return None
        named = dict(module.teacher.network.named_parameters())
        if not self._sample.entries.keys() <= named.keys():
            return None
        return self._sample.values(named, lambda value: value)

    def _log(self, module: Any, student: Tensor) -> None:
        assert self._copy is not None
        found = {"effective_update": (student, self._tensors["start"], self._copy.detach())}
        if "teacher_copy" in self._tensors:
            teacher = self._teacher(module)
            assert teacher is not None
            start, copy = self._tensors["teacher_start"], self._tensors["teacher_copy"]
            found["effective_teacher_update"] = (teacher, start, copy)
        for name, (real, start, copy) in found.items():
            ratio = effective_movement(real - start, copy - start)
            if ratio is not None:
                module.log(f"train/{name}", ratio)


def _trained(module: Any) -> dict[str, nn.Parameter]:
    return {name: each for name, each in module.student.named_parameters() if each.requires_grad}
