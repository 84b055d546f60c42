"""Decoders of the Llama kind in fewer, larger operations, on the CPU.

transformers computes such a layer in about sixty operations, most of which only move or cast what
lies between the matrix products. Here a layer is two blocks with their gradients written down. They
work on tokens without padding, keep less for the backward pass, and equal the model up to rounding.
"""

from sdft_lightning.fused.decoding import DecodingSteps
from sdft_lightning.fused.structure import Decoder, decoder_of, join_
from sdft_lightning.fused.trunk import completion_states

__all__ = ["Decoder", "DecodingSteps", "completion_states", "decoder_of", "join_"]
