"""What a step takes is printed before a model is loaded, and what cannot fit is refused there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.memory import MemorySetting, plan_memory
from sdft_lightning.modules import run_checks, student_checks
from sdft_lightning.modules.student_checks import DeviceMemory, average_bytes, device_memory
from sdft_lightning.rollout.vllm.engine import VLLMEngine

CONFIGS = Path(__file__).parents[2] / "configs"
H200 = DeviceMemory(141 * 10**9, 141 * 10**9)
Check = Callable[..., MemorySetting]


@pytest.fixture(scope="module")
def folder_of_7b(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, config_of_7b: Any
) -> Path:
    """A folder with the sizes of Qwen2.5-7B-Instruct, a small tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("shape") / "model"
    config_of_7b.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[DeviceMemory], None]:
    """Put a GPU of some size in the place of the device."""

    def replace_device(memory: DeviceMemory) -> None:
        for place in (run_checks, student_checks):
            monkeypatch.setattr(place, "device_memory", lambda device: memory)

    return replace_device


@pytest.fixture
def check(
    folder_of_7b: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: Callable[[DeviceMemory], None],
    run_cli: Callable[..., None],
) -> Check:
    """Check the paper's run on a stand-in for one H200, with rows as long as its config allows."""
    stand_in(H200)
    monkeypatch.setattr(student_checks, "has_native_bfloat16", lambda device: True)
    monkeypatch.setattr(VLLMEngine, "check", lambda self, sampling, quantized: None)
    row = {"prompt": "x" * 1990, "golden_response": ["y" * 2000], "golden_answer": []}
    path = write_rows([{**row, "prompt": row["prompt"] + str(place)} for place in range(32)])

    def run(*options: str, config: str = "paper_tooluse", device: str = "cuda") -> MemorySetting:
        seen: list[Any] = []

        def caught(module: Any, data: Any, trainer: Any) -> None:
            seen.extend([module, data, trainer])
            raise UserError("caught")

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(run_checks, "check_memory", caught)
            with pytest.raises(SystemExit):
                run_cli(
                    *("fit", f"--config={CONFIGS / config}.yaml"),
                    *(f"--model.policy.name={folder_of_7b}", f"--run.root={tmp_path}"),
                    *(f"--data.train={path}", f"--data.validation={path}", "--data.grader=null"),
                    *("--trainer.accelerator=cpu", "--trainer.logger=false", *options),
                )
        module, data, trainer = seen
        trainer.strategy._root_device = torch.device("cuda:0" if device == "cuda" else device)
        run_checks.check_memory(module, data, trainer)
        return student_checks.memory_setting(module, data, trainer)

    return run


def test_paper_config_fits_one_h200_with_a_tenth_to_spare(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = check()
    plan = plan_memory(setting)
    assert (setting.batch, setting.accumulate, setting.new_tokens) == (4, 8, 1024)
    assert 2000 < setting.prompt <= 2048
    assert 4000 < setting.teacher_prompt <= 5120
    assert setting.average_bytes == pytest.approx(2.03, abs=0.01)
    assert not setting.foreach
    assert plan.certain == pytest.approx(10.03 * 7_615_616_512, rel=1e-3)
    assert plan.peak <= 0.9 * 141e9
    printed = capsys.readouterr().out
    assert "teacher, an average in float32           30.46  exact" in printed
    assert "most at once" in printed


def test_with_vllm_in_the_same_process_it_still_does(check: Check) -> None:
    setting = check(f"--config={CONFIGS / 'model' / 'vllm.yaml'}")
    assert setting.engine_bytes == int(0.25 * 141e9)
    assert not setting.samples
    assert plan_memory(setting).peak <= 0.9 * 141e9


def test_adapters_of_the_lora_config_fit_48_gb(check: Check) -> None:
    plan = plan_memory(check(config="paper_tooluse_lora"))
    assert plan.certain < 17e9
    assert plan.peak <= 0.9 * 48e9


OLD = ("--model.policy.weights_dtype=float32", "--model.optimizer=torch.optim.AdamW")


def test_float32_with_adamw_is_refused_with_what_would_make_it_fit(check: Check) -> None:
    with pytest.raises(UserError) as told:
        check(*OLD)
    message = str(told.value)
    assert "cuda:0 has 141.0 GB" in message
    assert "alone take 167.5 GB" in message  # 22 bytes a weight: 20, and the copy to sample with
    assert "preset:model/low_memory behind the other files saves " in message
    assert "--model.policy.lora.r=8 saves " in message
    fits = [part for part in message.split(";") if " fit" in part]
    assert any("preset:model/low_memory" in part for part in fits)
    assert "--model.optimizer.init_args.fused=true saves 20.3 GB" in message  # of the peak


def test_remedy_that_is_named_makes_the_plan_that_it_promises(check: Check) -> None:
    with pytest.raises(UserError) as told:
        check(*OLD)
    promised = str(told.value).split("preset:model/low_memory behind the other files saves ")[1]
    setting = check()
    low = plan_memory(setting)
    assert f"and {low.peak / 1e9:.1f} GB fit" in promised.split(";")[0]


def test_what_may_be_too_much_is_told_and_not_refused(
    check: Check, stand_in: Callable[[DeviceMemory], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(DeviceMemory(80 * 10**9, 80 * 10**9))
    setting = check()
    told = capsys.readouterr().err
    plan = plan_memory(setting)
    assert plan.certain < 80e9 < plan.peak
    assert "memory: cuda:0 has 80.0 GB free, and a step of the longest rows takes" in told
    assert "--data.batch_size=2 --trainer.accumulate_grad_batches=16 saves" in told


def test_on_a_cpu_only_what_no_memory_of_the_machine_holds_is_refused(
    check: Check, stand_in: Callable[[DeviceMemory], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(DeviceMemory(8 * 10**9, 80 * 10**9))
    check(device="cpu")
    assert "memory: cpu has 8.0 GB free" in capsys.readouterr().err
    stand_in(DeviceMemory(8 * 10**9, 70 * 10**9))
    with pytest.raises(UserError, match=r"cpu has 70\.0 GB, and .* alone take 76\.4 GB"):
        check(device="cpu")


def test_a_device_that_tells_nothing_is_not_compared_with(
    check: Check, stand_in: Callable[[DeviceMemory], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(DeviceMemory(None, None))
    check(*OLD)
    assert "free on the device" not in capsys.readouterr().out


def test_a_run_prints_the_plan_before_it_loads_the_model(
    run_cli: Callable[..., None],
    fit_args: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("loaded")

    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", refuse)
    with pytest.raises(SystemExit):
        run_cli(*fit_args)
    printed = capsys.readouterr()
    assert "Memory of a step, computed" in printed.out
    assert "loaded" in printed.err


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW, 8.0),
        (partial(torch.optim.AdamW, amsgrad=True), 12.0),
        (torch.optim.SGD, 0.0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4.0),
        (torch.optim.LBFGS, None),  # asks for a closure
    ],
)
def test_what_an_optimizer_keeps_is_seen_by_a_step(optimizer: Any, expected: float | None) -> None:
    assert average_bytes(optimizer, torch.float32) == expected


@pytest.mark.parametrize(("eight_bit", "expected"), [(True, 2.03125), (False, 4.0)])
def test_averages_in_8_bits_are_counted_with_their_scales(eight_bit: bool, expected: float) -> None:
    pytest.importorskip("torchao")
    from sdft_lightning.models.low_memory import LowMemoryAdamW

    optimizer = partial(LowMemoryAdamW, eight_bit=eight_bit)
    assert average_bytes(optimizer, torch.bfloat16) == expected


def test_memory_of_this_machine_is_read() -> None:
    found = device_memory(torch.device("cpu"))
    assert found.total is not None
    assert found.total > 2**29
    if found.free is not None:
        assert 0 < found.free <= found.total


def test_memory_of_a_gpu_counts_what_this_process_holds_as_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    assert device_memory(torch.device("cuda", 0)) == DeviceMemory(120, 1000)
    assert device_memory(torch.device("meta")) == DeviceMemory(None, None)


def test_ddp_holds_a_copy_of_the_gradients_unless_its_buckets_are_these(check: Check) -> None:
    plain = check("--trainer.strategy=ddp", device="cpu")
    assert (plain.buckets, plain.buckets_are_gradients) == (True, False)
    here = ("--trainer.accelerator=cpu", "--trainer.devices=1")
    views = check(f"--config={CONFIGS / 'trainer' / 'ddp.yaml'}", *here, device="cpu")
    assert (views.buckets, views.buckets_are_gradients) == (False, True)
