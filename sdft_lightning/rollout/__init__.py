"""Rollouts: completions sampled from a policy."""

from sdft_lightning.rollout.generate import generate_rollout, greedy_rollout
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.rollout.stop_texts import StopTexts
from sdft_lightning.rollout.weights import SamplingWeights

__all__ = ["Sampling", "SamplingWeights", "StopTexts", "generate_rollout", "greedy_rollout"]
