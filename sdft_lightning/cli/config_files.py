"""Files of options are looked at before jsonargparse reads them: broken, doubled, too large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import printable
from sdft_lightning.files.yaml_text import check_yaml

_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def check_config_files(words: Sequence[str]) -> None:
    """Refuse files of options that cannot be read, or of which a part would be lost in silence.

    Args:
        words: The command line.

    Raises:
        UserError: Names the file and the line.
    """
    for path in _config_files(words):
        try:
            text = path.read_text(encoding="utf-8")
            check_yaml(text, f"config: {path}")
            root = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise UserError(
                f"config: {path}{line} is no YAML: {error.problem or error.context}. Options are "
                "written as name: value, indented with blanks."
            ) from error
        except (yaml.YAMLError, UnicodeError, RecursionError, OSError) as error:
            raise UserError(
                f"config: {path} cannot be read as YAML ({type(error).__name__}). Name a text file "
                "of options."
            ) from error
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"config: {path} holds no options. Write them as name: value, e.g. trainer: "
                "{max_steps: 100}."
            )
        _check_names(root, path, set())


def _config_files(words: Sequence[str]) -> Iterator[Path]:
    for place, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name not in ("--config", "-c"):
            continue
        text = given if equals else next(iter(words[place + 1 : place + 2]), "")
        if len(text) < 4096 and "\n" not in text and Path(text).is_file():
            yield Path(text)


def _check_names(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """Refuse tags that plain YAML has not, and names that are no text or stand twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        raise UserError(
            f"config: {path}, line {node.start_mark.line + 1}: the tag {printable(node.tag)} is "
            "none of plain YAML, and no object is made by it. Write the plain value."
        )
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check_names(each, path, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.tag not in _KEYS:
                raise UserError(
                    f"config: {path}, line {key.start_mark.line + 1}: a key that is no text "
                    f"({printable(str(key.value), 40)}). Options have names; put others into "
                    "quotes."
                )
            name = str(key.value)
            if name in names:
                raise UserError(
                    f"config: {path}, line {key.start_mark.line + 1}: {name} stands twice, and one "
                    "of them would be lost. Remove one."
                )
            names.add(name)
            _check_names(value, path, seen)
