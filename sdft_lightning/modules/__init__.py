"""One LightningModule a method."""

from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.modules.cpt import CPTModule
from sdft_lightning.modules.dft import DFTModule
from sdft_lightning.modules.offline import OfflineDistillationModule
from sdft_lightning.modules.reinvoke import ReinvokeModule
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.modules.sft import SFTModule
from sdft_lightning.modules.sft_kl import SFTKLModule

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
