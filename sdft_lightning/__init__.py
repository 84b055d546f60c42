"""Self-distillation fine-tuning for chat models: learn a new skill, keep the old ones.

The rooms of the package and what each may import are listed in `tests/test_floors.py`.
"""

__version__ = "0.1.0"
