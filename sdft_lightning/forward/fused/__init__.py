"""Decoders of the Llama kind in fewer, larger operations, on the CPU; decoding steps on a GPU.

transformers computes such a layer in about sixty operations, most of which only move or cast what
lies between the matrix products. Here a layer is two blocks with their gradients written down. They
work on tokens without padding, keep less for the backward pass, and equal the model up to rounding.
"""

from sdft_lightning.forward.fused.decoding import (
    BufferedSteps,
    DecodingKind,
    DecodingSteps,
    buffered_parts,
    choose_decoding_,
    decoding_kind,
)
from sdft_lightning.forward.fused.reuse import MOST_BYTES, ReadPrompts, read_prompts
from sdft_lightning.forward.fused.structure import (
    Decoder,
    decoder_of,
    is_known_kind,
    join_,
    training_dtype,
)
from sdft_lightning.forward.fused.trunk import (
    StoredPrompt,
    completion_states,
    states_after,
    store_prompts,
)

__all__ = [
    "MOST_BYTES",
    "BufferedSteps",
    "Decoder",
    "DecodingKind",
    "DecodingSteps",
    "ReadPrompts",
    "StoredPrompt",
    "buffered_parts",
    "choose_decoding_",
    "completion_states",
    "decoder_of",
    "decoding_kind",
    "is_known_kind",
    "join_",
    "read_prompts",
    "states_after",
    "store_prompts",
    "training_dtype",
]
