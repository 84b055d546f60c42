"""Instructions whose following a program can check, in the manner of IFEval.

A row has a `prompt` and `checks`, a list of `{kind, ...}`: the kind is a key of `CHECKS`, and all
else are its options. Strict scores look at the answer as it is. Loose scores also look at it
without its first line, its last line, both, and without asterisks, and take the best.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.graders import get_grader
from sdft_lightning.graders.texts import WORD, answer_shape

Check = Mapping[str, Any]

_BULLET = re.compile(r"[ \t]*[-*•][ \t]+(\S.*)")
_STEP = re.compile(r"[ \t]*(?:step[ \t]+)?(\d{1,3})[.):][ \t]+\S", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*]*(?=\s|$)")
_ABBREVIATION = re.compile(  # its full stop ends no sentence
    r"\b(?:Mr|Mrs|Ms|Dr|St|vs|P\.S)\.|\b(?:e\.g|i\.e|etc|a\.m|p\.m)\.(?=,|\s+[a-z])"
)
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)\n?```", re.DOTALL)

# The commonest words that tell these languages apart. Written in Latin letters, a text is in the
# language that has most of them; other languages are known by their letters.
_COMMON_WORDS = {
    "English": "the and of is in to it you that was for are with they this be have not my we",
    "German": "der die das und ist nicht ein eine ich zu mit den auf sie für im wir von es dem",
    "French": "le les des et est une dans pour pas je vous nous du sur avec il elle au qui ce",
    "Spanish": "el los las y es una en por para no con del se que muy pero como su está mi",
    "Italian": "il gli di e è una per non con del della che si sono la nel più ma le lo",
    "Portuguese": "o os as e é uma em por para não com do da que se muito mas um no na",
}
_LETTERS = {
    "Russian": r"[\u0400-\u04ff]",
    "Greek": r"[\u0370-\u03ff]",
    "Japanese": r"[\u3040-\u30ff\u4e00-\u9fff]",
}
LANGUAGES = (*_COMMON_WORDS, *_LETTERS)
_COMMON_SHARE = 0.12  # at least, of the words of a text in that language


def strict_score(answer: str, checks: Iterable[Check]) -> list[bool]:
    """Whether an answer follows each instruction; an empty answer follows none.

    Args:
        answer: What the model said.
        checks: `{kind, ...}` each.
    """
    return [bool(answer.strip()) and _follows(answer, check) for check in checks]


def loose_score(answer: str, checks: Iterable[Check]) -> list[bool]:
    """Whether an answer, or what is left of it without an opening or closing line, follows each.

    Args:
        answer: What the model said.
        checks: `{kind, ...}` each.
    """
    cut = answer.split("\n")
    forms = [answer, *("\n".join(part).strip() for part in (cut[1:], cut[:-1], cut[1:-1]))]
    forms += [form.replace("*", "") for form in forms]
    return [any(form.strip() and _follows(form, check) for form in forms) for check in checks]


def graded(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score an answer, for `process_results` of a task YAML.

    Args:
        doc: The row.
        results: The answer.

    Returns:
        Whether all instructions are followed, and each, strictly and loosely; the words of the
        answer, and the share of its pairs of neighbouring words that are different ones (1 where
        nothing is repeated, near 0 in a loop).
    """
    answer, checks = results[0], _checks(doc)
    strict, loose = strict_score(answer, checks), loose_score(answer, checks)
    shape = answer_shape(answer)
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
        "answer_words": shape.words,
        "answer_distinct_2": shape.distinct_2,
    }


def share_of_instructions(items: list[list[bool]]) -> float:
    """The share of instructions that were followed, for `aggregation` of a task YAML.

    Args:
        items: For each row whether each of its instructions was followed.
    """
    followed = [each for row in items for each in row]
    return sum(followed) / len(followed)


def checked(rows: Any) -> Any:
    """Refuse rows whose checks are none, for `process_docs` of a task YAML.

    Args:
        rows: A Dataset with the columns `prompt` and `checks`.

    Returns:
        The same rows.

    Raises:
        UserError: If a row has no checks, or one of a kind or with options that there are not.
    """
    for number, row in enumerate(rows, start=1):
        checks = _checks(row)
        if not checks:
            raise UserError(
                f"checks: row {number} has none. Give it at least one, or leave it out."
            )
        for check in checks:
            _refuse_unknown(check, number)
    return rows


def _checks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks of a row, without the empty options that a table of rows adds."""
    found = row.get("checks") or []
    return [{key: value for key, value in each.items() if value is not None} for each in found]


def _follows(answer: str, check: Check) -> bool:
    options = {key: value for key, value in check.items() if key != "kind"}
    return CHECKS[check["kind"]](answer, **options)


def _refuse_unknown(check: Check, number: int) -> None:
    kind = check.get("kind")
    if kind not in CHECKS:
        raise UserError(
            f"checks: row {number} has the kind {kind!r}. Allowed are {', '.join(CHECKS)}."
        )
    parameters = inspect.signature(CHECKS[kind]).parameters
    options = {name for name in check if name != "kind"}
    allowed = [name for name in parameters if name != "answer"]
    needed = {name for name in allowed if parameters[name].default is inspect.Parameter.empty}
    if not needed <= options <= set(allowed):
        raise UserError(
            f"checks: row {number}: {kind} has the options {sorted(options)}. Allowed are "
            f"{', '.join(allowed) or 'none'}, needed {', '.join(sorted(needed)) or 'none'}."
        )
    if kind == "language" and check["text"] not in LANGUAGES:
        raise UserError(
            f"checks: row {number}: the text of language is {check['text']!r}. Allowed are "
            f"{', '.join(LANGUAGES)}."
        )


def _within(count: int, at_least: int, at_most: int | None) -> bool:
    return at_least <= count and (at_most is None or count <= at_most)


def words(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of words."""
    return _within(len(WORD.findall(answer)), at_least, at_most)


def characters(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of characters, spaces counted."""
    return _within(len(answer.strip()), at_least, at_most)


def _sentences(answer: str) -> list[str]:
    """The sentences; a line ends one, and the number or sign of a list item is none of it."""
    found = []
    for line in answer.splitlines():
        plain = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), line)
        plain = re.sub(r"^\s*(?:[-*•#>]+|\d{1,3}[.)])\s+", "", plain)
        found += [each.strip() for each in _SENTENCE_END.split(plain) if WORD.search(each)]
    return found


def sentences(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of sentences."""
    return _within(len(_sentences(answer)), at_least, at_most)


def sentences_start(answer: str, text: str, at_least: int = 2) -> bool:
    """Every sentence begins with a text, and there are enough of them."""
    found = _sentences(answer)
    begin = re.compile(rf"[\"'“(*]*{re.escape(text)}(?!\w)", re.IGNORECASE)
    return len(found) >= at_least and all(begin.match(each) for each in found)


def paragraphs(
    answer: str, at_least: int = 1, at_most: int | None = None, separator: str = ""
) -> bool:
    """A number of paragraphs, between blank lines or lines that hold the separator alone."""
    line = rf"[ \t]*{re.escape(separator)}[ \t]*"
    parts = re.split(rf"(?:^|\n){line}(?:\n|$)" if separator else r"\n\s*\n", answer.strip())
    return all(part.strip() for part in parts) and _within(len(parts), at_least, at_most)


def lines(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of lines that are not blank."""
    found = [line for line in answer.splitlines() if line.strip()]
    return _within(len(found), at_least, at_most)


def lines_start(answer: str, text: str, at_least: int = 2) -> bool:
    """Every line begins with a text, signs and numbers before it left out."""
    found = _bare_lines(answer)
    return len(found) >= at_least and all(each.startswith(text.lower()) for each in found)


def _bare_lines(answer: str) -> list[str]:
    """The lines in small letters, without the signs and numbers before them."""
    found = [re.sub(r"^[\W\d_]+", "", line).lower() for line in answer.splitlines()]
    return [line for line in found if line]


def bullets(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of list items that begin with -, * or •."""
    found = [line for line in answer.splitlines() if _BULLET.match(line)]
    return _within(len(found), at_least, at_most)


def steps(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """Lines numbered from 1 on without a gap: "1. …", "2) …", "Step 3: …"."""
    found = [_STEP.match(line) for line in answer.splitlines()]
    numbers = [int(each[1]) for each in found if each]
    in_order = numbers == list(range(1, len(numbers) + 1))
    return in_order and _within(len(numbers), at_least, at_most)


def alphabetical(answer: str, at_least: int = 2) -> bool:
    """Lines in the order of the alphabet, signs and numbers before them left out."""
    found = _bare_lines(answer)
    return len(found) >= at_least and found == sorted(found)


def sections(answer: str, text: str, at_least: int = 2, at_most: int | None = None) -> bool:
    """Lines that begin with a heading and a number, from 1 on: "Part 1", "Part 2"."""
    heading = re.compile(rf"[#*\s]*{re.escape(text)}[ \t]+(\d{{1,3}})\b", re.IGNORECASE)
    numbers = [int(each[1]) for line in answer.splitlines() if (each := heading.match(line))]
    return numbers == list(range(1, len(numbers) + 1)) and _within(len(numbers), at_least, at_most)


def lowercase(answer: str) -> bool:
    """No capital letter."""
    return answer.islower()


def uppercase(answer: str) -> bool:
    """Capital letters only."""
    return answer.isupper()


def capital_words(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of words of two and more letters that are written in capitals."""
    found = [word for word in WORD.findall(answer) if len(word) > 1 and word.isupper()]
    return _within(len(found), at_least, at_most)


def include(answer: str, words: list[str]) -> bool:
    """Every one of the words or texts stands in the answer, in any case."""
    holds = get_grader("contains")
    return all(holds(answer, word) for word in words)


def avoid(answer: str, words: list[str]) -> bool:
    """None of the words stands in the answer, in any case."""
    return not get_grader("contains")(answer, words)


def without(answer: str, words: list[str]) -> bool:
    """None of the characters or texts stands in the answer, also inside of words."""
    return not any(each in answer for each in words)


def frequency(answer: str, text: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A word or text occurs so many times, in any case."""
    pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
    return _within(len(re.findall(pattern, answer, re.IGNORECASE)), at_least, at_most)


def letter(answer: str, text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """A letter occurs so many times, in any case."""
    return _within(answer.lower().count(text.lower()), at_least, at_most)


def starts(answer: str, text: str) -> bool:
    """The answer begins with a text, in any case."""
    beyond = r"(?!\w)" if text[-1].isalnum() else ""
    said = " ".join(answer.split())
    return re.match(re.escape(text) + beyond, said, re.IGNORECASE) is not None


def ends(answer: str, text: str) -> bool:
    """The answer ends with a text, in any case; behind a word there may be a full stop or quote."""
    said = " ".join(answer.split())
    said = said.rstrip(".!?\"'”’*") if text[-1].isalnum() else said
    before = r"(?<!\w)" if text[0].isalnum() else ""
    return re.search(before + re.escape(text) + r"\Z", said, re.IGNORECASE) is not None


def one_of(answer: str, words: list[str]) -> bool:
    """The answer is one of the texts and nothing else, but for case and a full stop."""
    return bool(get_grader("exact")(answer, words))


def quoted(answer: str) -> bool:
    """The whole answer stands in double quotation marks."""
    text = answer.strip()
    return len(text) > 2 and text[0] in '"“' and text[-1] in '"”'


def title(answer: str) -> bool:
    """A title stands in double angular brackets, <<like this>>."""
    return re.search(r"<<[^<>\n]*\w[^<>\n]*>>", answer) is not None


def postscript(answer: str, text: str = "P.S.") -> bool:
    """A line that is not the first begins with P.S. and goes on."""
    return (
        re.search(rf"\n[ \t*]*{re.escape(text)}\W*\w", answer.lstrip(), re.IGNORECASE) is not None
    )


def placeholders(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of places to fill in, in square brackets: [name]."""
    return _within(len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", answer)), at_least, at_most)


def bold(answer: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """A number of parts between asterisks, *one* or two at each end."""
    found = re.findall(r"\*\*[^*\n]*\w[^*\n]*\*\*|(?<!\*)\*[^*\s][^*\n]*\*(?!\*)", answer)
    return _within(len(found), at_least, at_most)


def _unfenced(answer: str) -> str:
    """What stands in the only code fence, if the answer is nothing else."""
    found = _FENCE.fullmatch(answer.strip())
    return found[1] if found else answer.strip()


def json_value(
    answer: str,
    words: list[str] | None = None,
    at_least: int = 1,
    at_most: int | None = None,
) -> bool:
    """The answer is JSON: an object with the given keys, or a list of so many items."""
    try:
        value = json.loads(_unfenced(answer))
    except (ValueError, RecursionError):
        return False
    if words is not None:
        return isinstance(value, dict) and set(words) <= set(value)
    return isinstance(value, list) and _within(len(value), at_least, at_most)


def csv_rows(answer: str, columns: int, at_least: int = 2, at_most: int | None = None) -> bool:
    """Lines of values between commas, all of so many columns, the header counted."""
    try:
        rows = [row for row in csv.reader(_unfenced(answer).splitlines()) if row]
    except csv.Error:
        return False
    return all(len(row) == columns for row in rows) and _within(len(rows), at_least, at_most)


def table(answer: str, columns: int, at_least: int = 1, at_most: int | None = None) -> bool:
    """A Markdown table: a header, a line of dashes, and so many rows of so many columns."""
    found = [line.strip().strip("|").split("|") for line in answer.splitlines() if "|" in line]
    if len(found) < 2 or not all(re.fullmatch(r"[ :\-]*-[ :\-]*", cell) for cell in found[1]):
        return False
    even = all(len(row) == columns for row in found)
    return even and _within(len(found) - 2, at_least, at_most)


def language(answer: str, text: str) -> bool:
    """The answer is written in a language of `LANGUAGES`.

    Args:
        answer: What the model said.
        text: The language's name in English.
    """
    if text in _LETTERS:
        letters = sum(character.isalpha() for character in answer)
        return letters > 0 and len(re.findall(_LETTERS[text], answer)) > 0.7 * letters
    said = [word.lower() for word in WORD.findall(answer)]
    counts = {
        name: sum(word in common.split() for word in said) for name, common in _COMMON_WORDS.items()
    }
    most = counts.pop(text)
    return most >= max(2, _COMMON_SHARE * len(said)) and most > max(counts.values())


# fmt: off
_FUNCTIONS: tuple[Callable[..., bool], ...] = (
    words, characters, sentences, sentences_start, paragraphs, lines, lines_start, bullets, steps,
    alphabetical, sections, lowercase, uppercase, capital_words, include, avoid, without, frequency,
    letter, starts, ends, one_of, quoted, title, postscript, placeholders, bold, json_value,
    csv_rows, table, language,
)
# fmt: on
CHECKS: dict[str, Callable[..., bool]] = {each.__name__: each for each in _FUNCTIONS}
