"""Graders: text -> score in [0, 1], chosen by name; and how sure a score over n texts is."""

from sdft_lightning.graders.intervals import wilson_interval
from sdft_lightning.graders.pass_at_k import pass_at_k
from sdft_lightning.graders.registry import GRADERS, Grader, check_reference, get_grader
from sdft_lightning.graders.self_test import GoldSelfTest, gold_self_test

__all__ = [
    "GRADERS",
    "GoldSelfTest",
    "Grader",
    "check_reference",
    "get_grader",
    "gold_self_test",
    "pass_at_k",
    "wilson_interval",
]
