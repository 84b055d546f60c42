"""A canary: what this package uses of its libraries without their promise is still there.

pyproject.toml holds Lightning and lm_eval below the next release for these names. Whoever raises a
ceiling runs this first.
"""

from __future__ import annotations

import ast
import inspect
import operator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "sdft_lightning"

# Names by what has them; what stands after a dot is an attribute of an attribute.
LIGHTNING = {
    "trainer": {
        "_accelerator_connector.cluster_environment",
        "_logger_connector._first_loop_iter",
        "_signal_connector.received_sigterm",
        "_val_check_time_interval",
        "fit_loop._data_fetcher",
        "fit_loop._should_accumulate",
        "fit_loop.epoch_loop._should_check_val_fx",
        "fit_loop.epoch_loop.batch_progress.current.processed",
        "fit_loop.epoch_loop.val_loop.run",
        "strategy.launcher",
        "strategy.reduce_boolean_decision",
    },
    "checkpoint": {
        "_monitor_candidates",
        "_should_remove_checkpoint",
        "_should_save_on_train_epoch_end",
        "_train_time_interval",
    },
    "ddp": {"_ddp_kwargs"},
    "fsdp2": {"_save_distributed_checkpoint"},
    "launcher": {"_start_method"},
    "module": {"_trainer"},
    "cli": {
        "_get",
        "_instantiate_trainer",
        "_parse_ckpt_path",
        "_prepare_subcommand_parser",
    },
    "parser": {"_actions", "_action_groups"},
}
# Asked for with a default, or set by an instance only: the text of the class is looked at.
IN_SOURCE = {"cli": {"_subcommand_method_arguments"}}
# Of other libraries: torch (tried when it is there), torchmetrics, transformers, the standard one.
OTHERS = {
    "_DropoutNd",
    "_asdict",
    "_attn_implementation",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_buffers",
    "_defaults",
    "_exit",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_group_actions",
    "_is_mkldnn_bf16_supported",
    "_linear_pointwise",
    "_non_persistent_buffers_set",
    "_reorder_linear_weight",
    "_replace",
    "_softmax_backward_data",
}
HARNESS = {"lm_eval.tasks._yaml_loader": {"_make_loader", "load_yaml"}}


@pytest.fixture(scope="module")
def owners() -> dict[str, Any]:
    """One object or class for each name in `LIGHTNING`."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    return {
        "trainer": trainer,
        "checkpoint": ModelCheckpoint(),
        "ddp": DDPStrategy(),
        "fsdp2": ModelParallelStrategy(),
        "launcher": _MultiProcessingLauncher(trainer.strategy, start_method="fork"),
        "module": L.LightningModule(),
        "cli": LightningCLI,
        "parser": LightningArgumentParser(),
    }


@pytest.mark.parametrize("owner", LIGHTNING)
def test_lightning_has_its_private_names_still(owner: str, owners: dict[str, Any]) -> None:
    for name in sorted(LIGHTNING[owner]):
        operator.attrgetter(name)(owners[owner])  # an AttributeError names what is missing
    for name in IN_SOURCE.get(owner, ()):
        assert name in inspect.getsource(owners[owner])


def test_what_is_overridden_is_called_with_the_same_arguments(owners: dict[str, Any]) -> None:
    from sdft_lightning.callbacks import WindowCheckpoint
    from sdft_lightning.cli import SDFTCLI

    for ours, theirs in (
        (WindowCheckpoint, type(owners["checkpoint"])),
        (SDFTCLI, owners["cli"]),
    ):
        overridden = [name for name in vars(ours) if name.startswith("_") and name[1] != "_"]
        both = [name for name in overridden if callable(getattr(theirs, name, None))]
        assert both
        for name in both:
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(
                inspect.signature(getattr(theirs, name)).parameters
            ), name


def test_the_harness_has_its_private_names_still() -> None:
    from importlib import import_module

    for module, names in HARNESS.items():
        for name in names:
            assert callable(getattr(import_module(module), name))


def foreign_private_names() -> set[str]:
    """Private attributes that the package reads and does not define."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {
        *(each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)),
        *(each.id for each in nodes if isinstance(each, ast.Name)),
        *(n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)),
    }
    read = {each.attr for each in nodes if isinstance(each, ast.Attribute)}
    imported = {
        alias.name
        for each in nodes
        if isinstance(each, ast.ImportFrom) and "sdft_lightning" not in str(each.module)
        for alias in each.names
    }
    private = {name for name in (read - defined) | imported if name.startswith("_")}
    return {name for name in private if not name.startswith("__")}


def test_every_private_name_that_the_package_uses_is_in_the_lists() -> None:
    listed = {
        part for names in LIGHTNING.values() for name in names for part in name.split(".")
    } | {name for names in (*IN_SOURCE.values(), *HARNESS.values(), OTHERS) for name in names}
    used = foreign_private_names()
    assert len(used) > 20
    assert used - listed == set()
    assert OTHERS - used == set()
