"""Rollouts: completions sampled from a policy."""

from sdft_lightning.rollout.engine import Engine, RolloutRequest, TransformersEngine
from sdft_lightning.rollout.generate import generate_rollout, greedy_rollout
from sdft_lightning.rollout.mismatch import trained_log_probs
from sdft_lightning.rollout.sampling import Sampling, StopTexts
from sdft_lightning.rollout.student import SamplingWeights
from sdft_lightning.rollout.vllm.engine import VLLMEngine
from sdft_lightning.rollout.vllm.server import VLLMServerEngine

__all__ = [
    "Engine",
    "RolloutRequest",
    "Sampling",
    "SamplingWeights",
    "StopTexts",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "generate_rollout",
    "greedy_rollout",
    "trained_log_probs",
]
