"""vLLM's own transfer of weights: from GPU to GPU (NCCL), or inside one (CUDA's shared memory)."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import pickle
import socket
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor

from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.rollout.vllm.client import ServerFaultError, VLLMClient, found_at, several
from sdft_lightning.rollout.vllm.weights import Entry, Form, weights_index, weights_stream

TRANSFERS = ("nccl", "ipc")
_BUFFER_BYTES = 2**30  # of tensors that are sent at once; larger where a tensor is


def transfer_problem(backend: str, student: Any) -> str:
    """Why this trainer cannot send weights so; nothing where it can.

    Args:
        backend: nccl or ipc.
        student: The trained model.
    """
    if next(student.parameters()).device.type != "cuda":
        return "which sends from a GPU, where the student is not."
    if importlib.util.find_spec("vllm") is None:
        return "whose sender is part of vLLM, which is not installed beside the trainer."
    if backend == "ipc" and several():
        return "which serves trainers of one process."
    return ""


class WeightSync:
    """What vLLM's trainer engine asks of a server (its `VLLMWeightSyncClient`), over HTTP.

    Args:
        client: The server.

    Attributes:
        abort: Called when the server does not take the weights that are being sent, so that nobody
            waits for it any longer.
    """

    def __init__(self, client: VLLMClient) -> None:
        self.client = client
        self.abort: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell the server where the trainer waits for it."""
        self.client.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Tell it that weights will come."""
        self.client.post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Tell it which tensors come now, and wait until it has them."""
        try:
            self.client.post("/update_weights", {"update_info": _in_json(update_info)})
        except BaseException:
            self.abort()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell it that all weights have come."""
        version = {} if weight_version is None else {"weight_version": weight_version}
        self.client.post("/finish_weight_update", version)


def _in_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """Metadata of tensors in JSON; CUDA's handles of shared memory are pickled, as vLLM has it."""
    rest = dict(update_info)
    handles = rest.pop("ipc_handles", None)
    if handles is not None:
        rest["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
    return rest


class Transfer:
    """vLLM's trainer engine, connected with one server.

    Args:
        backend: nccl or ipc.
        client: The server.
        student: The trained model.
        form: How its weights are handed over.
        rank: Of this process; zero sends.

    Raises:
        ServerFaultError: If no connection comes about.
    """

    def __init__(
        self, backend: str, client: VLLMClient, student: Any, form: Form, rank: int
    ) -> None:
        self.student = student
        self._form = form
        self._source = _source(student, form)
        self._sync = WeightSync(client)
        self._engine: Any = None
        with self._faults(backend):
            index = weights_index(student, form)
            self._engine = _trainer_engine(backend, self._sync, self._source, index, rank)
        self._sync.abort = self.close
        self._backend = backend

    def send(self) -> None:
        """Send the present weights; all processes of a student that is spread over them at once.

        Raises:
            ServerFaultError: If the server does not take them.
        """
        self._source.left = None
        try:
            with self._faults(self._backend):
                self._engine.send_weights()
        finally:
            if is_sharded(self.student):  # other processes gather with this one, to the end
                for _ in self._source.left or weights_stream(self.student, self._form):
                    pass

    def close(self) -> None:
        """Give the connection up; whoever waits in it does so no longer."""
        with contextlib.suppress(RuntimeError):
            if self._engine is not None:
                self._engine.shutdown()

    @contextlib.contextmanager
    def _faults(self, backend: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of NCCL, or of the meeting with the server
            raise ServerFaultError(f"transfer by {backend}: {error}") from error


def _source(student: Any, form: Form) -> Any:
    """The student as vLLM's WeightSource, in the forms of vLLM 0.32 and of 0.33."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def metadata(self: Any) -> list[Any]:
        """Name, dtype and shape of each tensor."""
        index = weights_index(student, form)
        return [ParamMeta(each.name, each.dtype, each.shape) for each in index]

    def stream(self: Any) -> Iterator[tuple[str, Tensor]]:
        """The tensors, in that order."""
        self.left = weights_stream(student, form)
        return cast(Iterator[tuple[str, Tensor]], self.left)

    # A method in 0.32; in 0.33 a property, which vLLM wants to be computed once.
    as_method = callable(WeightSource.metadata)
    parts: dict[str, Any] = {
        "left": None,  # of the stream that was asked for last
        "metadata": metadata if as_method else cached_property(metadata),
        "__iter__": stream,
        "iter_full": stream,
    }
    return type("StudentWeights", (WeightSource,), parts)()


def _trainer_engine(
    backend: str, sync: WeightSync, source: Any, index: list[Entry], rank: int
) -> Any:
    """Let vLLM make the sender and meet the server."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    buffer = max(_BUFFER_BYTES, *(entry.nbytes for entry in index))
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        workers = found_at(sync.client, "/get_world_size", ("world_size",)) if rank == 0 else 0
        address = _own_address(sync.client.url)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        info = NCCLTrainerInitInfo(
            rank=rank,
            master_address=address,
            master_port=port,
            world_size=1 + int(workers),
            packed_buffer_size_bytes=buffer,
        )
    return WeightTransferTrainerFactory.trainer_init(info, client=sync, source=source)


def _own_address(url: str) -> str:
    """The address of this machine that a server sees.

    Raises:
        ServerFaultError: If the server cannot be reached.
    """
    found = urlsplit(url)
    port = found.port or (443 if found.scheme == "https" else 80)
    try:
        with socket.create_connection((str(found.hostname), port), timeout=10) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ServerFaultError(f"{url}: {error}") from error
