"""Reads a plan from YAML files and options of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdft_lightning.continual.options import merged
from sdft_lightning.continual.plan import Budget, ContinualPlan, Method, Stage
from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import printable, shown
from sdft_lightning.files.endpoints import check_no_secrets
from sdft_lightning.files.yaml_text import check_yaml

# Not jsonargparse: it looks for classes in every `class_path` below a plan's methods, which
# belong to the runs, are parsed by the runs' own command, and there by short name, too.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "methods": Mapping,
    "stages": list,
    "budget": (Mapping, type(None)),
    "root": str,
    "seeds": list,
    "model": Mapping,
    "data": Mapping,
    "trainer": Mapping,
    "held_out": Mapping,
    "benchmarks": Mapping,
    "drift": list,
    "select": str,
    "resume_every": int,
    "keep_checkpoints": bool,
    "processes": str,
    "updates": (int, type(None)),
    "tokens": (int, type(None)),
}
_SHOWN: dict[type, str] = {
    Mapping: "named options",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    type(None): "nothing",
}


def read_options(configs: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """The options of YAML files, later ones over earlier, and of `--a.b=value` over all.

    Raises:
        UserError: If a file or an option cannot be read.
    """
    options: dict[str, Any] = {}
    for config in configs:
        options = merged(options, _read(Path(config)))
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not equals:
            raise UserError(
                f"{override}: not understood. Options of the plan are given as --name=value, e.g. "
                "--budget.updates=8; the command's own are --config, --dry_run and --shard."
            )
        value = _yaml(text, override)
        for part in reversed(name.split(".")):
            value = {part: value}
        options = merged(options, _of_stages(value, options))
    return options


def _of_stages(given: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """An option of one stage, which is named, as the whole list of stages; others as they are."""
    named, stages = given.get("stages"), options.get("stages")
    if not isinstance(named, Mapping) or not isinstance(stages, list):
        return given
    (name,) = named
    known = [stage.get("name") if isinstance(stage, Mapping) else None for stage in stages]
    if name not in known or not isinstance(named[name], Mapping):
        raise UserError(
            f"stages.{name}: there is no such stage. Give --stages.<name>.<option>=value; the "
            f"stages are {', '.join(str(each) for each in known)}."
        )
    place = known.index(name)
    return {"stages": [*stages[:place], merged(stages[place], named[name]), *stages[place + 1 :]]}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"config: there is no file {path} (looked in {Path.cwd()}).")
    found = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(found, dict):
        raise UserError(f"config: {path} must hold named options, got {type(found).__name__}.")
    return found


def _yaml(text: str, where: str) -> Any:
    check_yaml(text, where)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: malformed YAML: {printable(str(error))}") from error


def build_plan(options: Mapping[str, Any]) -> ContinualPlan:
    """The plan that options describe.

    Raises:
        UserError: If an option is unknown, missing or of the wrong type.
    """
    check_no_secrets(options)
    given = _fields(ContinualPlan, options, "")
    given["methods"] = {
        name: Method(**_fields(Method, method, f"methods.{name}."))
        for name, method in given["methods"].items()
    }
    given["stages"] = [
        _stage(stage, f"stages[{place}].") for place, stage in enumerate(given["stages"])
    ]
    given["budget"] = Budget(**_fields(Budget, given["budget"], "budget."))
    if given.get("held_out"):
        from sdft_lightning.data.planned import HeldOut

        for name, held in given["held_out"].items():
            _known(HeldOut, held, f"held_out.{name}.")  # jsonargparse drops unknown ones silently
    for seed in given.get("seeds", []):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"seeds: got {shown(seed)}; seeds are whole numbers.")
    return ContinualPlan(**given)


def _stage(options: Any, where: str) -> Stage:
    given = _fields(Stage, options, where)
    if given.get("budget") is not None:
        given["budget"] = Budget(**_fields(Budget, given["budget"], f"{where}budget."))
    return Stage(**given)


def _known(kind: type, options: Any, where: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass, once it is clear that all options are among them."""
    if not isinstance(options, Mapping):
        raise UserError(f"{where[:-1]}: got {shown(options)}; give named options.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in options:
        if name not in fields:
            raise UserError(
                f"{where}{name}: there is no such option. Allowed are {', '.join(fields)}."
            )
    return fields


def _fields(kind: type, options: Any, where: str) -> dict[str, Any]:
    """Options by the names of a dataclass's fields, of the right types, none missing."""
    fields = _known(kind, options, where)
    for name, value in options.items():
        allowed = _TYPES[name]
        is_number = allowed is int or allowed == _TYPES["updates"]
        if not isinstance(value, allowed) or (is_number and isinstance(value, bool)):
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            names = " or ".join(_SHOWN.get(each, each.__name__) for each in kinds)
            raise UserError(f"{where}{name}: got {shown(value)}; it must be {names}.")
    for name, field in fields.items():
        absent = field.default is field.default_factory is dataclasses.MISSING
        if absent and name not in options:
            raise UserError(f"{where}{name}: it is needed and not given.")
    return dict(options)
