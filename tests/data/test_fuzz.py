"""Given what nobody thought of, rows, prompts, masks and graders raise documented errors only."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdft_lightning.data.prompts import PromptStyle, render_student, render_teacher
from sdft_lightning.data.rows import Columns, parse_rows
from sdft_lightning.data.sources import Rows, read_rows
from sdft_lightning.errors import UserError
from sdft_lightning.graders import GRADERS, check_reference, get_grader
from sdft_lightning.losses.masking import completion_mask, loss_mask, position_ids, sequence_weights
from sdft_lightning.types import Demonstration, RowNeeds

# One machine's slowness is no failure, and the same examples are tried every time.
lenient = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tried(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a call returns, or the message with which it refuses."""
    try:
        return call(*arguments), ""
    except UserError as error:
        return None, str(error)


texts = st.text(max_size=12)
atoms = st.none() | st.booleans() | st.integers() | st.floats() | texts
roles = st.sampled_from(["system", "user", "assistant", "tool", "bot"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts | atoms}), max_size=4)
values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
cells = texts | messages | st.lists(texts, max_size=3) | values
raw_rows = st.lists(
    st.dictionaries(
        st.sampled_from(["prompt", "demonstration", "context", "reference", "id"]), cells
    ),
    min_size=1,
    max_size=3,
)


@lenient
@given(rows=raw_rows, require=st.booleans(), grader=st.sampled_from([None, *GRADERS]))
def test_rows_are_parsed_into_what_the_rest_relies_on_or_refused(
    rows: list[dict[str, Any]], require: bool, grader: str | None
) -> None:
    places = [f"line {number}" for number in range(1, len(rows) + 1)]
    columns = Columns(context="context", reference="reference", id="id")

    def check(reference: Any, where: str) -> None:
        assert grader is not None
        check_reference(grader, reference, where)

    found = Rows("rows.jsonl", rows, places)
    needs = RowNeeds(demonstration=require)
    parsed, refusal = tried(parse_rows, found, columns, needs, None if grader is None else check)
    if refusal:
        assert "rows.jsonl" in refusal
        return
    assert len({row.id for row in parsed}) == len(rows)
    for row in parsed:
        assert row.prompt[-1]["role"] == "user"
        assert row.prompt[-1]["content"].strip()
        assert row.demonstration or not require
        assert all(isinstance(each["content"], str) for each in row.prompt + row.demonstration)
        assert row.context is None or isinstance(row.context, str)
        if grader is not None:
            assert 0 <= get_grader(grader)("48", row.reference) <= 1


@lenient
@given(question=texts.filter(str.strip), answer=texts.filter(str.strip), context=texts)
def test_prompts_hold_their_parts_verbatim_whatever_stands_in_them(
    question: str, answer: str, context: str, tokenizer: Any
) -> None:
    row = Demonstration(
        id="1",
        prompt=[{"role": "user", "content": question}],
        demonstration=[{"role": "assistant", "content": answer}],
        context=context,
        reference=None,
        origin="rows.jsonl, line 1",
    )
    for name in ("paper", "turns", "context"):
        style = PromptStyle(name)  # type: ignore[arg-type]
        student = render_student(tokenizer, row, style)
        assert question in student
        untaught = row._replace(demonstration=[], context=None)
        assert student == render_student(tokenizer, untaught, style)
        if name == "context" and not context:
            with pytest.raises(UserError, match=r"rows\.jsonl, line 1"):
                render_teacher(tokenizer, row, style)
            continue
        teacher = render_teacher(tokenizer, row, style)
        assert question in teacher
        assert answer in teacher
        assert name != "context" or context in teacher


pieces = st.sampled_from(
    ["$prompt", "$demonstration", "${context}", "$", "$$", "$x", "${", "}", "\n", "é", "Q: "]
)


@lenient
@given(parts=st.lists(pieces | texts, max_size=6))
def test_own_template_is_taken_and_filled_or_refused_with_its_name(
    parts: list[str], tokenizer: Any
) -> None:
    template = "".join(parts)
    style, refusal = tried(PromptStyle, "template", template)
    if refusal:
        assert "prompts.template" in refusal
        return
    row = Demonstration(
        "1",
        [{"role": "user", "content": "<<Q>>"}],
        [{"role": "assistant", "content": "<<A>>"}],
        "<<C>>",
        None,
        "r",
    )
    shown = render_teacher(tokenizer, row, style)
    assert "<<Q>>" in shown
    assert "<<A>>" in shown or "<<C>>" in shown


@lenient
@given(
    ids=st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
    stops=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    skip=st.integers(0, 7),
    opens=st.booleans(),
)
def test_masks_equal_a_reading_token_by_token(
    ids: list[list[int]], stops: set[int], skip: int, opens: bool
) -> None:
    think, end = 4, 5
    tokens = torch.tensor(ids)  # (B, T)
    kept = completion_mask(tokens, stops)
    counted = loss_mask(tokens, kept, skip, end, opens, think)
    weights = sequence_weights(counted)
    for row, line in enumerate(ids):
        length = next((i + 1 for i, token in enumerate(line) if token in stops), len(line))
        assert kept[row].tolist() == [i < length for i in range(len(line))]
        closed = line.index(end) + 1 if end in line[:length] else None
        start = closed if closed is not None else (len(line) if opens or line[0] == think else 0)
        expected = [i < length and not start <= i < start + skip for i in range(len(line))]
        assert counted[row].tolist() == expected
        total = float(weights[row].sum()) * len(ids)
        assert total == pytest.approx(1.0 if any(expected) else 0.0)
    positions = position_ids(kept)
    assert positions.min() >= 0
    assert positions[kept].tolist() == [i for row in kept.tolist() for i in range(sum(row))]


@lenient
@given(text=texts, reference=cells, grader=st.sampled_from(list(GRADERS)))
def test_reference_is_refused_before_training_or_any_answer_gets_a_score(
    text: str, reference: Any, grader: str
) -> None:
    _, refusal = tried(check_reference, grader, reference, "rows.jsonl, line 1")
    if refusal:
        assert refusal.startswith(f"rows.jsonl, line 1: grader '{grader}'")
        return
    score = get_grader(grader)(text, reference)
    assert 0 <= score <= 1
    assert get_grader(grader)(text, reference) == score


calls = st.lists(
    st.fixed_dictionaries(
        {
            "Action": st.from_regex(r"[A-Za-z]\w{0,8}", fullmatch=True),
            "Action_Input": st.dictionaries(texts, values, max_size=3).map(json.dumps),
        }
    ),
    min_size=1,
    max_size=3,
)


@lenient
@given(reference=calls)
def test_strict_tool_grader_calls_every_gold_answer_right(reference: list[dict[str, str]]) -> None:
    gold = "".join(
        f"Action: {call['Action']}\nAction Input: {call['Action_Input']}\n" for call in reference
    )
    constants: list[str] = []
    for call in reference:
        json.loads(call["Action_Input"], parse_constant=constants.append)
    expected = 0.0 if "NaN" in constants else 1.0  # NaN equals nothing, not itself either
    assert get_grader("tool_call")(gold, reference) == expected
    assert get_grader("tool_call")("", reference) == 0.0


@lenient
@given(answer=texts)
def test_answer_given_word_for_word_is_right(answer: str) -> None:
    for grader in ("contains", "exact", "token_f1"):
        _, refusal = tried(check_reference, grader, answer, "r")
        assert refusal or get_grader(grader)(answer, answer) == 1.0, grader


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a\\ud800b"}', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ('{"prompt": ' + "9" * 5000 + "}", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
    ],
)
def test_json_that_python_itself_stumbles_over_is_refused_with_its_line(
    line: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q?"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2.*{words}"):
        read_rows(str(path), "data.train")


def test_both_halves_of_a_character_are_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 \\\\ud800"}\n')
    assert read_rows(str(path), "data.train").rows == [{"prompt": "😀 \\ud800"}]


def test_conversation_that_the_chat_template_refuses_is_told(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('System role not supported') }}")
    row = Demonstration("1", [{"role": "user", "content": "Q?"}], [], None, None, "r")
    with pytest.raises(UserError, match=r"roles user: System role not supported .*'Q\?'"):
        render_student(tokenizer, row, PromptStyle())


def test_thousands_of_broken_files_meet_documented_errors_only(tokenizer: Any) -> None:
    path = Path(__file__).parents[2] / "scripts" / "fuzz_rows.py"
    spec = importlib.util.spec_from_file_location("fuzz_rows", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outcomes = script.fuzz(3000, 1, tokenizer)
    assert sum(outcomes.values()) == 3000
    assert min(outcomes["accepted"], outcomes["refused"]) > 300  # the loop sees both sides
