"""Parts of gpu_check.py about others: weights for another sampler, and TRL's trainer."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from gpu_common import (
    ROOT,
    Setting,
    SkippedError,
    WrongError,
    config_of,
    now,
    random_model,
    write_model,
)

# --- hand-over of weights -----------------------------------------------------------------------


class Transport(NamedTuple):
    """A way in which weights reach a sampler.

    Attributes:
        name: What it is called.
        missing: Why it cannot be tried here; nothing where it can.
        run: Hands a model over; returns figures, its seconds among them.
    """

    name: str
    missing: Callable[[], str]
    run: Callable[[Setting, Any], dict[str, Any]]


def _by_folder(setting: Setting, model: Any) -> dict[str, Any]:
    """Write a folder, and read it as a sampler would.

    Raises:
        WrongError: If other weights arrive.
    """
    from safetensors.torch import load_file

    from sdft_lightning.rollout.vllm.weights import Form, WeightsFolder

    folder = WeightsFolder(None)
    try:
        start = now(setting.device)
        path = folder.write(model, Form(torch.bfloat16))
        written = now(setting.device)
        found = {
            name: tensor
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file, device=setting.device).items()
        }
        read = now(setting.device)
    finally:
        folder.remove()
    size = _checked("folder", model, found)
    return {
        "seconds": read - start,
        "seconds_to_write": written - start,
        "gigabytes": size / 1e9,
    }


def _by_stream(setting: Setting, model: Any) -> dict[str, Any]:
    """Take every parameter from the stream, as a vLLM in the same process does.

    Raises:
        WrongError: If other weights arrive.
    """
    from sdft_lightning.rollout.vllm.weights import Form, weights_stream

    form = Form(torch.bfloat16)
    start = now(setting.device)
    for _ in weights_stream(model, form):
        pass
    seconds = now(setting.device) - start
    size = _checked("stream", model, dict(weights_stream(model, form)))
    return {"seconds": seconds, "gigabytes": size / 1e9}


def _checked(transport: str, model: Any, found: dict[str, torch.Tensor]) -> int:
    """Bytes of what has arrived, once it is seen to be the model's weights."""
    wrong = [
        name
        for name, tensor in model.named_parameters()
        if name not in found or not torch.equal(found[name], tensor.detach().to(torch.bfloat16))
    ]
    if wrong:
        text = f"{transport}: {len(wrong)} tensors did not arrive whole, e.g. {wrong[0]}"
        raise WrongError(text)
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _by_vllm(setting: Setting, model: Any) -> dict[str, Any]:
    """Start vLLM in this process and give it weights twice."""
    from sdft_lightning.rollout.vllm.engine import VLLMEngine

    engine, seconds = VLLMEngine(enforce_eager=True, max_model_len=2048), []
    try:
        for step in range(3):
            start = now(setting.device)
            engine.refresh(model, step)
            seconds.append(now(setting.device) - start)
    finally:
        engine.close()
    return {"seconds": seconds[2], "seconds_to_start": seconds[0]}


def _no_vllm() -> str:
    return "" if importlib.util.find_spec("vllm") else "vllm is not installed (extra vllm)"


TRANSPORTS = (
    Transport("folder, written and read", lambda: "", _by_folder),
    Transport("stream, taken parameter by parameter", lambda: "", _by_stream),
    Transport("vLLM in this process, by its own choice of a transport", _no_vllm, _by_vllm),
)


def hand_over(setting: Setting) -> None:
    """Give a sampler the weights of a model, by each transport that can be tried here."""
    name = setting.pick("7B", "tiny")
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    model = random_model(config_of(name), dtype, setting.device)
    for transport in TRANSPORTS:
        what = f"{name}, {transport.name}"
        missing = transport.missing()
        if missing:
            setting.figure(what, left_out=missing)
        else:
            setting.figure(what, **transport.run(setting, model))


# --- beside TRL ---------------------------------------------------------------------------------


def trl(setting: Setting) -> None:
    """Our step and that of TRL's SDFTTrainer, by the workers of `make perf`."""
    if importlib.util.find_spec("trl") is None:
        raise SkippedError("trl is not installed (extra perf)")
    sys.path.insert(0, str(ROOT / "tests" / "perf"))
    from processes import Side, run, seconds_of
    from workload import Workload

    with tempfile.TemporaryDirectory() as home:
        folder = write_model(Path(home) / "model", config_of(setting.pick("0.5B", "tiny")))
        sizes = Workload(
            model=str(folder),
            device=setting.device,
            precision="bf16" if setting.device == "cuda" else "float32",
            micro_batch=setting.pick(16, 2),
            prompt_tokens=setting.pick(256, 60),
            demonstration_tokens=setting.pick(128, 20),
            new_tokens=setting.pick(128, 4),
            steps=setting.pick(4, 2),
        )
        sides = [
            Side("ours", "ours.py", ["sdft", sizes.dump()]),
            Side("TRL", "trl_step.py", [sizes.dump()]),
        ]
        results = {side.name: run(side) for side in sides}
    for name, result in results.items():
        phases = {phase: median(values) for phase, values in result["phases"].items() if values}
        setting.figure(
            f"{name}, {sizes.micro_batch} prompts, {sizes.new_tokens} new tokens",
            seconds=seconds_of(result),
            peak_gigabytes=result["peak_gigabytes"],
            **{f"{phase}_seconds": value for phase, value in phases.items()},
        )
    both = {name: seconds_of(result) for name, result in results.items()}
    setting.figure("ours / TRL", ratio=both["ours"] / both["TRL"])
