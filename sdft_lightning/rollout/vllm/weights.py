"""The student's weights on their way to vLLM: a stream, or a folder that the stream is written to.

`weights_stream` gathers, merges and casts one parameter at a time; whoever hands weights over takes
them from it. A folder reaches vLLM everywhere: its own worker method `reload_weights` reads it.
Nothing but safetensors is passed there, and no code of ours runs inside vLLM.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.shared_memory import new_weights_folder, remove_weights_folder
from sdft_lightning.files.whole_files import raise_user_error
from sdft_lightning.models.lora import adapter_identity, effective_weights, save_adapter
from sdft_lightning.models.randomness import base_config
from sdft_lightning.models.sharding import gathered, is_sharded
from sdft_lightning.rollout.vllm.client import on_rank_zero, own_rank

EngineDtype = Literal["bfloat16", "float16", "float32"]
_FILE_BYTES = 4 * 10**9  # of one file of weights, which is held in memory while it is written


class Form(NamedTuple):
    """How the weights are handed over.

    Attributes:
        dtype: Of vLLM's weights.
        own_head: The output head is a tensor of its own also where the model ties it to its
            embedding, for a vLLM that was told not to tie them.
        merge: Adapters are added to the weights; else the base model's are meant.
    """

    dtype: torch.dtype
    own_head: bool = False
    merge: bool = True


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def weights_stream(student: Any, form: Form) -> Iterator[tuple[str, Tensor]]:
    """Gather, merge and cast the student's weights, one parameter after the other.

    Names and tensors are those that the model has on the Hub, which vLLM knows. Where several
    parameters make one of these (fused experts, say), those of one layer are held at once.

    Args:
        student: The trained model. All processes of one that is spread over them must go through
            the whole stream at the same time.
        form: How they are handed over.

    Yields:
        Name and tensor, in the order of `weights_index`, on the student's device. A tensor that
        needs no cast is the student's own: read it before the weights move.
    """
    readers = _readers(student, form)
    for names, hub_names in _groups(student, form):
        with torch.no_grad():
            tensors = _as_on_the_hub(student, {name: gathered(readers[name]()) for name in names})
        for name in hub_names:
            yield name, tensors.pop(name).detach().contiguous()


def weights_index(student: Any, form: Form) -> list[Entry]:
    """Names, shapes and dtypes of what `weights_stream` yields, in its order; reads no weight."""
    return [
        Entry(name, tuple(tensor.shape), tensor.dtype)
        for _, hub in _groups(student, form)
        for name, tensor in hub.items()
    ]


def _readers(student: Any, form: Form) -> dict[str, Any]:
    """What reads each tensor, by its name in the model; all have a shape."""
    readers: dict[str, Any] = dict(effective_weights(student, form.dtype, form.merge))
    for prefix, part in student.named_modules():
        for own, buffer in part.named_buffers(recurse=False):
            if own not in part._non_persistent_buffers_set:
                readers[f"{prefix}.{own}" if prefix else own] = _Buffer(buffer, form.dtype)
    if form.own_head and ties_head(student):
        embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
        (inner,) = (name for name, part in student.named_modules() if part is embedding)
        (outer,) = (name for name, part in student.named_modules() if part is head)
        readers[f"{outer}.weight"] = readers[f"{inner}.weight"]
    return readers


class _Buffer(NamedTuple):
    """Reads a buffer that belongs to the saved weights."""

    buffer: Tensor
    wanted: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.buffer.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.wanted if self.buffer.is_floating_point() else self.buffer.dtype

    def __call__(self) -> Tensor:
        return self.buffer.to(self.dtype)


def _as_on_the_hub(student: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names and in the parts that the model has on the Hub."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(student, tensors)
    return found


def _groups(student: Any, form: Form) -> list[tuple[list[str], dict[str, Tensor]]]:
    """Parameters that are read together, with what comes of them on the Hub (on the meta device).

    They are read one by one, or by layers, or all at once: the first of these that gives what the
    whole model gives.
    """
    empty = {
        name: torch.empty(tuple(read.shape), dtype=read.dtype, device="meta")
        for name, read in _readers(student, form).items()
    }
    whole = _shapes(_as_on_the_hub(student, dict(empty)))
    keys: tuple[Callable[[str], str], ...] = (str, _layer)
    for key in keys:
        names: dict[str, list[str]] = {}
        for name in empty:
            names.setdefault(key(name), []).append(name)
        try:
            groups = [
                (each, _as_on_the_hub(student, {name: empty[name] for name in each}))
                for each in names.values()
            ]
        except Exception:  # a conversion wants more than these
            continue
        parts = [item for _, hub in groups for item in _shapes(hub).items()]
        if len(parts) == len(whole) and dict(parts) == whole:
            return groups
    return [(list(empty), _as_on_the_hub(student, dict(empty)))]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _layer(name: str) -> str:
    """The part of a parameter's name down to its layer's number; the whole name without one."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[0] + 1]) if places else name


def ties_head(student: Any) -> bool:
    """Whether the output head is the embedding."""
    head = student.get_output_embeddings()
    return bool(head.weight is student.get_input_embeddings().weight)


# --- adapters ------------------------------------------------------------------------------------

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM can be started for


def vllm_rank(student: Any) -> int | None:
    """The rank that vLLM must be started for to take the student's adapters as they are.

    Returns:
        None for a student without adapters, or with more than vLLM takes.
    """
    identity = adapter_identity(student)
    if identity is None:
        return None
    return next((rank for rank in _RANKS if rank >= identity["r"]), None)


def check_adapters(student: Any) -> None:
    """Refuse a student without adapters, or with a rank that vLLM does not know.

    Raises:
        UserError: Names the option.
    """
    if vllm_rank(student) is not None:
        return
    identity = adapter_identity(student)
    if identity is None:
        raise UserError(
            "model.engine.transport: got adapters, but the student has none (model.policy.lora). "
            "Leave the option out: auto hands over whole weights then."
        )
    raise UserError(
        f"model.policy.lora.r: got {identity['r']}, vLLM takes adapters of rank {_RANKS[-1]} and "
        "less. Give a smaller one, or another model.engine.transport, which adds them to the "
        "weights."
    )


def adapters_refused(source: str, told: str, other: str) -> UserError:
    """What is said of a vLLM that does not take the adapters.

    Args:
        source: Which vLLM.
        told: Its words.
        other: The transport to use instead.
    """
    return UserError(
        f"model.engine: {source} did not load the student's adapters: {printable(told)} Give "
        f"--model.engine.transport={other}, which adds them to the weights, or adapt other layers "
        "(model.policy.lora.target_modules)."
    )


# --- folders -------------------------------------------------------------------------------------


class WeightsFolder:
    """Writes each version of the weights to a folder of its own; only the newest stays.

    A version is never written over: vLLM may still have the file of the last one mapped.

    Args:
        parent: Where they are written; /dev/shm or the system's temporary folder without it.

    Attributes:
        bytes_written: Size of the newest version.
    """

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self.bytes_written = 0
        self._folder: Path | None = None
        self._end: Callable[[], object] = lambda: None
        self._versions = 0

    def write(self, student: Any, form: Form) -> Path:
        """Write the present weights; in a run of several processes, rank zero's for all.

        Args:
            student: The trained model.
            form: How they are handed over.

        Returns:
            A `save_pretrained` folder without tokenizer.

        Raises:
            UserError: If there is no room.
        """
        stream = weights_stream(student, form)
        gathers = stream if is_sharded(student) else ()
        return self._shared(lambda folder: write_weights(student, folder, form, stream), gathers)

    def write_adapters(self, student: Any, dtype: torch.dtype) -> Path:
        """Write the adapters alone, as a folder of peft; else as `write`."""
        return self._shared(lambda folder: save_adapter(student, folder, "student", dtype=dtype))

    def remove(self) -> None:
        """Remove all that was written."""
        self._end()
        self._folder = None

    def _shared(
        self, write: Callable[[Path], None], gathers: Iterable[tuple[str, Tensor]] = ()
    ) -> Path:
        # Rank zero alone writes; all ranks have the same weights.
        def attempt() -> Path:
            try:
                return self._write(write)
            finally:
                _go_through(gathers)  # all processes to the end, also after an error

        if own_rank() > 0:
            _go_through(gathers)
        return on_rank_zero(attempt)

    def _write(self, write: Callable[[Path], None]) -> Path:
        self._versions += 1
        folder = self._root() / f"weights-{self._versions}"
        try:
            folder.mkdir(parents=True)
            write(folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise_user_error(error, folder)
            raise
        self.bytes_written = sum(file.stat().st_size for file in folder.iterdir())
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


def _go_through(stream: Iterable[tuple[str, Tensor]]) -> None:
    for _ in stream:
        pass


def write_weights(
    model: Any, folder: Path, form: Form, stream: Iterator[tuple[str, Tensor]] | None = None
) -> None:
    """Write a `save_pretrained` folder without tokenizer.

    Args:
        model: A causal language model of transformers.
        folder: Made if absent.
        form: How the weights are handed over.
        stream: `weights_stream(model, form)`, if the caller goes on with it after an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(model, folder, form.dtype)
    files = _files(weights_index(model, form))
    stream = weights_stream(model, form) if stream is None else stream
    for file, entries in files.items():
        tensors: dict[str, Tensor] = {}
        for _ in entries:
            name, tensor = next(stream)
            known = {other.data_ptr() for other in tensors.values()}
            tensor = tensor.to("cpu")
            tensors[name] = tensor.clone() if tensor.data_ptr() in known else tensor  # a tied head
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {entry.name: file for file, entries in files.items() for entry in entries}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Which tensors stand in which file."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        size += entry.nbytes
        if parts[-1] and size > _FILE_BYTES:
            parts.append([])
            size = entry.nbytes
        parts[-1].append(entry)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{place:05d}-of-{len(parts):05d}.safetensors": part
        for place, part in enumerate(parts, start=1)
    }


def write_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the config of the model as vLLM is to run it: whole weights of a dtype.

    Args:
        model: A causal language model of transformers.
        folder: An existing folder.
        dtype: Of vLLM's weights.
    """
    with base_config(model):
        config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # its name when sharded
    config.dtype = dtype
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)
