"""One LightningModule a method."""

from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.modules.sft import SFTModule

__all__ = ["PolicyModule", "SDFTModule", "SFTModule"]
