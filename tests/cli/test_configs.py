"""Every YAML parses; run configs open with their command; the paper's arguments map to ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
PLANS = sorted(CONFIGS.glob("continual_*.yaml"))
RUNS = sorted(set(CONFIGS.glob("*.yaml")) - set(PLANS))
# configs/benchmarks holds tasks of lm-evaluation-harness (tests/data/benchmarks), no fragments.
FRAGMENTS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "benchmarks")


@pytest.fixture
def parse(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], dict[str, Any]]:
    """Parse a command line and return the whole config as `--print_config` shows it."""
    from sdft_lightning.cli import main

    def run(arguments: list[str]) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, "--print_config"])
        assert stop.value.code == 0
        config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return config

    return run


def opens_with_its_command(path: Path, command: str) -> bool:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first == f"# sdft {command} --config preset:{path.stem}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_config_opens_with_its_command_and_parses(
    path: Path, parse: Callable[[list[str]], dict[str, Any]]
) -> None:
    assert opens_with_its_command(path, "fit")
    assert parse([f"--config={path}"])["run"]["name"] == path.stem


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_fragment_parses_beside_a_model(
    path: Path, parse: Callable[[list[str]], dict[str, Any]]
) -> None:
    config = parse([f"--config={CONFIGS / 'model' / 'sdft.yaml'}", f"--config={path}"])
    for section, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        # `callbacks+` adds to what an earlier config has.
        assert {name.removesuffix("+") for name in values} <= config[section].keys()


@pytest.mark.parametrize("name", ["gpu", "ddp", "fsdp2", "slurm"])
def test_trainer_fragment_saves_between_the_ends_of_epochs(
    name: str, parse: Callable[[list[str]], dict[str, Any]]
) -> None:
    sdft, trainer = CONFIGS / "model" / "sdft.yaml", CONFIGS / "trainer" / f"{name}.yaml"
    config = parse([f"--config={sdft}", f"--config={trainer}"])
    assert config["trainer"]["max_epochs"] == 1
    assert 1 <= config["checkpoint"]["every_n_train_steps"] <= 50
    # Lightning refuses more than one of these.
    assert config["checkpoint"]["every_n_epochs"] is None
    assert config["checkpoint"]["train_time_interval"] is None
    assert config["checkpoint"]["save_last"] is True


def test_collapse_guard_is_added_to_the_callbacks_of_the_run_before_it(
    parse: Callable[[list[str]], dict[str, Any]],
) -> None:
    guard = CONFIGS / "callbacks" / "collapse_guard.yaml"
    config = parse([f"--config={CONFIGS / 'quickstart.yaml'}", f"--config={guard}"])
    names = [each["class_path"].rpartition(".")[2] for each in config["trainer"]["callbacks"]]
    assert names == ["CompletionLog", "KLStrip", "ExportModel", "CollapseGuard"]
    assert config["trainer"]["callbacks"][-1]["init_args"]["limits"]["distinct_2"] == 0.25


def test_low_memory_takes_the_place_of_the_runs_optimizer_and_leaves_its_teacher(
    parse: Callable[[list[str]], dict[str, Any]],
) -> None:
    low = CONFIGS / "model" / "low_memory.yaml"
    model = parse([f"--config={CONFIGS / 'quickstart.yaml'}", f"--config={low}"])["model"]
    options = model["init_args"]
    assert options["optimizer"]["class_path"] == "sdft_lightning.models.low_memory.LowMemoryAdamW"
    assert options["optimizer"]["init_args"]["eight_bit"] is True
    assert options["optimizer"]["init_args"]["seed"] is None  # follows seed_everything
    assert options["policy"]["weights_dtype"] == "bfloat16"
    assert options["teacher"]["class_path"].endswith("FrozenTeacher")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_opens_with_its_command_and_all_its_runs_parse(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning import modules
    from sdft_lightning.cli import run_problem
    from sdft_lightning.continual import checks
    from sdft_lightning.continual.plan_file import build_plan, read_options

    assert opens_with_its_command(path, "continual")
    tooluse = "--stages.tooluse.data"
    given = [f"{tooluse}.{split}=my/{split}.jsonl" for split in ("train", "validation", "test")]
    options = read_options([str(path)], given if path.stem == "continual_paper" else [])
    assert options["name"] == path.stem
    assert set(options["methods"]) == {"sdft", "sft", "dft"}
    options["methods"] = {
        name: method
        for name, method in options["methods"].items()
        if hasattr(modules, method["model"]["class_path"])
    }
    # The authors' files lie nowhere here.
    monkeypatch.setattr(checks, "local_path", lambda source, option: None)
    checks.check_plan(build_plan(options), run_problem)


ROOT = CONFIGS.parent
SHOWN = [
    "README.md",
    "CONTRIBUTING.md",
    "configs",
    "docs",
    "notebooks",
    "scripts",
    "sdft_lightning",
]


def test_no_file_of_the_repository_points_to_data_that_no_clone_has() -> None:
    for name in SHOWN:
        paths = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        for path in paths:
            if path.suffix in (".md", ".yaml", ".py", ".sh", ".ipynb"):
                assert "../shared" not in path.read_text(encoding="utf-8"), path


AUTHORS = ["paper_tooluse.yaml", "tooluse_turns.yaml"]


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize(("command", "split"), [("fit", "train"), ("test", "test")])
def test_data_that_only_the_authors_have_are_asked_for_by_option_and_place(
    name: str,
    command: str,
    split: str,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sdft_lightning.cli import main

    options = [f"--model.policy.name={model_folder}", f"--run.root={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main([command, f"--config={CONFIGS / name}", *options])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"data.{split}: `{command}` needs it and it is not given" in message
    assert "github.com/idanshen/Self-Distillation, data/tooluse_data" in message
    assert "--data.train=Self-Distillation/data/tooluse_data/train_data" in message
    assert not any(tmp_path.glob("*/config.yaml"))


def test_the_papers_plan_says_how_to_name_the_authors_files() -> None:
    from sdft_lightning.continual import checks
    from sdft_lightning.continual.plan_file import build_plan, read_options
    from sdft_lightning.errors import UserError

    plan = build_plan(read_options([str(CONFIGS / "continual_paper.yaml")], []))
    with pytest.raises(UserError, match=r"stages\.tooluse\.data\.train: .*--stages\.tooluse\.data"):
        checks.check_plan(plan, lambda command, options: "")


SCIENCE_ROW = {  # as the card of hicai-zju/SciKnowEval shows one
    "question": "Which reacts?",
    "choices": {"text": ["Fe", "Au", "Ag", "Cu"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
    "type": "mcq-4-choices",
    "domain": "Chemistry",
    "details": {"level": "L3", "task": "t", "subtask": "s"},
}
MEDICAL_ROW = {"Question": "What helps?", "Complex_CoT": "Hm.", "Response": "Rest."}
HUB = {"science": [{**SCIENCE_ROW, "domain": "Biology"}, SCIENCE_ROW], "medical": [MEDICAL_ROW]}


def data_module(values: dict[str, Any], model_folder: Path) -> Any:
    """The data module of options as a YAML holds them, for the tiny model."""
    import jsonargparse

    from sdft_lightning.data import DemonstrationDataModule

    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DemonstrationDataModule, "data")
    parsed = parser.parse_object({"data": {**values, "model_name": str(model_folder)}})
    data = parser.instantiate_classes(parsed).data
    data.prepare_data()
    return data


@pytest.mark.parametrize("name", HUB)
def test_hub_sets_with_their_published_columns_make_the_rows_that_are_meant(
    name: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = HUB[name]
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> datasets.Dataset:
        asked.append((*names, options["split"]))
        return datasets.Dataset.from_list(rows * 40)

    monkeypatch.setattr(datasets, "load_dataset", load)
    values = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    data = data_module(values["data"], model_folder)
    data.setup("fit")
    row = data.training_rows()[0]
    if name == "science":
        assert asked[0] == ("hicai-zju/SciKnowEval", "v2", "test")
        assert row.prompt[-1]["content"].startswith("Given a question and four options, please")
        assert row.prompt[-1]["content"].endswith(
            "\n\nQuestion: Which reacts?\nA. Fe\nB. Au\nC. Ag\nD. Cu"
        )
        assert row.demonstration[-1]["content"] == "The correct answer is C."
        assert row.reference == "C"
        assert len(data.training_rows()) == 30
    else:
        assert asked[0] == ("FreedomIntelligence/medical-o1-reasoning-SFT", "en", "train")
        assert row.prompt[-1]["content"] == "What helps?"
        assert row.demonstration[-1]["content"] == "Rest."
        assert len(data.training_rows()) == 36


@pytest.mark.parametrize("name", ["data/tooluse.yaml", "tooluse_turns.yaml", "paper_tooluse.yaml"])
def test_configs_of_the_authors_files_read_such_rows_where_they_are_named(
    name: str, shared_data: Path, model_folder: Path
) -> None:
    folder = shared_data / "demonstrations" / "tooluse"
    values = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))["data"]
    values |= {
        "train": str(folder / "train_real114.jsonl"),  # stands in for the paper's train_data
        "validation": str(folder / "test_paper68.jsonl"),
        "test": str(folder / "test_97.jsonl"),
        "lengths": {"prompt": 10**6, "teacher_prompt": 10**6, "demonstration": 10**6},
    }
    data = data_module(values, model_folder)
    data.setup("fit")
    data.setup("test")
    assert {key: len(rows) for key, rows in data._sets.items()} == {
        "train": 114,
        "validation": 68,
        "test": 97,
    }


def test_later_config_wins(parse: Callable[[list[str]], dict[str, Any]]) -> None:
    sft = parse(
        [f"--config={CONFIGS / 'quickstart.yaml'}", f"--config={CONFIGS / 'model' / 'sft.yaml'}"]
    )
    assert sft["model"]["class_path"].endswith("SFTModule")


# Arguments of the paper's public main.py, their defaults, and where they stand here.
PAPER_ARGUMENTS = [
    ("model_name", "Qwen/Qwen2.5-7B-Instruct", "--model.policy.name", "other/model"),
    ("learning_rate", 2e-5, "--model.optimizer.init_args.lr", 1e-6),
    ("num_train_epochs", 1, "--trainer.max_epochs", 3),
    ("ref_model_mixup_alpha", 0.01, "--model.teacher.init_args.update_rate", 0.05),
    ("seed", 42, "--seed_everything", 7),
]


def look_up(config: dict[str, Any], option: str) -> Any:
    """The value that an option has in a config; `init_args` may be left out in options."""
    node: Any = config
    for part in option.removeprefix("--").split("."):
        if isinstance(node, dict) and part not in node and "init_args" in node:
            node = node["init_args"]
        node = node[part]
    return node


@pytest.mark.parametrize(("argument", "default", "option", "other"), PAPER_ARGUMENTS)
def test_argument_of_the_papers_main_has_its_default_and_reaches_the_run(
    argument: str,
    default: object,
    option: str,
    other: object,
    parse: Callable[[list[str]], dict[str, Any]],
) -> None:
    path = CONFIGS / "paper_tooluse.yaml"
    assert look_up(parse([f"--config={path}"]), option) == default
    assert look_up(parse([f"--config={path}", f"{option}={other}"]), option) == other
    assert f"`--{argument}` | `{option}" in (CONFIGS.parent / "README.md").read_text()


def test_paper_batch_is_32_prompts_and_its_other_settings_stand(
    parse: Callable[[list[str]], dict[str, Any]],
) -> None:
    config = parse([f"--config={CONFIGS / 'paper_tooluse.yaml'}"])
    model = config["model"]["init_args"]
    assert config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] == 32
    assert config["trainer"]["gradient_clip_val"] == 1
    assert model["schedule"] == {
        "name": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": None,
        "options": None,
    }
    assert model["sampling"]["max_new_tokens"] == 1024
    assert (model["sampling"]["temperature"], model["sampling"]["top_p"]) == (1.0, 1.0)
    assert model["sampling"]["completions_per_prompt"] == 1
    assert model["num_loss_tokens_to_skip"] == 3
    assert model["divergence"]["name"] == "forward_kl"
    assert model["divergence"]["estimator"] == "full_vocabulary"
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert config["data"]["prompts"]["style"] == "paper"
    readme = (CONFIGS.parent / "README.md").read_text()
    assert "`--num_prompts_per_batch` | `--data.batch_size`" in readme
    assert "`--output_dir` | `--run.root`" in readme


@pytest.mark.parametrize(("name", "rows"), [("test_paper68", 68), ("test_97", 97)])
def test_paper_lengths_leave_no_question_of_the_released_sets_out(
    name: str,
    rows: int,
    shared_data: Path,
    parse: Callable[[list[str]], dict[str, Any]],
) -> None:
    from transformers import AutoTokenizer

    from sdft_lightning.models.embedded import embedded_model_path

    lengths = parse([f"--config={CONFIGS / 'paper_tooluse.yaml'}"])["data"]["lengths"]
    assert lengths["too_long"] == "error"
    lines = (shared_data / "demonstrations" / "tooluse" / f"{name}.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    longest = [
        len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        for chat in chats
    ]
    assert len(longest) == rows
    assert max(longest) <= lengths["prompt"]


def test_paper_config_runs_with_a_tiny_model_in_place_of_the_7b_one(
    model_folder: Path,
    write_rows: Callable[..., Path],
    run_cli: Callable[..., None],
    tmp_path: Path,
) -> None:
    call = {"Action": "openDoor", "Action_Input": '{"door": "yellow"}'}
    rows = [
        {
            "prompt": f"Open door {i}",
            "golden_response": ["Thought: open", "Action: openDoor", f"Action Input: {i}"],
            "golden_answer": [call],
        }
        for i in range(32)
    ]
    path = write_rows(rows, "tooluse.jsonl")
    run_cli(
        "fit",
        f"--config={CONFIGS / 'paper_tooluse.yaml'}",
        f"--model.policy.name={model_folder}",
        f"--data.train={path}",
        f"--data.validation={path}",
        "--model.sampling.max_new_tokens=8",
        "--model.evaluation.max_new_tokens=4",
        "--trainer.accelerator=cpu",
    )
    lines = (tmp_path / "runs" / "paper_tooluse" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    trained = [record for record in records if record["stage"] == "train"]
    assert [record["step"] for record in trained] == [1]  # 32 prompts are one step of 8 x 4
    assert math.isfinite(trained[0]["train/loss"])
    assert "val/task/tooluse/accuracy" in records[-1]
    assert (tmp_path / "runs" / "paper_tooluse" / "exported" / "final").is_dir()
