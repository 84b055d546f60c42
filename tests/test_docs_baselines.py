"""The commands of docs/baselines.md, one after the other, on the tiny model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdft_lightning import modules

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The arguments of each `sdft`, with $D filled in."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    data = re.search(r'^D="(.*)"$', blocks, re.MULTILINE)
    assert data is not None
    lines = [line for line in blocks.splitlines() if line.startswith("sdft ")]
    return [shlex.split(line.replace("$D", data[1]))[1:] for line in lines]


def shortened(command: list[str], model_folder: Path) -> list[str]:
    """The same command from any folder, on the tiny model, for one step."""
    args = [str(ROOT / arg) if arg.startswith("configs/") else arg for arg in command]
    args = [arg.replace("=embedded", f"={model_folder}") for arg in args]
    if not any(arg.startswith("--model.policy.name=") for arg in args):
        args.append(f"--model.policy.name={model_folder}")
    if any(arg.endswith("offline.yaml") for arg in args):
        args.append("--model.sampling.max_new_tokens=128")  # the bytes of a random answer are many
    return [
        *args,
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=0.01",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
        "--checkpoint.every_n_train_steps=1",
    ]


def test_every_method_has_its_command_and_every_fragment_named_is_there() -> None:
    fragments = {Path(arg).stem for args in commands() for arg in args if "configs/model/" in arg}
    assert fragments == {"sft", "dft", "sft_kl", "cpt", "reinvoke", "offline", "sdft_frozen"}
    for name in re.findall(r"configs/\w+/\w+\.yaml", PAGE):
        assert (ROOT / name).is_file(), name
    for name in modules.__all__:
        assert f"`{name}`" in PAGE or name == "PolicyModule", name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_run_in_their_order(
    run_cli: Callable[..., None], make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model_folder = make_model_folder(max_position_embeddings=1024)  # a token is a byte
    for command in commands():
        run_cli(*shortened(command, model_folder))
    runs = {folder.name for folder in (tmp_path / "runs").iterdir()}
    trained = {"sft", "dft", "sft_kl", "cpt", "reinvoke", "offline", "offline_own", "frozen"}
    assert runs == trained | {"answers"}
    for name in trained:
        path = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        assert torch.load(path, weights_only=True)["global_step"] == 1, name
