"""Parts of gpu_check.py about a device and single operations on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_common import (
    ROOT,
    Setting,
    SkippedError,
    WrongError,
    config_of,
    forget_peak,
    held_bytes,
    now,
    peak_bytes,
    random_model,
    random_tokens,
    seconds_of,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_PACKAGES = "torch transformers lightning torchao peft bitsandbytes flash-attn vllm trl".split()


def machine(setting: Setting) -> None:
    """Versions of what matters, and memory of the device."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    setting.figure("versions", python=platform.python_version(), **found)
    if setting.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        setting.figure(
            torch.cuda.get_device_name(),
            cuda=torch.version.cuda,
            capability=".".join(map(str, torch.cuda.get_device_capability())),
            gigabytes=total / 1e9,
            free_gigabytes=free / 1e9,
            devices=torch.cuda.device_count(),
        )
    setting.figure(
        "host", system=platform.platform(), cores=os.cpu_count(), threads=torch.get_num_threads()
    )


def tests(setting: Setting) -> None:
    """Run the tests that are marked gpu, in this process."""
    import pytest

    marked = sorted(
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    )
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        code = pytest.main([*options, *map(str, marked)])
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [each.get("name") for each in cases if {"failure", "error"} & {c.tag for c in each}]
    left_out = sum(each.find("skipped") is not None for each in cases)
    passed = len(cases) - len(failed) - left_out
    setting.figure("tests", passed=passed, failed=len(failed), skipped=left_out)
    if failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise WrongError(f"pytest ended with {code}; failed: {', '.join(map(str, failed))}")
    if not passed:
        raise SkippedError(f"each of the {left_out} tests needs a CUDA device")


# --- a token -------------------------------------------------------------------------------------


def token(setting: Setting) -> None:
    """What a token of 32 rows takes in our loop, by each way of appending it."""
    name, rows = setting.pick("7B", "tiny"), setting.pick(32, 4)
    prompt, tokens = setting.pick((512, 128), (12, 8))
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    config = config_of(name)
    model = random_model(config, dtype, setting.device).eval()
    ids = random_tokens(rows, prompt, config.vocab_size, setting.device)
    least = 0.0
    if setting.device == "cuda":  # from the data sheet of an H200: 4.8 TB/s
        least = 2 * sum(each.numel() for each in model.parameters()) / 4.8e12 * 1e3
    for way, sample in token_ways(model, ids, setting).items():
        sample(2)  # warm
        short, start = tokens // 2, now(setting.device)
        sample(short)
        middle = now(setting.device)
        sample(tokens)
        seconds = (now(setting.device) - middle) - (middle - start)
        forget_peak(setting.device)
        held = held_bytes(setting.device)
        # Both record a graph, so that their difference is of steps alone.
        first, second = (counted(partial(sample, count), setting.device) for count in (8, 12))
        setting.figure(
            f"{name}, {rows} rows behind {prompt} tokens, {way}",
            milliseconds=1e3 * seconds / (tokens - short),
            milliseconds_to_read_the_weights_on_an_H200=least,
            launches=(second[0] - first[0]) / 4,
            synchronisations=(second[1] - first[1]) / 4,
            gigabytes_beside_the_weights=(peak_bytes(setting.device) - held) / 1e9,
        )
        if setting.device == "cuda" and (second[1] - first[1]) / 4 > 1:
            raise WrongError(f"{way}: more than one synchronisation a token")


def token_ways(model: Any, ids: Tensor, setting: Setting) -> dict[str, Callable[[int], Any]]:
    """Functions that sample so many tokens of each row, by name; no row ends before."""
    from sdft_lightning.forward.fused import choose_decoding_
    from sdft_lightning.rollout import Sampling, generate_rollout
    from sdft_lightning.rollout.sampling import row_uniforms
    from sdft_lightning.types import Tokens

    prompts = Tokens(ids, torch.ones_like(ids).bool())
    names = [str(row) for row in range(len(ids))]

    def sample(kind: Any, tokens: int) -> Any:
        choose_decoding_(model, kind)
        numbers = row_uniforms(0, 0, names, 1, tokens)
        sampling = Sampling(max_new_tokens=tokens)
        return generate_rollout(model, prompts, sampling, numbers, [-1], 0)

    if setting.device == "cpu":
        return {"steps for CPUs": partial(sample, "graphs")}
    return {
        "buffers and graphs": partial(sample, "graphs"),
        "buffers": partial(sample, "eager"),
        "transformers' own calls": partial(sample, "transformers"),
    }


def counted(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """Launches and synchronisations of a call, as the profiler sees them.

    On a GPU a graph is one launch. On a CPU the operators count as launches, and each value that is
    read as a synchronisation.
    """
    from torch.profiler import ProfilerActivity, profile

    has_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_cuda
    with profile(activities=activities) as profiler:
        call()
        if has_cuda:
            torch.cuda.synchronize()
    launches = synchronisations = 0
    for event in profiler.events():
        name = event.name
        if has_cuda:
            launches += name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))
            synchronisations += name.startswith("cuda") and "Synchronize" in name
        else:
            launches += name.startswith(("aten::", "mkldnn::")) and event.cpu_parent is None
            synchronisations += name == "aten::_local_scalar_dense"
    return launches, synchronisations - has_cuda


# --- the loss ------------------------------------------------------------------------------------


def loss(setting: Setting) -> None:
    """Forward and backward of the loss in chunks of several sizes, all with the same value."""
    from sdft_lightning.losses.bounded import bounded_divergence, chunk_tokens
    from sdft_lightning.losses.divergence import Divergence
    from sdft_lightning.types import OutputHead

    tokens, vocabulary, width = setting.pick((2048, 152064, 3584), (64, 4096, 16))
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device, dtype=dtype)

    heads = [(0.02 * random(vocabulary, width)).requires_grad_() for _ in range(2)]
    states = [random(tokens, width).requires_grad_() for _ in range(2)]
    ids = random_tokens(1, tokens, vocabulary, setting.device)[0]
    weights = torch.full((tokens,), 1 / tokens, device=setting.device)
    values: list[float] = []

    def step(elements: int | None) -> None:
        heads[1].grad = states[1].grad = None
        found, _ = bounded_divergence(
            states[0].detach(),
            OutputHead(heads[0].detach(), None, 1.0, None),
            states[1],
            OutputHead(heads[1], None, 1.0, None),
            ids,
            weights,
            Divergence(),
            chunk_elements=elements,
        )
        found.backward()
        values.append(float(found.detach()))

    own = chunk_tokens(vocabulary, setting.device, known=True)
    sizes = dict.fromkeys([*setting.pick((16, 64, 256, 1024, 2048), (1, 16, 64)), own])
    for size in sorted(size for size in sizes if size <= tokens):
        elements = None if size == own else size * vocabulary
        held = held_bytes(setting.device)
        forget_peak(setting.device)
        seconds = seconds_of(lambda chunk=elements: step(chunk), setting.device, 3)
        setting.figure(
            f"N {tokens}, V {vocabulary}, D {width}, chunks of {size}" + " (ours)" * (size == own),
            milliseconds=1e3 * seconds,
            gigabytes_more=(peak_bytes(setting.device) - held) / 1e9,
            value=values[-1],
        )
    spread = (max(values) - min(values)) / abs(values[0])
    if not spread < setting.pick(2e-3, 1e-5):
        raise WrongError(f"the loss is another one in other chunks: {min(values)} to {max(values)}")


# --- attention -----------------------------------------------------------------------------------


def attention(setting: Setting) -> None:
    """One layer's attention, forward and backward, over rows of several lengths."""
    heads, groups, size = setting.pick((28, 4, 128), (4, 2, 8))
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    for length in setting.pick((1024, 2048, 4096, 8192), (16, 32)):
        rows = max(1, setting.pick(8192, 32) // length)
        generator = torch.Generator(setting.device).manual_seed(0)
        parts = [
            torch.randn(
                (rows, count, length, size),
                generator=generator,
                device=setting.device,
                dtype=dtype,
            ).requires_grad_()
            for count in (heads, groups, groups)
        ]
        seen = torch.ones(length, length, device=setting.device, dtype=torch.bool).tril()
        dense = torch.zeros(rows, 1, length, length, device=setting.device, dtype=dtype)
        dense.masked_fill_(~seen, torch.finfo(dtype).min)
        expected: list[Tensor] = []
        for way, call in attention_ways(parts, dense, setting.device).items():
            what = f"{rows} rows of {length} tokens, {way}"
            if isinstance(call, str):
                setting.figure(what, left_out=call)
                continue
            forget_peak(setting.device)
            held = held_bytes(setting.device)
            seconds = seconds_of(
                lambda run=call, given=parts: _both_ways(run, given), setting.device, 3
            )
            grads = [each.grad for each in parts]
            expected = expected or grads
            apart = max(
                float((mine - theirs).float().norm() / theirs.float().norm())
                for mine, theirs in zip(grads, expected, strict=True)
            )
            setting.figure(
                what,
                milliseconds=1e3 * seconds,
                gigabytes_more=(peak_bytes(setting.device) - held) / 1e9,
                gradients_apart=apart,
            )
            if not apart < setting.pick(3e-2, 1e-5):
                raise WrongError(f"{what}: gradients differ from those with a mask by {apart:.1e}")


def attention_ways(
    parts: list[Tensor], dense: Tensor, device: str
) -> dict[str, Callable[[], Tensor] | str]:
    """Attention `(R, H, L, E)` of queries, keys and values by name, or why there is none."""
    query, key, value = parts

    def by_lengths() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows, _, length, _ = query.shape
        ends = torch.arange(rows + 1, device=device, dtype=torch.int32) * length  # (R + 1,)
        flat = [each.transpose(1, 2).flatten(0, 1) for each in parts]  # (R · L, H, E)
        found = varlen_attn(*flat, ends, ends, length, length, window_size=(-1, 0), enable_gqa=True)
        return found.unflatten(0, (rows, length)).transpose(1, 2)

    def with_mask() -> Tensor:  # as transformers calls it
        repeats = query.shape[1] // key.shape[1]
        wide = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        return scaled_dot_product_attention(query, *wide, attn_mask=dense)

    def without() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    no_lengths = "torch computes attention by lengths on CUDA devices only"
    return {
        "a dense mask, keys repeated": with_mask,
        "no mask": without,
        "lengths": by_lengths if device == "cuda" else no_lengths,
    }


def _both_ways(call: Callable[[], Tensor], parts: list[Tensor]) -> None:
    for each in parts:
        each.grad = None
    found = call()
    found.backward(torch.ones_like(found))
