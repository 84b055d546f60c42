"""Strategies by name: what fsdp2 sets, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from sdft_lightning.errors import UserError
from sdft_lightning.models.sharding import FSDP2Strategy, check_strategy

DEEPSPEED = "lightning.pytorch.strategies.DeepSpeedStrategy"


def with_class(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("fsdp", "fsdp is FSDP 1"),
        ("fsdp_cpu_offload", "fsdp_cpu_offload is FSDP 1"),
        (with_class("lightning.pytorch.strategies.FSDPStrategy"), "FSDP 1"),
        (
            with_class("lightning.pytorch.strategies.ModelParallelStrategy"),
            "save_distributed_checkpoint is true, allowed is false",
        ),
        ("deepspeed", "got deepspeed; DeepSpeed is not supported"),
        ("deepspeed_stage_3_offload", "got deepspeed_stage_3_offload; DeepSpeed"),
        (with_class(DEEPSPEED, stage=2), "DeepSpeed is not supported"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(strategy: Any, words: str) -> None:
    with pytest.raises(
        UserError, match=r"^trainer\.strategy: .*--trainer\.strategy=fsdp2"
    ) as error:
        check_strategy(strategy)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "fsdp2",
        None,
        FSDP2Strategy(),
        with_class("sdft_lightning.models.sharding.FSDP2Strategy", timeout=None),
        with_class(
            "lightning.pytorch.strategies.ModelParallelStrategy", save_distributed_checkpoint=False
        ),
    ],
)
def test_what_works_is_let_through(strategy: Any) -> None:
    check_strategy(strategy)


def test_fsdp2_takes_all_devices_of_all_nodes_and_writes_one_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy = StrategyRegistry.get("fsdp2")
    assert isinstance(strategy, FSDP2Strategy)
    strategy.num_nodes, strategy.parallel_devices = 3, [object()] * 4
    parent = FSDP2Strategy.__mro__[1]
    monkeypatch.setattr(parent, "setup_environment", lambda self: None)
    strategy.setup_environment()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (12, 1)
    assert strategy._save_distributed_checkpoint is False


def test_the_command_line_refuses_stage_3_before_it_loads_anything(
    run_cli: Callable[..., None], fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, "--trainer.strategy=deepspeed_stage_3", "--model.policy.name=nowhere")
    assert stop.value.code == 2
    assert "trainer.strategy: got deepspeed_stage_3" in capsys.readouterr().err
