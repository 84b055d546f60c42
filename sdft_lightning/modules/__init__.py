"""One LightningModule a method."""

from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.modules.sdft_variants import OfflineDistillationModule, ReinvokeModule
from sdft_lightning.modules.supervised import CPTModule, DFTModule, SFTKLModule, SFTModule

__all__ = [
    "CPTModule",
    "DFTModule",
    "OfflineDistillationModule",
    "PolicyModule",
    "ReinvokeModule",
    "SDFTModule",
    "SFTKLModule",
    "SFTModule",
]
