"""The optimizer's options are tried before a model is loaded."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SFTModule


def test_options_that_the_optimizer_refuses_are_told() -> None:
    module = SFTModule(
        policy=Policy("no/such/model"), optimizer=partial(torch.optim.AdamW, lr=-1.0)
    )
    with pytest.raises(UserError, match=r"model\.optimizer: it refuses.*learning rate"):
        module.check_before_fit([])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_of_matrices_is_not_refused_for_the_trial() -> None:
    SFTModule(policy=Policy("no/such/model"), optimizer=torch.optim.Muon).check_before_fit([])
