"""Packs the files of `configs/` into the wheel; all else about the package is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` to `sdft_lightning/configs`, where `preset:<name>` is looked for.

    An editable install has none of it: there the files of the checkout are found.
    """

    def run(self) -> None:
        """Build the package, and add the files."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "sdft_lightning", "configs")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build; files may be gone since
        for path in sorted(Path("configs").rglob("*.yaml")):
            copied = target / path.relative_to("configs")
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)


setup(cmdclass={"build_py": BuildWithConfigs})
