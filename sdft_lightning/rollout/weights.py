"""Weights to sample with: the student's own or a copy, in bfloat16 where that is faster."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdft_lightning.forward.fused import join_
from sdft_lightning.forward.policy import SamplingDtype
from sdft_lightning.models.sharding import empty_copy, fill_, is_sharded


class SamplingWeights:
    """Keeps a bfloat16 copy of a model and refreshes it when the model has moved.

    The copy is no part of any module: it is never trained, moved or saved. Of a model that is
    spread over processes a whole copy is kept in any case: each process samples until its own rows
    are finished, and cannot wait for the others at every token.

    Args:
        dtype: same samples with the trained weights, bfloat16 with a copy, which only costs memory
            where bfloat16 is not multiplied (see `products`); auto takes the copy where the
            hardware multiplies bfloat16 natively and the weights are float32.
    """

    def __init__(self, dtype: SamplingDtype = "auto") -> None:
        self.dtype = dtype
        self._copy: Any = None
        self._version: object = None
        self._empty: Any = None

    def prepare(self, student: nn.Module) -> None:
        """Remember the form of a model that is about to be spread over processes."""
        self._copy, self._empty = None, empty_copy(student)

    def model(self, student: Any, version: object) -> Any:
        """The model to sample with.

        Args:
            student: The trained model.
            version: Anything that changes whenever the weights do, e.g. the optimizer step.

        Returns:
            `student` itself or its up-to-date copy in eval mode. Of a model that is spread over
            processes all must ask for a new version at the same time.
        """
        if is_sharded(student):
            return self._whole(student, version)
        if not self.uses_copy(student):
            return student
        if self._copy is None or _device(self._copy) != _device(student):
            # Never as inference tensors, or the copy could not be refreshed later.
            with torch.inference_mode(False), torch.no_grad():
                self._copy = copy.deepcopy(student).eval().requires_grad_(False)
                # Parameters only: rounded rotary frequencies would turn far positions astray.
                for parameter in self._copy.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
                join_(self._copy)
            self._version = version
        elif version != self._version:
            with torch.inference_mode(False), torch.no_grad():
                for target, source in zip(
                    self._copy.parameters(), student.parameters(), strict=True
                ):
                    if source.requires_grad:  # all else stays, e.g. below adapters
                        target.copy_(source)
            self._version = version
        return self._copy

    def rounded(self, student: nn.Module, version: object) -> Any:
        """The bfloat16 copy as it was last asked for, if it is still the student; else None.

        Args:
            student: The trained model.
            version: As of `model`.
        """
        current = version == self._version and not is_sharded(student)
        return self._copy if current and self.uses_copy(student) else None

    @property
    def holds_copy(self) -> bool:
        """Whether there is a copy, of whatever version."""
        return self._copy is not None

    def _whole(self, student: nn.Module, version: object) -> Any:
        if self._copy is None or version != self._version:
            with torch.inference_mode(False):
                whole = copy.deepcopy(self._empty) if self._copy is None else self._copy
                fill_(whole, student, torch.bfloat16 if self.uses_copy(student) else None)
                self._copy = whole.to(_device(student))  # the buffers
            self._version = version
        return self._copy

    def uses_copy(self, student: nn.Module) -> bool:
        """Whether this model is sampled from a bfloat16 copy on its device."""
        if self.dtype == "same" or next(student.parameters()).dtype != torch.float32:
            return False
        if getattr(student, "is_quantized", False):
            return False  # its layers read 4 bits and nothing else
        return self.dtype == "bfloat16" or has_native_bfloat16(_device(student))

    def forget(self) -> None:
        """Drop the copy, e.g. after weights were loaded."""
        self._copy = None


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Other AVX-512 multiplies bfloat16 no faster than float32.
        return any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
    return False


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
