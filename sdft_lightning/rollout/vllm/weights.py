"""The student's weights as a folder that vLLM loads: how they reach another process.

vLLM's own worker method `reload_weights` reads them from there, in one process or behind a server
alike. Nothing but safetensors is passed, and no code of ours runs inside vLLM.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from sdft_lightning.errors import UserError
from sdft_lightning.files.shared_memory import new_weights_folder, remove_weights_folder
from sdft_lightning.files.whole_files import raise_user_error
from sdft_lightning.models.lora import is_adapted, merged_copy
from sdft_lightning.models.randomness import base_config
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.rollout.engine import whole_weights_wanted

EngineDtype = Literal["bfloat16", "float16", "float32"]


class WeightsFolder:
    """Writes each version of the weights to a folder of its own; only the newest stays.

    A version is never written over: vLLM may still have the file of the last one mapped.

    Args:
        parent: Where they are written; /dev/shm or the system's temporary folder without it.
        dtype: Of the weights in the files, which is vLLM's.
    """

    def __init__(self, parent: str | None, dtype: EngineDtype) -> None:
        self.parent = parent
        self.dtype: EngineDtype = dtype
        self._folder: Path | None = None
        self._end: Callable[[], object] = lambda: None
        self._versions = 0

    def write(self, student: Any, own_head: bool) -> Path:
        """Write the present weights; in a run of several processes, rank zero's for all.

        Args:
            student: The trained model, not spread over processes.
            own_head: Write the output head as a tensor of its own also where the model ties it to
                its embedding, for a vLLM that was told not to tie them.

        Returns:
            A `save_pretrained` folder without tokenizer.

        Raises:
            UserError: If there is no room, or the weights are spread over processes.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._write(student, own_head)
        # transformers lets rank zero alone save a model; all ranks have the same weights.
        found: list[str | None] = [None, None]  # folder, error
        if dist.get_rank() == 0:
            try:
                found[0] = str(self._write(student, own_head))
            except UserError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            raise UserError(str(found[1]))
        return Path(found[0])

    def remove(self) -> None:
        """Remove all that was written."""
        self._end()
        self._folder = None

    def _write(self, student: Any, own_head: bool) -> Path:
        if is_sharded(student):
            raise whole_weights_wanted()
        model = merged_copy(student) if is_adapted(student) else student
        self._versions += 1
        folder = self._root() / f"weights-{self._versions}"
        try:
            write_weights(model, folder, getattr(torch, self.dtype), own_head)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise_user_error(error, folder)
            raise
        for old in self._root().glob("weights-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def _root(self) -> Path:
        if self._folder is None:
            parent = Path(self.parent) if self.parent else None
            if parent is not None and not parent.is_dir():
                raise UserError(
                    f"model.engine.exchange_folder: there is no folder {parent}. Make it, or leave "
                    "the option out."
                )
            self._folder, lock = new_weights_folder(parent)
            # Memory is not given back by itself when a run ends with an error.
            self._end = weakref.finalize(self, remove_weights_folder, self._folder, lock)
            # A server may run as another user; weights are no secret from it.
            self._folder.chmod(0o755)
        return self._folder


@torch.no_grad()
def write_weights(model: Any, folder: Path, dtype: torch.dtype, own_head: bool) -> None:
    """Write a `save_pretrained` folder without tokenizer.

    Args:
        model: A causal language model of transformers.
        folder: Made if absent.
        dtype: Of the weights in the files.
        own_head: See `WeightsFolder.write`.
    """
    # transformers gives the tensors the names that the model has on the Hub, which vLLM knows.
    # One file, however large: vLLM then needs no index, which would not name the head.
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    with base_config(model):
        model.save_pretrained(folder, state_dict=state, max_shard_size="10000GB")
    if own_head and ties_head(model):
        head = model.get_output_embeddings()
        (name,) = (name for name, part in model.named_modules() if part is head)
        tensor = head.weight.detach().to("cpu", dtype).clone()
        save_file(
            {f"{name}.weight": tensor}, folder / "head.safetensors", metadata={"format": "pt"}
        )


def ties_head(model: Any) -> bool:
    """Whether the output head is the embedding."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
