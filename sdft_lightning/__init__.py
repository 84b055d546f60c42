"""Self-distillation fine-tuning for chat models: learn a new skill, keep the old ones.

The rooms of the package and what each may import are listed in `tests/test_floors.py`.
"""

import os

# Linux: large tensors in pages of 2 MB. A decoding step on a CPU reads all weights, and finding
# their small pages took a fifth of it. torch looks once, at its first tensor; "0" turns it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
