"""Rows of a data set: JSON Lines, Parquet, `save_to_disk` folders, or the Hub."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sdft_lightning.data.json_rows import MAX_MEGABYTES, Reading, RowList, Rows, read_json
from sdft_lightning.errors import UserError, printable

EXAMPLE_PREFIX = "example:"
PRESET_PREFIX = "preset:"
HUB_PREFIX = "hub:"
_EXAMPLES = Path(__file__).parent / "examples"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROWS_A_BATCH = 1024
_BATCH_BYTES = 64 * 2**20  # of rows that are decoded at once where no more is known
_BYTES_A_VALUE = 16  # at least, of a value that a Parquet file need not spend a byte on
_SHUFFLE_SEED = 0


class HubSource(TypedDict):
    """A data set on the Hugging Face Hub.

    Not a dataclass: for these jsonargparse takes the path of a file to hold their options, and a
    data file given on the command line would be read as one.

    Args:
        repo: owner/name.
        split: Which split, e.g. train.
        config: Which configuration, where there are several.
        revision: Branch, tag or commit.
        where: Only the rows that have these values, by column; a field of a column is named with a
            dot, e.g. `{domain: Chemistry, details.level: L3}`.
        percent: Only this part of the rows, e.g. [0, 75]: where there is one split for all, its
            rows are shuffled, always alike, and cut.
    """

    repo: str
    split: str
    config: NotRequired[str | None]
    revision: NotRequired[str | None]
    where: NotRequired[dict[str, Any] | None]
    percent: NotRequired[list[float] | None]


Source = str | HubSource


def read_rows(
    source: Source,
    option: str,
    wanted: Collection[str] | None = None,
    max_megabytes: int = MAX_MEGABYTES,
) -> Rows:
    """Read the rows of a source.

    Args:
        source: A .jsonl, .json or .parquet file, a folder written by `save_to_disk` (its split
            behind a colon if it has several), `example:<name>/<file>` for a data set that this
            package ships, `hub:<owner>/<name>:<split>`, or a `HubSource`.
        option: Name of the option, for messages.
        wanted: The columns to read; all without it. Others are not decoded, whatever they hold.
        max_megabytes: Most memory for the rows.

    Returns:
        At least one row.

    Raises:
        UserError: If there is no such source, or it is malformed, empty or too large.
    """
    reading = Reading(option, wanted, max_megabytes)
    source = _of_hub(source, option)
    found = _read(source, reading) if isinstance(source, str) else _read_hub(source, reading)
    if not found.rows:
        raise UserError(f"{option}: {found.name} has no rows. Give a file with at least one.")
    return found


def _of_hub(source: Source, option: str) -> Source:
    """`hub:owner/name:split` as the `HubSource` that it is short for; others as they are."""
    if not isinstance(source, str) or not source.startswith(HUB_PREFIX):
        return source
    repo, colon, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not colon or not split or not all(repo.split("/")) or repo.count("/") > 1:
        raise UserError(
            f"{option}: got {printable(source)}; a data set on the Hub is hub:owner/name:split, "
            "e.g. hub:openai/gsm8k:train, or {repo, split, config, revision, where, percent}."
        )
    return {"repo": repo, "split": split}


def _read(source: str, reading: Reading) -> Rows:
    option = reading.option
    path, split = _resolve(source, option)
    if path.is_dir():
        return _read_folder(path, split, reading)
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise UserError(f"{option}: {path} is no file but a pipe or a device. Give a file.")
    if path.suffix == ".parquet":
        return _read_parquet(path, reading)
    if path.suffix not in _SUFFIXES:
        raise UserError(
            f"{option}: {path} ends in {path.suffix or 'nothing'}; allowed are "
            f"{', '.join(_SUFFIXES)}, and folders written by save_to_disk. Convert or rename it."
        )
    return read_json(path, reading)


def _resolve(source: str, option: str) -> tuple[Path, str | None]:
    if source.startswith(EXAMPLE_PREFIX):
        return example_path(source, option), None
    with suppress(OSError, RuntimeError):  # a name that is too long, or the home of nobody
        path = Path(source).expanduser()
        if path.exists():
            return path, None
        folder, _, split = source.rpartition(":")
        if folder and Path(folder).expanduser().is_dir():
            return Path(folder).expanduser(), split
    raise UserError(
        f"{option}: there is no file or folder {printable(source)} (looked in {Path.cwd()}). "
        "Correct the path; a data set on the Hub is given as hub:owner/name:train, or as "
        "{repo: owner/name, split: train}."
    )


def example_path(source: str, option: str) -> Path:
    """The file of a data set that this package ships.

    Args:
        source: `example:<name>/<file>`.
        option: Where it was named.

    Raises:
        UserError: If it ships no such file.
    """
    path = _EXAMPLES / source.removeprefix(EXAMPLE_PREFIX)
    if not path.is_file():
        known = sorted(p.relative_to(_EXAMPLES).as_posix() for p in _EXAMPLES.rglob("*.jsonl"))
        raise UserError(f"{option}: this package ships no {source!r}. It ships {', '.join(known)}.")
    return path


def presets_folder() -> Path:
    """Folder of the configs that this package ships; in a checkout, those of the repository."""
    packaged = Path(__file__).parents[1] / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def preset_path(name: str, option: str) -> Path:
    """The file of options, of a plan or of a benchmark's settings that this package ships.

    Args:
        name: `preset:<name>`, e.g. `preset:quickstart` or `preset:model/sft`.
        option: Where it was named.

    Raises:
        UserError: If it ships no such file.
    """
    folder = presets_folder()
    files = sorted(folder.rglob("*.yaml"))
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    wanted = name.removeprefix(PRESET_PREFIX).removesuffix(".yaml")
    if wanted not in known:
        raise UserError(
            f"{option}: this package ships no {printable(name)!r}. It ships "
            f"{', '.join(known) or 'none'}; a file of yours is named by its path."
        )
    return known[wanted]


def example_tasks() -> dict[str, Path]:
    """The benchmarks that this package ships: files of tasks, by the name of the task."""
    return {path.stem: path for path in sorted(_EXAMPLES.rglob("*.yaml"))}


def _read_parquet(path: Path, reading: Reading) -> Rows:
    import pyarrow
    import pyarrow.parquet

    found = RowList(str(path), reading)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = reading.columns(names)
            twice = next((name for name in columns if columns.count(name) > 1), None)
            texts, size, rows = _measured(file.metadata, columns)
        if twice is not None:
            raise UserError(
                f"{reading.option}: {path} has the column {twice!r} twice, and one of them would "
                "be lost. Rename or remove one."
            )
        if size > reading.max_bytes:
            raise reading.too_large(str(path), "its columns take")
        # A text that is repeated stands in the file once, and stays once in a dictionary.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            number = 0
            for batch in _batches(file, columns, rows):
                if sum(_decoded_bytes(column) for column in batch.columns) > reading.max_bytes:
                    raise reading.too_large(str(path), f"rows {number + 1} and further take")
                for row in _plain_rows(batch, f"{path}, row {number + 1} and further"):
                    number += 1
                    found.add(row, f"row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{reading.option}: {path} cannot be read as Parquet: {printable(str(error))}"
        ) from error
    return found.rows(names)


def _measured(metadata: Any, columns: Collection[str]) -> tuple[list[str], int, int | None]:
    """What a Parquet file says of the columns to read.

    Returns:
        The paths of texts that can be read as dictionaries; the bytes of all columns before
        repeated texts are written out; how many rows may be decoded at once, or None where
        dictionaries answer for that.
    """
    texts: set[str] = set()
    prefixed: dict[str, int] = {}
    size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in (group.column(place) for place in range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] not in columns:
                continue
            bytes_ = chunk.total_uncompressed_size
            size += max(bytes_, chunk.num_values * _BYTES_A_VALUE)
            if chunk.physical_type == "BYTE_ARRAY":
                texts.add(chunk.path_in_schema)
            if "DELTA_BYTE_ARRAY" in chunk.encodings:
                # Each text may begin with the whole one before, which stands in the file once.
                known = prefixed.get(chunk.path_in_schema, 1)
                prefixed[chunk.path_in_schema] = max(known, bytes_)
    rows = max(1, _BATCH_BYTES // sum(prefixed.values())) if prefixed else None
    return sorted(texts - prefixed.keys()), size, rows


def _batches(file: Any, columns: list[str], rows: int | None) -> Iterator[Any]:
    if rows is not None:
        yield from file.iter_batches(min(rows, _ROWS_A_BATCH), columns=columns)
        return
    for number in range(file.num_row_groups):
        # Not iter_batches: it copies a dictionary that grows with each batch.
        table = file.read_row_group(number, columns=columns)
        yield from table.to_batches(max_chunksize=_ROWS_A_BATCH)


def _plain_rows(batch: Any, where: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ArithmeticError, ValueError) as error:  # texts that are not UTF-8, days after 9999
        raise UserError(
            f"{where}: a value cannot be read ({printable(str(error))}). Correct the file."
        ) from error
    return rows


def _decoded_bytes(array: Any) -> int:
    """Bytes of an Arrow array whose dictionaries are written out."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(_decoded_bytes(field) for field in array.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _decoded_bytes(array.flatten())
    return int(array.nbytes)


def _read_folder(path: Path, split: str | None, reading: Reading) -> Rows:
    import datasets

    option = reading.option
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets fails in many ways on files that are not its own
        raise UserError(
            f"{option}: the folder {path} was not written by datasets' save_to_disk "
            f"({type(error).__name__}: {printable(str(error))}). "
            "Name a file in it, or save it again."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(
                f"{option}: {path} has the splits {printable(', '.join(found))}; got {split!r}. "
                f"Write the split behind a colon: {path}:{next(iter(found))}."
            )
        found = found[split]
    return _from_dataset(found, str(path), reading)


def _read_hub(source: HubSource, reading: Reading) -> Rows:
    import datasets

    repo, split, config = source["repo"], source["split"], source.get("config")
    try:
        found = datasets.load_dataset(repo, config, split=split, revision=source.get("revision"))
    except Exception as error:  # the Hub client raises many unrelated kinds
        raise UserError(
            f"{reading.option}: the data set {repo} (config {config}, split {split}) "
            f"could not be loaded: {type(error).__name__}: {printable(str(error))} Check the names "
            "and the network, or download it and give the path of the file."
        ) from error
    name = f"{repo}, split {split}"
    return _from_dataset(_part(found, source, name, reading.option), name, reading)


def _from_dataset(found: Any, name: str, reading: Reading) -> Rows:
    """The rows of a `datasets.Dataset`, of which only the columns that are wanted are decoded."""
    columns = reading.columns(found.column_names)
    for column in columns:
        kind = _decoded_kind(found.features[column])
        if kind is not None:
            raise UserError(
                f"{reading.option}: the column {column!r} of {name} holds {kind}, and only texts "
                "and messages can be read. Map a column of text (data.columns)."
            )
    rows = RowList(name, reading)
    # Whatever format it was saved in (tensors, frames), rows are plain values.
    for number, row in enumerate(found.with_format(None).select_columns(columns), start=1):
        rows.add(row, f"row {number}")
    return rows.rows(found.column_names)


def _decoded_kind(feature: Any) -> str | None:
    """What is decoded of a column (sound, pictures ...), with a package of its own; else None."""
    if hasattr(feature, "decode_example"):
        return type(feature).__name__
    parts: list[Any] = [getattr(feature, "feature", None)]  # of a list
    if isinstance(feature, dict):
        parts = list(feature.values())
    elif isinstance(feature, list | tuple):
        parts = list(feature)
    kinds = (_decoded_kind(part) for part in parts if part is not None)
    return next((kind for kind in kinds if kind is not None), None)


def _part(found: Any, source: HubSource, name: str, option: str) -> Any:
    """The rows that `where` and `percent` leave of a `datasets.Dataset`."""
    where, percent = source.get("where") or {}, source.get("percent")
    columns = sorted({key.partition(".")[0] for key in where})
    for column in columns:
        if column not in found.column_names:
            raise UserError(
                f"{option}.where: {name} has no column {column!r}. Its columns are "
                f"{', '.join(found.column_names)}."
            )
    if where:
        rows = found.with_format(None).select_columns(columns)
        chosen = [place for place, row in enumerate(rows) if _has(row, where)]
        if not chosen:
            raise UserError(f"{option}.where: no row of {name} has {where}. Correct the values.")
        found = found.select(chosen)
    if percent is None:
        return found
    if len(percent) != 2 or not 0 <= percent[0] < percent[1] <= 100:
        raise UserError(
            f"{option}.percent: got {percent}, allowed are two numbers from 0 to 100, the smaller "
            "one first, e.g. [0, 75]."
        )
    first, last = (round(len(found) * part / 100) for part in percent)
    return found.shuffle(seed=_SHUFFLE_SEED).select(range(first, last))


def _has(row: dict[str, Any], where: dict[str, Any]) -> bool:
    for key, value in where.items():
        field: Any = row
        for part in key.split("."):
            field = field.get(part) if isinstance(field, dict) else None
        if field != value:
            return False
    return True
