"""Templates of task files that reach the data of their item, and nothing of Python behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from sdft_lightning.errors import UserError


class _Templates(SandboxedEnvironment):
    """Jinja's own sandbox, which says what it refuses as an error of the user's."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse an attribute through which a template would leave its data."""
        raise _refused(f"{attribute!r} of a {type(obj).__name__}")

    def is_safe_callable(self, obj: Any) -> bool:
        """Refuse what is no method of plain data."""
        if super().is_safe_callable(obj):
            return True
        raise _refused(f"to call {getattr(obj, '__name__', type(obj).__name__)!r}")


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let the harness render templates in Jinja's sandbox; its own environment has none."""
    from lm_eval import utils

    harness = utils.env
    templates = _Templates(
        loader=harness.loader,
        undefined=harness.undefined,
        keep_trailing_newline=harness.keep_trailing_newline,
    )
    templates.filters.update(harness.filters)
    utils.env = templates
    try:
        yield
    finally:
        utils.env = harness


def _refused(what: str) -> UserError:
    return UserError(
        f"data.benchmarks.tasks: a template of a task file asks for {what}, which reaches Python "
        "itself and is refused. Use the columns of the item and Jinja's filters."
    )
