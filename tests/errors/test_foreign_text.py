"""What others have written, in messages: masked, without control codes, cut."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from sdft_lightning.errors import UserError, key_from, mask, printable

pytestmark = pytest.mark.attack

KEY = 'k"ey/with ödd+chars'


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdft_lightning.errors._keys", set())
    monkeypatch.setenv("MY_VARIABLE", f" {KEY}\n")
    assert key_from("MY_VARIABLE") == KEY


@pytest.mark.parametrize("form", [KEY, json.dumps(KEY), quote(KEY, safe=""), f"Bearer {KEY}!"])
def test_key_is_masked_in_each_form_that_it_travels_in(form: str) -> None:
    for part in ("k", "ey", "dd", "chars"):
        assert part not in mask(form).replace("Bearer ", "")
    assert "***" in mask(form)


def test_variables_named_like_secrets_are_masked_and_short_words_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("USES_TOKEN", "true")
    assert mask("hf_0123456789 is true") == "*** is true"


def test_key_that_is_a_common_word_is_masked_as_a_word_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHORT", "key")
    key_from("SHORT")
    assert mask("monkey key, key_a") == "monkey ***, ***_a"


def test_longer_key_is_masked_before_one_that_it_begins_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A", "abcdefgh")
    monkeypatch.setenv("B", "abcdefgh-tail")
    key_from("A"), key_from("B")
    assert mask("abcdefgh-tail") == "***"


def test_user_and_password_in_a_url_are_masked() -> None:
    text = "no http://me:p@ss@host/a@b, ssh://git@h and mail a@b.c"
    assert mask(text) == "no http://***@host/a@b, ssh://***@h and mail a@b.c"


@pytest.mark.parametrize(
    "code",
    [
        "\x1b[2J",
        "\x9b2J",
        "\x1b]0;title\x07",
        "\r",
        "\n",
        "\x00",
        "\u202e",
        "\ud800",
        "\u2028",
        "\x7f",
    ],
)
def test_control_codes_become_blanks_and_the_text_one_line(code: str) -> None:
    shown = printable(f"a{code}b")
    assert shown.isprintable()
    assert shown[0] == "a"
    assert shown[-1] == "b"
    assert shown.encode()


def test_text_is_cut_at_300_and_a_key_at_the_cut_is_masked_before_it() -> None:
    assert printable("x" * 300) == "x" * 300
    assert printable("x" * 10_000_000) == "x" * 297 + "..."
    shown = printable("x" * 290 + KEY)
    assert shown == "x" * 290 + "***"
    assert printable("  \n " * 1_000_000 + KEY + "a") == "***a"


def test_whatever_stands_in_a_user_error_is_harmless_and_keeps_its_lines() -> None:
    error = UserError(f"first\nrow \x1b[31m says {KEY} at http://me:pw@host")
    assert str(error) == "first\nrow  [31m says *** at http://***@host"
