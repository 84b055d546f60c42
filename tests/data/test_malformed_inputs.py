"""Malformed rows, configs, checkpoints, replies and templates: a sentence, in time and memory."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sdft_lightning.cli import main
from sdft_lightning.data.sources import read_rows
from sdft_lightning.errors import UserError
from sdft_lightning.graders import Answer, Judge, JudgeSettings
from sdft_lightning.models.chat_template import apply, render
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMServerEngine
from sdft_lightning.types import Tokens

RunCli = Callable[..., None]
SECONDS, MEGABYTES = 10, 1024
pytestmark = pytest.mark.timeout(120)

GOOD = '{"prompt": "Q?", "demonstration": "It is so."}\n'


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, no more than ten seconds of this process and a gibibyte are taken.

    Seconds on the clock depend on what else runs here; who waits for ever meets the timeout.
    """
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 2**10


def check_refused(
    run: Callable[[], object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command ends with code 2 and one sentence that says all words."""
    capsys.readouterr()
    with bounded(), pytest.raises(SystemExit) as stop:
        run()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    sentence = message.partition("error: ")[2]
    assert sentence.count("\n") == 1
    assert len(sentence) < 1000
    for word in words:
        assert word in sentence, sentence


# Rows: what a file of them may be.


class Rows(NamedTuple):
    """A file's name, what makes it at its path, and words of the sentence."""

    name: str
    make: Callable[[Path], object]
    words: list[str]


def text(content: str | bytes) -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda path: path.write_bytes(raw)


def table(columns: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: pq.write_table(columns(), path)


def saved(name: str, content: str) -> Callable[[Path], object]:
    """A folder of save_to_disk, of which one file holds something else."""

    def make(path: Path) -> None:
        datasets.Dataset.from_dict({"prompt": ["a"], "demonstration": ["b"]}).save_to_disk(path)
        (path / name).write_text(content)

    return make


def one(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "demonstration": ["b"]}


ROWS = {
    "nested_10,000_deep": Rows(
        "x.jsonl",
        text('{"prompt": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}\n"),
        ["x.jsonl, line 1: malformed JSON: maximum recursion depth"],
    ),
    "bytes_of_zero": Rows("x.jsonl", text(b"\0" * 1000), ["x.jsonl, line 1: malformed JSON"]),
    "mark_in_the_middle": Rows(
        "x.jsonl", text(GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode()), ["x.jsonl, line 2", "BOM"]
    ),
    "utf_16": Rows("x.jsonl", text(GOOD.encode("utf-16")), ["x.jsonl: not UTF-8 at byte 0"]),
    "pipe": Rows("x.jsonl", os.mkfifo, ["data.train: x.jsonl is no file but a pipe"]),
    "pipe_of_parquet": Rows("x.parquet", os.mkfifo, ["x.parquet is no file but a pipe"]),
    "device_without_end": Rows(
        "x.json", lambda path: path.symlink_to("/dev/zero"), ["x.json is no file but a pipe or"]
    ),
    "link_to_itself": Rows(
        "x.jsonl", lambda path: path.symlink_to(path.name), ["there is no file or folder x.jsonl"]
    ),
    "folder": Rows("x.jsonl", Path.mkdir, ["the folder x.jsonl was not written by datasets'"]),
    "name_of_5,000_letters": Rows("x" * 5000, str, ["data.train: there is no file or folder xxx"]),
    "home_of_nobody": Rows("~nobody9/x.jsonl", str, ["there is no file or folder ~nobody9"]),
    "parquet_without_columns": Rows(
        "x.parquet", table(lambda: pa.table({})), ["x.parquet has no rows"]
    ),
    "parquet_with_a_column_twice": Rows(
        "x.parquet",
        table(lambda: pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt"] * 2)),
        ["data.train: x.parquet has the column 'prompt' twice"],
    ),
    "parquet_of_no_utf_8": Rows(
        "x.parquet",
        table(lambda: pa.table(one(pa.array([b"\xff\xfe"]).view(pa.string())))),
        ["x.parquet, row 1 and further: a value cannot be read", "Correct the file"],
    ),
    "parquet_of_days_after_9999": Rows(
        "x.parquet",
        table(lambda: pa.table(one(pa.array([2**30], pa.date32())))),
        ["x.parquet, row 1 and further: a value cannot be read"],
    ),
    "state_is_a_list": Rows("saved", saved("state.json", "[]"), ["the folder saved", "TypeError"]),
    "state_names_no_files": Rows("saved", saved("state.json", "{}"), ["'_data_files'"]),
    "state_is_deep": Rows("saved", saved("state.json", "[" * 100_000), ["RecursionError"]),
    "info_is_a_list": Rows("saved", saved("dataset_info.json", "[]"), ["AttributeError"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_file_that_holds_no_rows_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = ROWS[name]
    case.make(Path(case.name))
    with bounded(), pytest.raises(UserError) as caught:
        read_rows(case.name, "data.train")
    for word in case.words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


# Values of rows, which the command reads.
VALUES = {
    "number_as_role": ([{"role": 3, "content": "Q"}], "a", "got role 3"),
    "list_as_role": ([{"role": ["user"], "content": "Q"}], "a", "got role ['user']"),
    "1e400_as_content": ([{"role": "user", "content": math.inf}], "a", "content of type float"),
    "list_of_lists": ([["user", "Q"]], "a", "'prompt' must be a text or a list of messages"),
    "other_type_than_the_rows_before": ("Q", True, "'demonstration' must be a text"),
    "number_of_tool_calls": (
        [{"role": "user", "content": "Q", "tool_calls": 7}],
        "a",
        "tool_calls",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_value_of_another_form_is_told_with_its_line(
    name: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt, demonstration, word = VALUES[name]
    row = json.dumps({"prompt": prompt, "demonstration": demonstration})
    (tmp_path / "x.jsonl").write_text(GOOD + row)
    args = [*fit_args, "--data.train=x.jsonl"]
    check_refused(lambda: run_cli(*args), ["x.jsonl, line 2: ", word], capsys)
    assert not (tmp_path / "runs").exists()


# Configs: a text stands in c.yaml, a list is options.
CONFIGS: dict[str, tuple[str | list[str], list[str]]] = {
    "tag_that_runs_code": (
        "trainer: !!python/object/apply:os.system ['touch ran']",
        ["config: c.yaml, line 1: the tag", "python/object/apply:os.system"],
    ),
    "tag_of_nobody": ("data:\n  train: !mine x", ["config: c.yaml, line 2: the tag !mine"]),
    "number_as_name": ("trainer:\n  3: 4", ["config: c.yaml, line 2: a key that is no text (3)"]),
    "list_as_name": ("? [a]\n: 1", ["config: c.yaml, line 1: a key that is no text"]),
    "brackets": ("trainer: " + "[" * 10_000, ["config: c.yaml", "cannot be read as YAML"]),
    "anchor_in_itself": ("trainer: &a\n  callbacks: *a", ["an alias (*name) stands inside of"]),
    "two_documents": ("trainer: {}\n---\ntrainer: {}", ["config: c.yaml, line 2", "another"]),
    "itself": ("config: c.yaml", ["loop", "c.yaml"]),
    "class_that_is_none": (
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}]}",
        ["trainer.callbacks", "subprocess.Popen"],
    ),
    "nan_as_count": ("trainer:\n  max_steps: .nan", ["trainer.max_steps", "nan"]),
    "bytes_as_name": ("run:\n  name: !!binary aGVsbG8=", ["run.name", "b'hello'"]),
    "nul_in_a_name": ('checkpoint:\n  filename: "a\\0b"', ["checkpoint.filename: a NUL character"]),
    "wrong_unit": (["--data.max_megabytes=4GB"], ["data.max_megabytes", "4GB"]),
    "window_of_30_digits": (
        [f"--trainer.accumulate_grad_batches={'9' * 30}"],
        ["trainer.accumulate_grad_batches: got 999", "allowed are whole numbers up to"],
    ),
    "number_of_5,000_digits": ([f"--trainer.max_steps={'9' * 5000}"], ["trainer.max_steps"]),
    "answers_without_end": (
        ["--model.sampling.max_new_tokens=1000000000000"],
        ["sampling.max_new_tokens: got 1000000000000, allowed is 1 and more, up to 1048576"],
    ),
    "graded_answers_without_end": (
        ["--model.evaluation.max_new_tokens=1000000000000"],
        ["model.evaluation.max_new_tokens: got 1000000000000", "up to 1048576"],
    ),
    "completions_without_end": (
        ["--model.sampling.completions_per_prompt=100000000"],
        ["sampling.completions_per_prompt: got 100000000, allowed is 1 and more, up to"],
    ),
    "infinite_temperature": (
        ["--model.sampling.temperature=.inf"],
        ["sampling.temperature: got inf, allowed is above 0 and finite"],
    ),
    "rank_of_terabytes": (
        ["--model.policy.lora.r=1000000000000"],
        ["lora.r: got 1000000000000, allowed are 1 and more, up to 65536"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_cannot_be_one_is_refused_and_runs_nothing(
    name: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, words = CONFIGS[name]
    options = ["--config=c.yaml"] if isinstance(given, str) else given
    if isinstance(given, str):
        (tmp_path / "c.yaml").write_text(given)
    check_refused(lambda: run_cli(*fit_args, *options), words, capsys)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "ran").exists()


# Checkpoints of a run of two steps, spoilt in some way.


def fresh(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """What stands in the place of the checkpoint."""

    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The checkpoint with a change to its content."""

    def spoil(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return spoil


def part(**values: Any) -> Callable[[Path], object]:
    return changed(lambda content: content.update(values))


def zip_of(name: str, megabytes: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
            file.open(name, "w") as inside,
        ):
            for _ in range(megabytes):
                inside.write(bytes(2**20))

    return make


def weights_file(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def first_group(content: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = content["optimizer_states"][0]["param_groups"][0]
    return group


def first_moments(content: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = content["optimizer_states"][0]["state"][0]
    return moments


def first_callback(content: dict[str, Any]) -> str:
    return next(name for name in content["callbacks"] if name.startswith("ModelCheckpoint"))


def progress(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return found


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zip_of_something_else": (fresh(zip_of("hello.txt", 1)), "cannot be read as a checkpoint"),
    "zip_that_unpacks_to_300_mb": (
        fresh(zip_of("archive/data.pkl", 300)),
        "cannot be read as a checkpoint",
    ),
    "safetensors": (fresh(weights_file), "cannot be read as a checkpoint"),
    "pipe": (fresh(os.mkfifo), "is no file but a pipe"),
    "device": (fresh(lambda path: path.symlink_to("/dev/zero")), "is not one of its checkpoints"),
    "folder": (fresh(Path.mkdir), "is a folder"),
    "epoch_a_text": (part(epoch="3"), "its epoch is '3'"),
    "step_below_0": (part(global_step=-1), "its global_step is -1"),
    "step_of_40_digits": (part(global_step=10**40), "its global_step is 1000"),
    "version_a_number": (part(**{"pytorch-lightning_version": 7}), "_version is 7"),
    "version_of_no_form": (part(**{"pytorch-lightning_version": "odd"}), "ckpt_path"),
    "loops_of_nothing": (part(loops=None), "its loops is None"),
    "progress_a_text": (
        changed(lambda content: progress(content).update(total="x")),
        "ckpt_path: training cannot go on from",
    ),
    "callbacks_a_list": (part(callbacks=[]), "its callbacks is []"),
    "callback_a_number": (
        changed(lambda content: content["callbacks"].update({first_callback(content): 7})),
        "ckpt_path",
    ),
    "weights_a_number": (
        changed(lambda content: content["state_dict"].update(x=7)),
        "its state_dict has what is no tensor, 'x'",
    ),
    "optimizers_a_number": (part(optimizer_states=7), "its optimizer_states is 7"),
    "optimizer_without_groups": (part(optimizer_states=[{}]), "ckpt_path"),
    "group_of_no_weights": (
        changed(lambda content: first_group(content).update(params=7)),
        "ckpt_path",
    ),
    "moments_of_another_shape": (
        changed(lambda content: first_moments(content).update(exp_avg=torch.zeros(3))),
        "exp_avg of weight 0 has the shape (3,)",
    ),
    "moments_that_are_none": (
        changed(lambda content: content["optimizer_states"][0]["state"].update({0: 7})),
        "the state of weight 0 is 7",
    ),
    "loops_without_progress": (part(loops={"fit_loop": {}}), "loops lack fit_loop"),
    "schedules_of_numbers": (part(lr_schedulers=[7]), "ckpt_path"),
    "identity_of_escapes": (
        changed(
            lambda content: content["sdft_lightning"].update(
                architecture=7, model_name="\x1b]0;x\x07"
            )
        ),
        "another architecture",
    ),
}


@pytest.fixture(scope="module")
def run_of_two_steps(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[Path, list[str]]:
    """The folder of runs, and the command of the run `a` in it."""
    root = tmp_path_factory.mktemp("made")
    (root / "rows.jsonl").write_text(GOOD * 4)
    options = {
        "model": "SDFTModule",
        "model.policy.name": model_folder,
        "model.sampling.max_new_tokens": 4,
        "data.train": root / "rows.jsonl",
        "data.batch_size": 2,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": "false",
        "run.name": "a",
        "run.root": root / "runs",
    }
    command = ["fit", *(f"--{name}={value}" for name, value in options.items())]
    logs = logging.getLogger("sdft_lightning")
    before = logs.handlers[:], logs.level, logs.propagate
    main(command)
    logs.handlers[:], logs.level, logs.propagate = before
    return root / "runs", command


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_that_is_none_is_refused_and_nothing_is_trained(
    name: str,
    run_of_two_steps: tuple[Path, list[str]],
    run_cli: RunCli,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, command = run_of_two_steps
    root = Path(shutil.copytree(runs, tmp_path / "runs"))
    path = root / "a" / "checkpoints" / "last.ckpt"
    spoil, word = CHECKPOINTS[name]
    spoil(path)
    before = sorted(root.rglob("*.ckpt"))
    args = [*command, f"--run.root={root}", f"--ckpt_path={path}", "--trainer.max_steps=3"]
    check_refused(lambda: run_cli(*args), [word], capsys)
    assert sorted(root.rglob("*.ckpt")) == before


# Chat templates.
ASKED = [{"role": "user", "content": "Q?"}]
TEMPLATES = {
    "block_in_itself": ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
    "imports": ("{% import 'x' as x %}{{ x }}", "no loader"),
    "extends": ("{% extends 'x' %}", "no loader"),
    "filter_that_is_none": ("{{ messages | nothing }}", "No filter named 'nothing'"),
    "tag_that_is_none": ("{% raise 'x' %}", "unknown tag 'raise'"),
    "enormous_range": (
        "{{ range(10 ** 10) | list | length }}",
        "OverflowError|SecurityError|memory",
    ),
    "enormous_list": ("{{ ([0] * 10 ** 10) | length }}", "MemoryError|memory"),
    "centred": ("{{ 'a' | center(10 ** 10) }}", "MemoryError|memory"),
    "indented": ("{{ messages | tojson(indent=10 ** 10) }}", "MemoryError|memory|tojson|time"),
    "formatted": ("{{ '{:>9999999999}'.format(1) }}", "MemoryError|memory|ValueError"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "nested_ifs": (
        "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
        "RecursionError|Syntax|memory",
    ),
    "nested_brackets": ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "RecursionError|memory"),
    "half_a_character": ("{{ '\\ud800' }}", "a lone surrogate"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_that_is_none_is_a_sentence(
    name: str, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "SECONDS", 1.0)
    template, words = TEMPLATES[name]
    with bounded(), pytest.raises(UserError, match=words) as caught:
        render(make_tokenizer(template), ASKED, {})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


# Replies of judges.
RIGHT = '{"reason": "Because.", "verdict": "correct"}'
JUDGED: dict[str, Any] = {
    "choice_of_numbers": {"choices": [[1, 2, 3]]},
    "message_a_text": {"choices": [{"message": "correct"}]},
    "role_a_list": {"choices": [{"message": {"role": [], "content": {"verdict": "correct"}}}]},
    "choices_an_object": {"choices": {"0": {"message": {"content": RIGHT}}}},
    "verdict_a_list": {"choices": [{"message": {"content": '{"verdict": ["correct"]}'}}]},
    "verdict_1e400": {"choices": [{"message": {"content": '{"verdict": 1e400}'}}]},
    "content_nul": {"choices": [{"message": {"content": "\0" * 1000}}]},
    "number": 10**400,
    "text": "correct",
}


@pytest.mark.parametrize("name", JUDGED)
def test_reply_of_a_judge_in_another_form_is_no_verdict(
    name: str, hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "judge-key-0123456789")
    raw = json.dumps(JUDGED[name]).encode()
    hostile.answer = lambda path, asked: (200, {"Content-Type": "application/json"}, raw)
    few: dict[str, Any] = {"max_retries": 0, "max_unreadable": 1, "timeout_seconds": 5.0}
    judge = Judge(JudgeSettings("tiny", base_url=f"{hostile.url}/v1", **few), tmp_path)
    with bounded():
        (score,) = judge.grade("medical", [Answer("What is it?", "It is red.", "Red.")])
    assert math.isnan(score)


# Replies of sampling servers: what a path answers in place of what vLLM does.
SERVED: dict[str, tuple[str, Any]] = {
    "models_a_text": ("/v1/models", "student"),
    "models_null": ("/v1/models", {"data": None}),
    "models_of_numbers": ("/v1/models", {"data": [1, 2]}),
    "config_a_list": ("/server_info", {"vllm_config": []}),
    "config_of_numbers": ("/server_info", {"vllm_config": {"model_config": 7}}),
    "info_a_number": ("/server_info", 7),
    "version_a_list": ("/weight_info", {"weight_version": []}),
    "version_1e400": ("/weight_info", {"weight_version": math.inf}),
    "cache_a_text": ("/reset_prefix_cache", "yes"),
    "completion_of_completions": ("/v1/completions", {"choices": [{"choices": [{}]}]}),
}


@pytest.mark.parametrize("name", SERVED)
def test_reply_of_a_sampling_server_in_another_form_is_refused(
    name: str, hostile: Any, model: Any, tmp_path: Path
) -> None:
    state = {"version": "none"}
    odd_path, odd = SERVED[name]

    def answer(path: str, body: Any) -> Any:
        if path == "/update_weight_version":
            state["version"] = body["new_version"]
        config = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        answers = {
            "/v1/models": {"data": [{"id": "student"}]},
            "/server_info": {"vllm_config": {**config, "device_config": {"device": "cuda"}}},
            "/reset_prefix_cache": {"success": True},
            "/weight_info": {"weight_version": state["version"]},
            odd_path: odd,
        }
        return 200, {}, json.dumps(answers.get(path, {})).encode()

    hostile.answer = answer
    few: dict[str, Any] = {"timeout_seconds": 5.0, "max_retries": 0, "patience_seconds": 0.2}
    engine = VLLMServerEngine(hostile.url, exchange_folder=str(tmp_path), **few)
    ids = torch.tensor([[3, 4, 5]])  # (1, P)
    mask = torch.ones_like(ids, dtype=torch.bool)
    request = RolloutRequest(Tokens(ids, mask), ["a"], Sampling(4), 1, 0, [2, 9], 0)
    with bounded(), pytest.raises(UserError, match=r"^model\.engine") as caught:
        engine.generate(StudentPasses("same").at(model, 0), request)
    assert hostile.url in str(caught.value)
    assert len(str(caught.value)) < 1000
