"""Where an answer ends: the chat template's own token stops sampling, or the model is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models import tokenization
from sdft_lightning.models.chat_template import conversation_ids, turn_end_ids, turn_texts
from sdft_lightning.models.tokenization import load_stop_ids, load_tokenizer, stop_ids
from sdft_lightning.types import Tokens

END_OF_TEXT, IM_END = 0, 2


def template(end: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.fixture
def model_that_stops_elsewhere(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The tiny model with <|endoftext|> as end in all its files, as its template never writes."""
    monkeypatch.setattr(tokenization, "_TOLD", set())
    folder = make_model_folder("elsewhere", eos_token_id=END_OF_TEXT)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_token_that_ends_a_turn_in_the_template_alone_stops_sampling_and_is_told_once(
    model_that_stops_elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(model_that_stops_elsewhere)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == END_OF_TEXT
    with caplog.at_level(logging.WARNING):
        assert load_stop_ids(folder, tokenizer) == [END_OF_TEXT, IM_END]
        assert load_policy(Policy(folder)).stop_ids == [END_OF_TEXT, IM_END]
    told = [record.message for record in caplog.records if "ends an answer" in record.message]
    assert len(told) == 1
    assert (
        "ends an answer with <|im_end|>, and the model's files name <|endoftext|> only" in told[0]
    )


def test_config_alone_counts_for_data_and_policy(
    model_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = [7, IM_END]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_stop_ids(str(folder), load_tokenizer(str(folder))) == [IM_END, 7]
    assert load_policy(Policy(str(folder))).stop_ids == [IM_END, 7]


@pytest.mark.parametrize("value", ["</s>", 1.5, -1, [2, "x"], True, [[2]]])
def test_stop_id_that_is_none_is_a_sentence(value: Any, tokenizer: Any) -> None:
    class Config:
        eos_token_id = value

    with pytest.raises(UserError, match=r"Config has the eos_token_id .*config\.json"):
        stop_ids(tokenizer, None, Config())


@pytest.mark.parametrize(
    ("end", "stops", "added"),
    [
        ("<|im_end|>\n", [IM_END], []),
        ("<|im_end|>\n", [END_OF_TEXT], [IM_END]),
        (" <|im_end|>", [END_OF_TEXT], [IM_END]),
        ("<|im_end|><|endoftext|>", [END_OF_TEXT], [IM_END]),  # the first of both, as Phi 3 has it
        ("\n", [END_OF_TEXT], []),
        ("", [END_OF_TEXT], []),
        ("[END]<|endoftext|>", [END_OF_TEXT], []),
    ],
)
def test_first_token_behind_an_answer_is_added_where_nothing_stops_there(
    end: str, stops: list[int], added: list[int], make_tokenizer: Callable[..., Any]
) -> None:
    assert turn_end_ids(make_tokenizer(template(end)), stops, "m") == added


def test_text_of_several_tokens_behind_an_answer_is_refused(
    make_tokenizer: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match=r"'</answer>'.*<\|im_end\|> only.*special token"):
        turn_end_ids(make_tokenizer(template("</answer>\n")), [IM_END], "m")


def test_each_of_several_templates_is_looked_at(make_tokenizer: Callable[..., Any]) -> None:
    several = {"rag": template("<|endoftext|>"), "plain": template("<|im_end|>")}
    assert turn_end_ids(make_tokenizer(several), [END_OF_TEXT], "m") == [IM_END]


def test_template_that_shows_no_answer_is_told(
    make_tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("{{ messages[0].content }}", "{{ 1 / 0 }}"):
        assert turn_end_ids(make_tokenizer(text), [IM_END], "m") == []
        assert "shows no answer of the assistant" in caplog.text
        caplog.clear()
    assert turn_end_ids(make_tokenizer(None), [IM_END], "m") == []


def test_tokens_of_the_conversation_are_those_around_plain_turns(
    with_template: Callable[[str], Any],
) -> None:
    for name in ("drops_thinking", "opens_thinking", "qwen3_like"):
        tokenizer = with_template(name)
        # <think> and </think> are special tokens of this tokenizer, and not of a conversation.
        assert conversation_ids(tokenizer, [IM_END]) == {0, 1, 2}
    texts = turn_texts(with_template("blank_before_answer"))
    assert (texts.header, texts.lead, texts.behind) == ("", " ", "</s>")


@pytest.mark.embedded
def test_embedded_model_with_another_end_in_its_files_answers_once_and_is_graded_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from sdft_lightning.models.chat_template import AnswerReader, render
    from sdft_lightning.models.embedded import embedded_model_path
    from sdft_lightning.rollout import greedy_rollout

    monkeypatch.setattr(tokenization, "_TOLD", set())
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            values["eos_token_id"] = 0
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)

    policy = load_policy(Policy(str(folder)))
    assert policy.stop_ids == [0, 2]
    asked = render(policy.tokenizer, [{"role": "user", "content": "What is 1 + 1?"}], {})
    ids = torch.tensor([policy.tokenizer(asked, add_special_tokens=False).input_ids])
    model = policy.model.eval()
    wrong = greedy_rollout(model, Tokens(ids, torch.ones_like(ids).bool()), 80, [0], 0)
    assert 2 in wrong.completion_ids[0, :-1].tolist()  # it runs on into a turn that it invents
    right = greedy_rollout(model, Tokens(ids, torch.ones_like(ids).bool()), 80, policy.stop_ids, 0)
    said = AnswerReader(policy.tokenizer, policy.stop_ids).text(
        right.completion_ids[0][right.completion_mask[0]].tolist()
    )
    assert not right.truncated[0]
    assert right.completion_ids[0][right.completion_mask[0]][-1] == 2
    assert "user" not in said
    assert "<|" not in said
