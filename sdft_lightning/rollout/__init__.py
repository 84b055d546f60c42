"""Rollouts: completions sampled from a policy."""

from sdft_lightning.rollout.engine import Engine, TransformersEngine
from sdft_lightning.rollout.generate import RolloutRequest, generate_rollout, greedy_rollout
from sdft_lightning.rollout.mismatch import trained_log_probs
from sdft_lightning.rollout.sampling import Sampling, StopTexts
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.rollout.vllm.engine import VLLMEngine
from sdft_lightning.rollout.vllm.server import VLLMServerEngine

__all__ = [
    "Engine",
    "RolloutRequest",
    "Sampling",
    "StopTexts",
    "StudentPasses",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "generate_rollout",
    "greedy_rollout",
    "trained_log_probs",
]
