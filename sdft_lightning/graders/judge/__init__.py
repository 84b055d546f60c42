"""Graders that ask a language model behind an OpenAI-compatible endpoint."""

from sdft_lightning.graders.judge.judge import Answer, Judge, Usage
from sdft_lightning.graders.judge.rubrics import JUDGED, judge_reference
from sdft_lightning.graders.judge.settings import JudgeSettings

__all__ = ["JUDGED", "Answer", "Judge", "JudgeSettings", "Usage", "judge_reference"]
