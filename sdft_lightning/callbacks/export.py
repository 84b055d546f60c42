"""Writes the student, with its card, as a folder that transformers and vLLM load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import yaml

from sdft_lightning.errors import UserError, check_at_least, check_choice
from sdft_lightning.files.checkpoint_io import check_export
from sdft_lightning.files.run_folder import run_folder, unused_path
from sdft_lightning.files.whole_files import whole_folder
from sdft_lightning.models.embedded import MARKER_NAME
from sdft_lightning.models.lora import is_adapted, merged_copy, save_adapter
from sdft_lightning.models.randomness import base_config
from sdft_lightning.models.sharding import is_sharded, whole_state_dict
from sdft_lightning.models.tokenization import EMBEDDED, load_config, load_tokenizer, resolve_model
from sdft_lightning.types import task_data

ExportFormat = Literal["merged", "adapter"]


class Origin(NamedTuple):
    """What the card of an exported model tells of its training.

    Attributes:
        folder: The run's, whose config.yaml and metrics.jsonl are read; None without a run.
        step: Optimizer steps behind the exported weights.
        rows: Rows that they were trained on; None where nobody has counted them.
    """

    folder: Path | None = None
    step: int | None = None
    rows: int | None = None


def origin_of(trainer: Any, step: int | None = None) -> Origin:
    """Where a model comes from that a trainer has trained.

    Args:
        trainer: None where the model was never with one.
        step: Optimizer steps, where the weights are not those of the trainer's last one.
    """
    if trainer is None:
        return Origin()
    data, rows = task_data(trainer), None
    if data is not None:
        with suppress(KeyError):  # no stage of training was set up
            rows = len(data.training_rows()) or None
    return Origin(run_folder(trainer), trainer.global_step if step is None else step, rows)


class ExportModel(L.Callback):
    """Exports the student at the end of a fit, and at every n-th step if asked.

    Args:
        at_end: Export when training ends, to <run>/exported/final.
        every_n_steps: Optimizer steps between further exports, to <run>/exported/step-<n>; none
            without it.
        format: merged is a whole model, into which adapters are added; adapter is a folder of
            peft, for runs with LoRA.
    """

    def __init__(
        self,
        at_end: bool = True,
        every_n_steps: int | None = None,
        format: ExportFormat = "merged",
    ) -> None:
        if every_n_steps is not None:
            check_at_least("ExportModel.every_n_steps", every_n_steps, 1)
        self.at_end = at_end
        self.every_n_steps = every_n_steps
        self.format: ExportFormat = format
        self._exported_at = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what could not be exported after it."""
        check_format(pl_module, self.format)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._exported_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export, if the step's turn has come."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if due and step != self._exported_at:
            self._exported_at = step
            self._export(trainer, module, f"step-{step}")

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        """Export the final student."""
        if self.at_end:
            self._export(trainer, module, "final")

    def _export(self, trainer: L.Trainer, module: Any, name: str) -> None:
        # Spread weights are gathered by all processes together.
        weights = whole_state_dict(module.student) if is_sharded(module.student) else None
        if trainer.is_global_zero:
            # A resumed run may come by here again; the older export stays.
            folder = unused_path(run_folder(trainer) / "exported" / name)
            export_model(module, folder, self.format, weights)


def export_model(
    module: Any,
    folder: str | Path,
    format: ExportFormat = "merged",
    weights: dict[str, Any] | None = None,
    origin: Origin | None = None,
) -> None:
    """Save the student in safetensors, with the other files of its base and a model card.

    The base's files (tokenizer, chat template, generation config, licence) are copied unchanged,
    unless a script has changed the module's tokenizer or generation config; README.md is the card.

    Args:
        module: A `PolicyModule` with its model loaded.
        folder: Must not exist yet; it appears when it is complete.
        format: merged or adapter, see `ExportModel`.
        weights: The student's whole weights by name, where it is spread over processes.
        origin: What its card tells of the run; that of the module's trainer without it.

    Raises:
        UserError: If the student has no such format, or a weight is no number.
    """
    check_format(module, format)
    student = module.student
    folder = Path(folder)
    check_export(student.named_parameters() if weights is None else weights.items(), folder)
    with whole_folder(folder) as unfinished:
        if format == "adapter":
            save_adapter(
                student, unfinished, resolve_model(module.policy.name), module.policy.revision
            )
        else:
            model = merged_copy(student) if is_adapted(student) else student
            with base_config(model):
                model.save_pretrained(unfinished, state_dict=weights)
        changed = _keep_base_files(module, unfinished, format)
        card = model_card(module, format, origin or origin_of(module._trainer), changed)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def check_format(module: Any, format: ExportFormat) -> None:
    """Refuse a format that a module cannot be exported in.

    Raises:
        UserError: If there are no adapters, or they cannot be merged.
    """
    check_choice("format", format, get_args(ExportFormat))
    if format == "adapter" and module.policy.lora is None:
        raise UserError(
            "format: got adapter, but this run trains the whole model and has no adapters. Use "
            "merged, or train with LoRA (--model.policy.lora.r=8)."
        )
    if format == "merged" and module.policy.quantization is not None:
        raise UserError(
            "format: got merged, but adapters cannot be added to 4-bit weights. Use adapter "
            "(--format=adapter; for the callback ExportModel, format: adapter) and merge with peft "
            "into the model as it was before quantization."
        )


_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZERS = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
# Neither weights nor code: what else belongs to a model, by suffix and by beginning.
_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# What transformers and this package set in a config while they use it.
_NOT_COMPARED = {"dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
_OTHERS = {_CONFIG, MARKER_NAME, "trainer_state.json", "training_args.json"}


def base_files(name: str, revision: str | None = None) -> dict[str, Path]:
    """The files of a base model that its descendants have unchanged, by name.

    Args:
        name: See `resolve_model`.
        revision: Branch, tag or commit on the Hub.

    Returns:
        All but weights, code and README.md. Nothing where its folder is not on this machine.
    """
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, _CONFIG, revision=revision)
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: path for path in files if path.name == _CONFIG or _belongs(path)}


def _belongs(path: Path) -> bool:
    name = path.name
    if name in _OTHERS or name.startswith((".", "adapter_")) or name.endswith(".index.json"):
        return False
    return path.suffix in _SUFFIXES or name.upper().startswith(_LICENCES)


def _keep_base_files(module: Any, folder: Path, format: ExportFormat) -> list[str]:
    """Put the base's files beside the weights; what of them is another, in words."""
    policy = module.policy
    base = base_files(policy.name, policy.revision)
    changed = []
    if not base.keys() & _TOKENIZERS or _is_changed(module.tokenizer, policy):
        module.tokenizer.save_pretrained(folder)
        changed.append("the files of the tokenizer (as transformers writes it)")
    written = {path.name for path in folder.iterdir()} - {_CONFIG, _GENERATION}
    config, generation = base.pop(_CONFIG, None), base.pop(_GENERATION, None)
    for name in base.keys() - written:
        shutil.copyfile(base[name], folder / name)
    if format == "adapter":
        return changed
    if config is not None:
        changed += _keep_generation(module.student, config.parent, generation, folder)
        changed += _keep_config(policy, config, folder / _CONFIG)
    return changed


def _is_changed(tokenizer: Any, policy: Any) -> bool:
    """Whether a script has changed the module's tokenizer since it was loaded."""
    fresh = load_tokenizer(policy.name, policy.revision)
    kinds = ("chat_template", "special_tokens_map")
    return len(fresh) != len(tokenizer) or any(
        getattr(fresh, kind) != getattr(tokenizer, kind) for kind in kinds
    )


def _keep_generation(model: Any, base: Path, file: Path | None, folder: Path) -> list[str]:
    from transformers import GenerationConfig

    written = folder / _GENERATION
    if file is None:
        written.unlink(missing_ok=True)  # transformers derives one from the config
        return []
    fresh, present = (
        {name: value for name, value in each.to_diff_dict().items() if name[0] != "_"}
        for each in (GenerationConfig.from_pretrained(base), model.generation_config)
    )
    if fresh != present:
        return [f"{_GENERATION} (changed by a script)"]
    shutil.copyfile(file, written)
    return []


def _keep_config(policy: Any, base: Path, written: Path) -> list[str]:
    """Leave the base's config.json as it is, but for the dtype of the weights."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (base, written))
    fresh = json.loads(load_config(policy.name, policy.revision).to_json_string())
    compared = (fresh.keys() | after.keys()) - _NOT_COMPARED
    if any(fresh.get(name) != after.get(name) for name in compared):
        return [f"{_CONFIG} (as transformers writes it: another part of the base, or changed)"]
    key = "torch_dtype" if "torch_dtype" in before else "dtype"
    dtype = after.get("dtype", after.get("torch_dtype"))
    if before.get(key) == dtype:
        shutil.copyfile(base, written)
        return []
    text = json.dumps({**before, key: dtype}, indent=2, ensure_ascii=False)
    written.write_text(text + "\n", encoding="utf-8")
    return [f"{_CONFIG} ({key}: {before.get(key)} is now {dtype})"]


# --- the card -------------------------------------------------------------------------------------

_PAPER = """```bibtex
@misc{shenfeld2026selfdistillation,
  title = {Self-Distillation Enables Continual Learning},
  author = {Shenfeld, Idan and Damani, Mehul and H{\\"u}botter, Jonas and Agrawal, Pulkit},
  year = {2026},
  eprint = {2601.19897},
  archivePrefix = {arXiv}
}
```"""
_EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGES = ("torch", "lightning", "transformers", "peft")
# What of a run's config is told, and of it not: names of files, and what no result depends on.
_TOLD = {
    "model": None,
    "data": "train retain retain_share grader columns prompts lengths batch_size".split(),
    "trainer": "max_steps max_epochs accumulate_grad_batches gradient_clip_val precision devices "
    "num_nodes strategy".split(),
    "seed_everything": None,
}
_OF_SCRIPTS = ("schedule", "sampling", "divergence", "num_loss_tokens_to_skip", "kl_weight", "seed")


def model_card(module: Any, format: ExportFormat, origin: Origin, changed: list[str]) -> str:
    """The card of an exported model, as Markdown with the Hub's header.

    Args:
        module: The `PolicyModule` whose student is exported.
        format: merged or adapter, see `ExportModel`.
        origin: Its run.
        changed: What of the base's files is another, in words.
    """
    from huggingface_hub import ModelCard, ModelCardData

    method, base = type(module).__name__, module.policy.name
    hub = _EMBEDDED_ID if base == EMBEDDED else base
    on_hub = base == EMBEDDED or not Path(resolve_model(base)).is_dir()
    name = hub if on_hub else Path(base).expanduser().resolve().name
    header = ModelCardData(
        base_model=hub if on_hub else None,
        library_name="peft" if format == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["sdft_lightning", method],
    )
    about = " ".join((type(module).__doc__ or "").partition("\n\n")[0].split())
    settings = _settings(module, origin.folder)
    parts = [
        f"# {name}, trained by {method}",
        "\n".join(
            [
                f"- Base model: {name}"
                + (f", revision {module.policy.revision}" if module.policy.revision else ""),
                f"- Method: {method}: {about}",
                f"- Training: {_counted(origin.step, 'optimizer steps')}, on "
                f"{_counted(origin.rows, 'rows')}.",
                "- Written by sdft_lightning. The licence of the base model applies.",
            ]
        ),
        "## Measured",
        _measured(origin),
        "## Settings",
        _table(["option", "value"], [[f"`{key}`", f"`{value}`"] for key, value in settings]),
        "## Files",
        _told_files(format, changed),
        "## Versions",
        _table(["package", "version"], list(_versions())),
        "## Citation",
        f"The method is this paper's:\n\n{_PAPER}",
    ]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}\n"))


def _counted(count: int | None, what: str) -> str:
    return f"{what} that nobody has counted" if count is None else f"{count} {what}"


def _told_files(format: ExportFormat, changed: list[str]) -> str:
    but = f"except {', '.join(changed)}" if changed else "without exception"
    if format == "adapter":
        return f"Adapters for the base model. The tokenizer's files are those of the base, {but}."
    return f"Other than weights and this card, files are those of the base, {but}."


def _versions() -> Iterator[list[str]]:
    from sdft_lightning import __version__

    yield ["sdft_lightning", __version__]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            yield [package, version(package)]


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _measured(origin: Origin) -> str:
    """The last validation at or before the exported step, beside the one before training."""
    path = None if origin.folder is None else origin.folder / "metrics.jsonl"
    if path is None or not path.is_file():
        return "Nothing was measured."
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = [each for each in lines if each.get("stage") == "validation"]
    if origin.step is not None:
        found = [each for each in found if each["step"] <= origin.step]
    if not found:
        return "Nothing was measured."
    last = found[-1]
    before = next((each for each in found if each["step"] == 0 and each is not last), None)
    names = [name for name in last if name.startswith("val/")]
    head = ["", *([] if before is None else ["before training"]), f"after {last['step']} steps"]
    shown = [last] if before is None else [before, last]
    rows = [
        [name.removeprefix("val/"), *(_figure(each.get(name)) for each in shown)] for name in names
    ]
    return _table(head, rows) if rows else "Nothing was measured."


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _settings(module: Any, folder: Path | None) -> list[tuple[str, str]]:
    """The options of the run, by the config that it left behind, or as the module has them."""
    config = _run_config(folder)
    if config is None:
        config = {name: getattr(module, name) for name in _OF_SCRIPTS if hasattr(module, name)}
        optimizer = module.trial_optimizer()
        config |= {"optimizer": {"class_path": type(optimizer).__name__, **optimizer.defaults}}
    else:
        config = {
            part: config[part]
            if names is None
            else {name: value for name, value in config[part].items() if name in names}
            for part, names in _TOLD.items()
            if part in config
        }
    return list(_leaves(config, ""))


def _run_config(folder: Path | None) -> dict[str, Any] | None:
    """The newest config that the command line wrote into a run's folder."""
    written = [] if folder is None else list(folder.glob("config*.yaml"))
    for path in sorted(written, key=lambda path: path.stat().st_mtime, reverse=True):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and {"run", "model", "data", "trainer"} <= config.keys():
            return config
    return None


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The single options below one, without those that are not set, and without folders."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, f"{path}.{name}" if path else str(name))
    elif value is not None:
        if isinstance(value, str) and value.startswith(("/", "~", ".")):
            value = Path(value).name
        yield path, " ".join(str(value).split())
