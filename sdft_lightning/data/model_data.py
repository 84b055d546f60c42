"""What the data modules share: whose tokenizer is used, and who evaluates which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader

from sdft_lightning.data.loader import EvaluationSampler, TellingLoader, check_workers
from sdft_lightning.errors import UserError, check_at_least
from sdft_lightning.errors.quiet import show_messages
from sdft_lightning.models.tokenization import load_tokenizer, resolve_model
from sdft_lightning.types import TaskData


class ModelVersion(NamedTuple):
    """A model, and its branch, tag or commit on the Hub."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        """The name, and the revision where there is one."""
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


class ModelDataModule(L.LightningDataModule, TaskData):
    """Texts that are tokenized for one model.

    Args:
        model_name: The model whose tokenizer is used; that of the trainer's module without it.
        revision: Its branch, tag or commit on the Hub; the module's without it.
        num_workers: Processes that collate batches.
    """

    def __init__(self, model_name: str | None, revision: str | None, num_workers: int) -> None:
        super().__init__()
        show_messages()
        check_at_least("data.num_workers", num_workers, 0)
        check_workers(num_workers)
        self.model_name = model_name
        self.revision = revision
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Fetch the tokenizer into the cache (for the embedded model: the model).

        Raises:
            UserError: If this is not the model of the trainer's module, or there is none.
        """
        load_tokenizer(*self.model_version)

    @property
    def model_version(self) -> ModelVersion:
        """Whose tokenizer is used: the module's model, which an own name may only repeat.

        Raises:
            UserError: If the module has another model, or neither of them names one.
        """
        module = getattr(self.trainer, "lightning_module", None)
        policy = getattr(module, "policy", None)
        if policy is None:
            if self.model_name is None:
                raise UserError(
                    "data.model_name: not given, and there is no module to take it from. Name the "
                    f"model that is used, {type(self).__name__}(model_name=...), or give the "
                    "data module to a Trainer with such a module."
                )
            return ModelVersion(self.model_name, self.revision)
        version = ModelVersion(policy.name, policy.revision)
        same_name = self.model_name is None or _is_same_model(self.model_name, version.name)
        if not same_name or self.revision not in (None, version.revision):
            own = ModelVersion(self.model_name or version.name, self.revision)
            raise UserError(
                f"data.model_name: the data module has {own}, and the module that is trained has "
                f"{version}: rows would be tokenized for another model. Leave model_name and "
                "revision out of the data module, which then takes the module's."
            )
        return version

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def evaluation_loader(
        self, rows: Any, batch_size: int, at_least_one: bool = False
    ) -> DataLoader[Any]:
        """Batches of rows in order, each row on exactly one process.

        Args:
            rows: A data set whose index is a list of places, and whose item is a batch.
            batch_size: Rows of a batch.
            at_least_one: Give each process a batch, though it be of a place behind the last row.
        """
        sampler = EvaluationSampler(
            max(len(rows), self._world_size) if at_least_one else len(rows),
            batch_size,
            self.trainer.global_rank if self.trainer else 0,
            self._world_size,
        )
        return TellingLoader(rows, batch_size=None, sampler=sampler, num_workers=self.num_workers)


def _is_same_model(one: str, other: str) -> bool:
    """Whether two names stand for the same model; a folder may be named by several paths."""
    if one == other:
        return True
    paths = [Path(resolve_model(name)) for name in (one, other)]
    return all(path.is_dir() for path in paths) and paths[0].samefile(paths[1])
