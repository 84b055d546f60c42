"""How much memory a step takes, computed from a model's config before anything is loaded.

A plan is a list of parts in bytes, each with the phases of a step in which it is held; the peak is
that of the largest phase. Weights, gradients, averages, teachers and copies are exact; what depends
on tokens is computed for the longest rows, and on a GPU from what transformers' layers store.
docs/gpu.md has the arithmetic, and docs/performance.md what was measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sdft_lightning.forward.fused import MOST_BYTES
from sdft_lightning.forward.policy import ModelSizes
from sdft_lightning.losses.bounded import PIECE_ELEMENTS, by_device, chunk_tokens
from sdft_lightning.losses.closed_form import BUFFERS

Kind = Literal["exact", "at most", "about"]
# `later`: of a later micro-batch, beside the gradients of earlier ones.
PHASES = (
    *("sampling", "evaluation", "teacher", "loss", "backward"),
    *("later teacher", "later loss", "step"),
)
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # with the scales of each block, themselves quantized
_LARGEST_COPIES = 3  # float32 copies of the largest parameter that LowMemoryAdamW works with
_AUTOGRAD_LOGITS = 20  # tensors of a chunk's size where autograd finds the gradient of the loss
_SHOWN = 0.002  # smaller parts of the peak share a line


@dataclass(frozen=True)
class MemorySetting:
    """What decides how much memory a step takes.

    Args:
        sizes: Of the model.
        device: Type of the device.
        weight_bytes: Of one of the student's weights.
        stored_bytes: Of a number that is stored for the backward pass.
        product_bytes: Of a number that is multiplied.
        four_bits: Linear layers are quantized.
        checkpointing: Activations are computed again in the backward pass.
        optimizer: Its name.
        average_bytes: What the optimizer keeps of one trained weight.
        averages: How far that is known.
        foreach: The optimizer works on all parameters at once, with a copy of their size.
        fused: The optimizer works without copies.
        averaged: An average of what is trained, in float32.
        whole_copies: Whole models in float32 that stay as they were.
        copied_bytes: Of a weight of the copy to sample with; 0 without a copy.
        has_teacher: A second model's passes are compared with.
        engine_bytes: What an engine in the same process reserves on the device.
        samples: The model itself samples in training.
        lays_out: Linear layers are laid out for few rows while it samples (CPU).
        stores_rollout: What sampling computes of prompts and completions is the student's pass.
        batch: Prompts of a micro-batch.
        accumulate: Micro-batches of an optimizer step.
        completions: Completions of a prompt.
        prompt: Longest prompt in tokens.
        teacher_prompt: Longest teacher prompt in tokens.
        new_tokens: Longest completion in tokens.
        answers: Questions that are answered at once in validation; 0 without.
        answer: Longest answer in tokens.
        closed_form: The gradient of the loss is written down.
        buckets: DDP keeps a copy of all gradients.
        buckets_are_gradients: DDP's buckets are the gradients, and are never given back.
        shards: Devices that weights, gradients, averages and teachers are spread over.
    """

    sizes: ModelSizes
    device: str = "cpu"
    weight_bytes: int = 4
    stored_bytes: int = 4
    product_bytes: int = 4
    four_bits: bool = False
    checkpointing: bool = False
    optimizer: str = "AdamW"
    average_bytes: float = 8.0
    averages: Kind = "exact"
    foreach: bool = False
    fused: bool = False
    averaged: bool = False
    whole_copies: int = 0
    copied_bytes: int = 0
    has_teacher: bool = True
    engine_bytes: int = 0
    samples: bool = True
    lays_out: bool = False
    stores_rollout: bool = False
    batch: int = 1
    accumulate: int = 1
    completions: int = 1
    prompt: int = 0
    teacher_prompt: int = 0
    new_tokens: int = 0
    answers: int = 0
    answer: int = 0
    closed_form: bool = True
    buckets: bool = False
    buckets_are_gradients: bool = False
    shards: int = 1

    @property
    def is_fused(self) -> bool:
        """Whether the model is computed in fused blocks."""
        plain = self.checkpointing or self.sizes.adapters or self.shards > 1
        return self.device == "cpu" and self.sizes.is_known and not plain

    @property
    def later(self) -> tuple[str, ...]:
        """Phases of later micro-batches, beside gradients of earlier ones."""
        return ("later teacher", "later loss") if self.accumulate > 1 else ()

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return self.sizes.adapters or self.sizes.weights

    @property
    def trained_bytes(self) -> int:
        """Of a trained weight; adapters are float32."""
        return 4 if self.sizes.adapters else self.weight_bytes

    @property
    def rows(self) -> int:
        """Completions of a micro-batch."""
        return self.batch * self.completions

    @property
    def layer_bytes(self) -> float:
        """What a layer stores of one token for the backward pass."""
        sizes, number = self.sizes, self.stored_bytes
        width, inner = sizes.width, sizes.inner
        heads = sizes.queries + 2 * sizes.keys
        if self.is_fused:
            return (4 + number) * width + number * (heads + 2 * inner)
        number = min(self.weight_bytes, self.product_bytes)
        norms = 2 * width * (4 + self.weight_bytes + number)
        attention = number * (4 * sizes.queries + 2 * sizes.keys)  # keys repeated for each query
        adapters = number * (5 * width + sizes.queries + inner) if sizes.adapters else 0
        return norms + attention + number * 4 * inner + adapters

    @property
    def pass_bytes(self) -> float:
        """What the widest layer of a pass without gradients holds of one token."""
        return self.product_bytes * 3 * self.sizes.inner + 12 * self.sizes.width

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, as they are sampled with."""
        number = 2 if 2 in (self.copied_bytes, self.weight_bytes, self.product_bytes) else 4
        if self.device == "cpu":
            number = max(number, self.product_bytes)
        return 2 * self.sizes.keys * self.sizes.layers * number


class Part(NamedTuple):
    """A part of a plan.

    Attributes:
        name: What it is.
        sizes: Bytes by phase.
        kind: How far it is known.
    """

    name: str
    sizes: dict[str, float]
    kind: Kind

    @property
    def most(self) -> float:
        """Bytes in its largest phase."""
        return max(self.sizes.values(), default=0.0)


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of a step's memory.

    Args:
        parts: All of them.
    """

    parts: tuple[Part, ...]

    def at(self, phase: str) -> float:
        """Bytes in a phase."""
        return sum(part.sizes.get(phase, 0.0) for part in self.parts)

    @property
    def phase(self) -> str:
        """The largest phase."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes in the largest phase."""
        return self.at(self.phase)

    @property
    def certain(self) -> float:
        """Bytes that are held together at an optimizer step, whatever the rows are like."""
        return sum(part.sizes.get("step", 0.0) for part in self.parts if part.kind == "exact")

    def table(self, free: int | None = None) -> str:
        """The plan as text, the largest part first, in GB (10⁹ bytes).

        Args:
            free: Bytes that the device has free, where that is known.
        """
        parts = sorted((part for part in self.parts if part.most), key=lambda part: -part.most)
        shown = [part for part in parts if part.most >= _SHOWN * self.peak]
        lines = ["Memory of a step, computed, in GB:"]
        for part in shown:
            when = [phase for phase in PHASES if part.sizes.get(phase)]
            told = [
                phase
                for place, phase in enumerate(when)
                if phase.removeprefix("later ") not in when[:place]
            ]
            only = "" if len(when) == len(PHASES) else ", ".join(told)
            lines.append(f"  {part.name:<38}{part.most / 1e9:8.2f}  {part.kind:<8}{only}".rstrip())
        lines.append(f"  {f'most at once ({self.phase})':<38}{self.peak / 1e9:8.2f}")
        if free is not None:
            left = 1 - self.peak / max(1, free)
            rest = f"{left:.0%} of it is left" if left >= 0 else f"{-left:.0%} more is needed"
            lines.append(f"  {'free on the device':<38}{free / 1e9:8.2f}  {rest}")
        return "\n".join(lines)


def plan_memory(setting: MemorySetting) -> MemoryPlan:
    """Compute what the parts of a step take on one device.

    Args:
        setting: What decides about it.
    """
    parts = [*_models(setting), *_passes(setting), *_sampling(setting), *_loss(setting)]
    return MemoryPlan((*parts, _step(setting)))


def _held(name: str, size: float, kind: Kind, phases: Iterable[str] = PHASES) -> Part:
    return Part(name, dict.fromkeys(phases, float(size)) if size else {}, kind)


def _models(setting: MemorySetting) -> list[Part]:
    """What stays from step to step, and the gradients."""
    sizes, spread = setting.sizes, setting.shards
    quantized = sizes.linear if setting.four_bits else 0
    weights = setting.weight_bytes * (sizes.weights - quantized) + _FOUR_BITS * quantized
    share = setting.trained / spread
    gradients, averages = setting.trained_bytes * share, setting.average_bytes * share
    when = PHASES if setting.buckets_are_gradients else ("backward", *setting.later, "step")
    averaged = 4 * setting.trained * setting.averaged
    return [
        _held(f"weights, {_named(setting)}", weights / spread, "exact"),
        _held("adapters, float32", 4 * sizes.adapters, "exact"),
        _held("gradients", gradients, "exact", when),
        _held("DDP's buckets, a copy of gradients", gradients * setting.buckets, "exact"),
        _held(
            f"averages of {setting.optimizer}",
            averages,
            setting.averages,
        ),
        _held("teacher, an average in float32", averaged / spread, "exact"),
        _held(
            "models as they were, float32",
            4 * sizes.weights * setting.whole_copies / spread,
            "exact",
        ),
        # Where only validation samples, it may be made after the last step.
        _held(
            "copy to sample with",
            setting.copied_bytes * sizes.weights,
            "exact" if setting.samples else "at most",
        ),
        _held("engine in this process", setting.engine_bytes, "exact"),
    ]


def _named(setting: MemorySetting) -> str:
    if setting.four_bits:
        return "4 bits"
    return "float32" if setting.weight_bytes == 4 else "bfloat16"


def _stored_later(setting: MemorySetting) -> float:
    """What a rollout has stored of the later micro-batches."""
    if not setting.stores_rollout:
        return 0.0
    later = setting.accumulate - 1
    token = setting.sizes.layers * setting.layer_bytes
    prompts = setting.batch * setting.prompt * later * token
    completions = setting.rows * setting.new_tokens * later * token
    return min(MOST_BYTES, prompts) + min(MOST_BYTES, completions)


def _passes(setting: MemorySetting) -> list[Part]:
    """What the student's and the teacher's passes hold."""
    sizes = setting.sizes
    # In fused blocks the completions of a prompt share it.
    prompts = setting.batch if setting.is_fused else setting.rows
    tokens = prompts * setting.prompt + setting.rows * setting.new_tokens
    layer = tokens * setting.layer_bytes
    stored = sizes.layers * layer
    if setting.checkpointing:
        stored = sizes.layers * tokens * setting.weight_bytes * sizes.width
    elif setting.weight_bytes > setting.product_bytes and not setting.is_fused:
        stored += setting.product_bytes * sizes.linear  # each rounded weight, see autocast
    later = _stored_later(setting)
    held = {
        "sampling": stored + later if setting.stores_rollout else 0.0,
        "teacher": stored + later,
        "loss": stored + later,
        # At the end of a backward pass, when all gradients are there.
        "backward": later + (layer if setting.checkpointing else 0.0),
        **dict.fromkeys(setting.later, max(later, stored)),
    }
    width = 4 if setting.is_fused else 3
    working = tokens * setting.product_bytes * width * sizes.inner
    gathered = setting.weight_bytes * sizes.linear / sizes.layers if setting.shards > 1 else 0
    # The head's waits for the embedding's where they are one; then they are added to the window's.
    added = 0 if sizes.adapters else sizes.tied + (setting.accumulate > 1)
    taught = prompts * setting.teacher_prompt + setting.rows * setting.new_tokens
    return [
        Part("activations of the student", held, "at most"),
        _held("backward pass of a layer", working, "at most", ["backward"]),
        _held(
            "pass of the teacher",
            taught * setting.pass_bytes * setting.has_teacher,
            "at most",
            ["teacher", *setting.later[:1]],
        ),
        _held(
            "embedding's gradient, not yet added",
            added * setting.weight_bytes * sizes.head,
            "about",
            ["backward"],
        ),
        _held("a layer gathered", gathered, "about"),
    ]


def _sampling(setting: MemorySetting) -> list[Part]:
    """What is held while completions, or answers in validation, are sampled."""
    sizes = setting.sizes
    window = setting.accumulate * setting.rows if setting.samples else 0
    cache = window * (setting.prompt + setting.new_tokens) * setting.cache_bytes
    answers = setting.answers * (setting.prompt + setting.answer) * setting.cache_bytes
    read = setting.batch if setting.is_fused else window // setting.completions
    read *= setting.prompt * setting.samples
    laid_out = 0.0
    if setting.device == "cpu":
        laid_out = setting.product_bytes * (sizes.linear + sizes.head)
    rows = {"sampling": window, "evaluation": setting.answers}
    return [
        Part("keys and values", {"sampling": cache, "evaluation": answers}, "at most"),
        Part(
            "prompts while they are read",
            {
                "sampling": read * setting.pass_bytes,
                "evaluation": setting.answers * setting.prompt * setting.pass_bytes,
            },
            "at most",
        ),
        Part(
            "weights laid out for few rows",
            {
                "sampling": laid_out * setting.lays_out,
                "evaluation": laid_out * bool(setting.answers),
            },
            "about",
        ),
        Part(
            "logits of a token",
            {phase: 12.0 * count * sizes.vocabulary for phase, count in rows.items()},
            "about",
        ),
    ]


def _loss(setting: MemorySetting) -> list[Part]:
    """What the loss holds: a chunk of logits, heads, and their gradient."""
    sizes, number = setting.sizes, setting.product_bytes
    tokens = setting.rows * setting.new_tokens
    when = ["loss", *setting.later[1:]]
    chunk = min(tokens, chunk_tokens(sizes.vocabulary, setting.device, setting.closed_form))
    logits = float(_AUTOGRAD_LOGITS * 4 * chunk * sizes.vocabulary)
    if setting.closed_form:
        piece = by_device(PIECE_ELEMENTS, setting.device) // sizes.vocabulary
        logits = (1 + setting.has_teacher) * number * chunk * sizes.vocabulary
        logits += (3 + BUFFERS) * 4 * min(max(1, piece), chunk) * sizes.vocabulary
    heads = 0  # bytes of an entry
    if not sizes.adapters:  # the gradient in float32, and then in the weights' dtype
        heads += 4 if setting.weight_bytes == 4 else 6
    if setting.weight_bytes > number and setting.copied_bytes != 2:
        heads += number  # the student's, cast
    wide = setting.whole_copies or (setting.averaged and not sizes.adapters)
    if setting.has_teacher and (4 if wide else setting.weight_bytes) > number:
        heads += number  # the teacher's
    return [
        _held("chunk of logits", logits, "at most", when),
        _held("heads: gradient and casts", heads * sizes.head, "about", when),
        _held("states that predict tokens", 12 * tokens * sizes.width, "at most", when),
    ]


def _step(setting: MemorySetting) -> Part:
    """What the optimizer works with, and then the teacher's average."""
    largest = setting.sizes.largest if setting.trained == setting.sizes.weights else 0
    size = 2.0 * setting.trained_bytes * largest
    if setting.foreach:
        size = setting.trained_bytes * setting.trained / setting.shards
    elif setting.fused:
        size = 0.0
    elif setting.optimizer == "LowMemoryAdamW":
        size = 4.0 * _LARGEST_COPIES * largest
    if setting.averaged and setting.trained_bytes != 4:
        size = max(size, 4.0 * largest)
    return _held(f"temporaries of {setting.optimizer}", size, "about", ["step"])
