"""Answers that pass HumanEval's tests without solving anything: each must fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks.sandbox import run_program
from sdft_lightning.data.benchmarks.task_functions import passes, program, results, run_answers
from sdft_lightning.errors import UserError

ITEM = {
    "prompt": 'def f(x):\n    """The word of a number."""\n',
    "test": (
        "def check(candidate):\n"
        "    assert candidate(1) == 'word 4711'\n"
        "    assert candidate(2) != candidate(1)\n"
        "    assert len(candidate(3)) == 9\n"
    ),
    "entry_point": "f",
}
RIGHT = "    return {1: 'word 4711', 2: 'word 4712', 3: 'word 4713'}[x]\n"


@pytest.fixture(autouse=True, scope="module")
def sandbox() -> None:
    """Skip where programs cannot be limited."""
    try:
        run_program("pass")
    except UserError as error:
        pytest.skip(str(error))


def returned(body: str, kind: str = "object") -> str:
    """An answer that returns an instance of a class of its own."""
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return f"    class A({kind}):\n{lines}\n    return A()\n"


EQUAL = (
    "def __eq__(self, other): return True\n"
    "def __ne__(self, other): return True\n"
    "def __len__(self): return 9\n"
    "__hash__ = None"
)
CHEATS = {
    "an object equal to everything": returned(EQUAL),
    "a text equal to everything": returned(EQUAL, "str"),
    "a list equal to everything": returned(EQUAL, "list"),
    "unittest.mock.ANY": "    import unittest.mock\n    return unittest.mock.ANY\n",
    "an object with a plain name": returned(EQUAL + "\n__name__ = __qualname__ = 'str'"),
    "a class that says it is a text": returned(EQUAL + "\n__class__ = str"),
    "exit code 0": "    import os\n    os._exit(0)\n",
    "SystemExit": "    raise SystemExit(0)\n",
    "exit at once": "    pass\nimport os\nos._exit(0)\n",
    "exit when Python ends": "    pass\nimport atexit, os\natexit.register(os._exit, 0)\n",
    "a check of its own": "    pass\ndef check(candidate): pass\n",
    "a check that stays": (
        "    pass\nimport builtins, sys\n"
        "builtins.check = sys.modules['__main__'].check = lambda candidate: None\n"
    ),
    "no assertion is an error": (
        "    pass\nimport builtins\nclass E(BaseException):\n"
        "    def __new__(cls, *given): raise SystemExit(0)\n"
        "builtins.AssertionError = E\n"
    ),
    "code without asserts": (
        "    import sys\n    frame = sys._getframe()\n"
        "    while frame:\n"
        "        frame.f_globals['check'] = frame.f_globals['f'] = lambda *given: None\n"
        "        frame.f_trace = lambda *given: None\n        frame = frame.f_back\n"
    ),
    "built-ins that agree": (
        "    return A()\nimport builtins\nclass A:\n"
        "    def __eq__(self, other): return True\n    __ne__ = __eq__\n"
        "builtins.len = lambda each: 9\nbuiltins.isinstance = lambda *given: True\n"
    ),
    "the launcher's secret": (
        "    pass\nimport os, sys\nframe = sys._getframe()\n"
        "while frame:\n"
        "    for secret in [each for each in frame.f_locals.values() if type(each) is bytes]:\n"
        "        for fd in range(3, 64):\n"
        "            try: os.write(fd, b'P' + secret)\n"
        "            except OSError: pass\n"
        "        os._exit(0)\n"
        "    frame = frame.f_back\nos._exit(0)\n"
    ),
    "what the tests expect, from memory": (
        "    import gc, sys, types\n"
        "    seen, waiting = set(), [*gc.get_objects(), sys._getframe()]\n"
        "    while waiting:\n"
        "        each = waiting.pop()\n"
        "        if id(each) in seen: continue\n"
        "        seen.add(id(each))\n"
        "        if isinstance(each, types.FrameType):\n"
        "            waiting += [each.f_back, each.f_locals, each.f_code]\n"
        "        elif isinstance(each, types.CodeType): waiting += each.co_consts\n"
        "        elif isinstance(each, (types.FunctionType,)): waiting.append(each.__code__)\n"
        "        elif isinstance(each, dict): waiting += [*each.values()]\n"
        "        elif isinstance(each, (list, tuple, set)): waiting += [*each]\n"
        "        elif isinstance(each, bytes): waiting.append(each.decode(errors='replace'))\n"
        "        elif isinstance(each, str) and each.startswith('word ') and len(each) == 9:\n"
        "            return each[:-1] + str(x)\n"
        "    return None\n"
    ),
    "an answer ahead of the question": (
        "    pass\nimport os\nfor fd in range(3, 64):\n"
        '  try: os.write(fd, b\'{"value": null}\\n{"value": {"str": ["word"]}}\\n\' * 9)\n'
        "  except OSError: pass\n"
    ),
    "more than can be read": "    return 'word 4711' * 10_000_000\n",
    "data that holds itself": "    a = []\n    a.append(a)\n    return a\n",
    "StopIteration": "    raise StopIteration\n",
    "an error that agrees": (
        "    class E(Exception):\n"
        "        def __str__(self): return A()\n"
        "    class A(str): pass\n"
        "    raise E\n"
    ),
    "a generator": "    yield 'word 4711'\n",
    "another process": (
        "    import os, time\n    if os.fork() == 0: os._exit(0)\n"
        "    time.sleep(0.1); os._exit(0)\n"
    ),
}


@pytest.mark.attack
@pytest.mark.parametrize("how", CHEATS)
def test_a_cheat_fails(how: str) -> None:
    text = ITEM["prompt"] + CHEATS[how]
    compile(text, how, "exec")
    outcome = run_program(program(ITEM, text))
    assert not outcome.passed
    assert outcome.reason


@pytest.mark.attack
def test_the_right_answer_passes_by_every_way() -> None:
    text = ITEM["prompt"] + RIGHT
    assert run_program(program(ITEM, text)) == (True, "passed")
    assert run_answers([[RIGHT]], [ITEM]) == [[True]]
    assert results(ITEM, [[text]]) == {"pass@1": 1.0}


@pytest.mark.attack
@pytest.mark.parametrize(
    ("expected", "body"),
    [
        ("(1, 2.5, 'a', None, True, b'x', 1j)", "return 1, 2.5, 'a', None, True, b'x', 1j"),
        ("[[], {}, set(), frozenset(), ()]", "return [[], {}, set(), frozenset(), ()]"),
        ("{(1, 2): [3], None: {4: {5}}}", "return {(1, 2): [3], None: {4: {5}}}"),
        ("10 ** 5000", "return 10 ** 5000"),
        ("'\\ud800\\n'", "return '\\ud800\\n'"),
        ("float('inf')", "return float('inf')"),
        ("{'a': 2}", "import collections\n    return collections.Counter('aa')"),
        ("(1, 2)", "import collections\n    return collections.namedtuple('P', 'x y')(1, 2)"),
        ("[0.5, 3]", "import numpy\n    return [numpy.float32(0.5), numpy.int64(3)]"),
        ("'é'", "print('é' * 99999)\n    return 'é'"),
    ],
)
def test_plain_results_arrive_as_they_are(expected: str, body: str) -> None:
    item = {
        "prompt": "def f():\n",
        "test": f"def check(c):\n    r = c()\n    assert r == {expected}, r\n"
        f"    assert type(r) is type({expected})",
        "entry_point": "f",
    }
    assert run_program(program(item, f"def f():\n    {body}\n")) == (True, "passed")


@pytest.mark.attack
@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [("x, *more, key=0", "1, [2], key={'a': 3}", "(1, ([2],), {'a': 3})")],
)
def test_arguments_arrive_as_they_are(given: str, arguments: str, expected: str) -> None:
    item = {
        "prompt": f"def f({given}):\n",
        "test": f"def check(c):\n    assert c({arguments}) == {expected}",
        "entry_point": "f",
    }
    assert passes([program(item, f"def f({given}):\n    return x, more, key\n")]) == [True]


@pytest.mark.attack
def test_an_error_that_the_tests_expect_is_the_program_s_own() -> None:
    test = (
        "def check(c):\n    try: c()\n    except ValueError as error:\n"
        "        assert 'too small' in str(error)\n    else: assert False"
    )
    item = {"prompt": "def f():\n", "test": test, "entry_point": "f"}
    found = [
        run_program(program(item, f"def f():\n    {body}\n")).passed
        for body in ("raise ValueError('too small')", "raise KeyError('too small')", "return 1")
    ]
    assert found == [True, False, False]


def test_all_canonical_solutions_of_humaneval_pass(shared_data: Path) -> None:
    file = shared_data / "benchmarks" / "humaneval" / "validation.jsonl"
    docs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = run_answers([[doc["canonical_solution"]] for doc in docs], docs)
    assert [doc["task_id"] for doc, (passed,) in zip(docs, found, strict=True) if not passed] == []
    assert len(docs) == 164
