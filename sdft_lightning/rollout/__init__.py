"""Rollouts: completions sampled from a policy."""

from sdft_lightning.rollout.engine import Engine, RolloutRequest, TransformersEngine
from sdft_lightning.rollout.generate import generate_rollout, greedy_rollout
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.rollout.stop_texts import StopTexts
from sdft_lightning.rollout.trained_log_probs import trained_log_probs
from sdft_lightning.rollout.vllm_engine import VLLMEngine
from sdft_lightning.rollout.vllm_server import VLLMServerEngine
from sdft_lightning.rollout.weights import SamplingWeights

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
