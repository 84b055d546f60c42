"""Task YAMLs from strangers: their code runs only on demand, their templates reach data only."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.data.benchmarks.task_yaml import read_task_yaml
from sdft_lightning.data.benchmarks.tasks import load_tasks
from sdft_lightning.errors import UserError

pytestmark = pytest.mark.attack

# What a stranger's module does as it is imported.
OWN = "sdft_lightning.data.benchmarks.task_functions"
MARK = """import builtins
builtins.imported_by_a_stranger = True
def f(*given, **named): return given
"""


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "imported_by_a_stranger", False, raising=False)


def imported() -> bool:
    return bool(builtins.imported_by_a_stranger)  # type: ignore[attr-defined]


def add(task_file: Path, line: str) -> None:
    with task_file.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@pytest.mark.parametrize(
    "line",
    [
        "process_docs: !function stranger.f",
        "custom_dataset: !function stranger.f",
        "metadata: {deep: [{er: !function stranger.f}]}",
        # Overruled by the later key, and imported all the same.
        "process_docs: !function stranger.f\nprocess_docs: null",
        "process_docs: &a !function stranger.f\nmetadata: {again: *a}",
        "include: base.yaml",
        "include: [base.yaml]",
        "process_docs: !function os.system",
        "process_docs: !function lm_eval.tasks.humaneval.utils.pass_at_k",
        "process_docs: !function sdft_lightning.data.benchmarks.sandbox.run_program",
        "process_docs: !function sdft_lightning.data.benchmarks.task_functions.ThreadPoolExecutor",
    ],
)
def test_code_of_one_s_own_is_refused_before_it_is_imported(task_file: Path, line: str) -> None:
    (task_file.parent / "stranger.py").write_text(MARK)
    (task_file.parent / "base.yaml").write_text("include: further.yaml\n")
    (task_file.parent / "further.yaml").write_text("process_docs: !function stranger.f\n")
    add(task_file, line)
    with pytest.raises(UserError, match=r"runs Python code \(!function .*allow_task_code") as told:
        load_tasks(Benchmarks([str(task_file)]))
    assert str(task_file) in str(told.value)
    assert not imported()


def test_code_of_one_s_own_runs_on_demand(task_file: Path) -> None:
    (task_file.parent / "stranger.py").write_text(MARK.replace("return given", "return given[0]"))
    add(task_file, "process_docs: !function stranger.f")
    assert load_tasks(Benchmarks([str(task_file)], allow_task_code=True))
    assert imported()


def test_a_file_beside_the_yaml_is_not_taken_for_this_package(task_file: Path) -> None:
    beside = task_file.parent / "sdft_lightning" / "data" / "benchmarks" / "task_functions.py"
    beside.parent.mkdir(parents=True)
    beside.write_text(MARK.replace("def f", "def contains"))
    add(task_file, f"process_results: !function {OWN}.contains")
    with pytest.raises(UserError, match="allow_task_code"):
        load_tasks(Benchmarks([str(task_file)]))
    assert not imported()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("metric: acc}", "metric: ./stranger.py}", "evaluate"),
        ("metric: acc}", "metric: some-one/their_metric}", "evaluate"),
        ("metric: acc}", "metric: exact_match, hf_evaluate: true}", "evaluate"),
        ("dataset_path: json", "dataset_path: pandas", "unpickles"),
    ],
)
def test_code_that_others_packages_would_fetch_is_refused(
    task_file: Path, old: str, new: str, told: str
) -> None:
    text = task_file.read_text(encoding="utf-8")
    assert old in text
    task_file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=f"{told}.*allow_task_code"):
        load_tasks(Benchmarks([str(task_file)]))


@pytest.mark.parametrize(
    "text",
    [
        "same_as: humaneval\ntask: mine\nunsafe_code: false\n",
        "include: {harness}/humaneval/humaneval.yaml\ntask: mine\nunsafe_code: false\n",
        # In the sandbox, but unasked.
        f"task: mine\nprocess_results: !function {OWN}.results\n",
    ],
)
def test_unsafe_code_false_makes_nothing_safe(tmp_path: Path, text: str) -> None:
    import lm_eval.tasks

    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("{harness}", str(Path(lm_eval.tasks.__file__).parent)))
    with pytest.raises(UserError, match=r"outside our sandbox|allow_code_execution"):
        load_tasks(Benchmarks([str(file)]))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set a = lipsum.__globals__ %}{{ a }}",
    "{% if question is defined and ''.__class__ is defined %}x{% endif %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_reach_python(
    task_file: Path, model_folder: Path, template: str
) -> None:
    lines = task_file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("doc_to_text")]
    quoted = template.replace("'", "''")
    task_file.write_text("\n".join([*kept, f"doc_to_text: '{quoted}'"]), encoding="utf-8")
    with pytest.raises(UserError, match=r"reaches Python itself|is unsafe|undefined"):
        BenchmarkSuite(Benchmarks([str(task_file)]), str(model_folder))


def test_the_harness_keeps_its_own_environment_afterwards(task_file: Path) -> None:
    from lm_eval import utils

    before = utils.env
    load_tasks(Benchmarks([str(task_file)]))
    assert utils.env is before


def test_the_task_files_of_this_repository_need_no_opt_in(shared_data: Path) -> None:
    folder = Path(__file__).parents[3] / "configs" / "benchmarks"
    for path in folder.glob("*.yaml"):
        read_task_yaml(path, str(shared_data / "benchmarks"))
