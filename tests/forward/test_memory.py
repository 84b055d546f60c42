"""The plan of a step's memory: exact counts, the arithmetic of its parts, its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.memory import PHASES, MemorySetting, plan_memory
from sdft_lightning.forward.policy import ModelSizes, Policy, load_policy, model_sizes
from sdft_lightning.models.lora import LoRA

SIZES = ModelSizes(
    weights=1000,
    linear=600,
    head=300,
    largest=300,
    adapters=0,
    small_adapters=90,
    layers=2,
    width=10,
    inner=20,
    queries=10,
    keys=5,
    vocabulary=30,
    is_known=True,
)
PLAIN = MemorySetting(
    SIZES, batch=4, prompt=7, teacher_prompt=11, new_tokens=3, averaged=True, average_bytes=8
)


def parts_of(setting: MemorySetting) -> dict[str, dict[str, float]]:
    return {part.name: part.sizes for part in plan_memory(setting).parts if part.sizes}


def most(setting: MemorySetting, name: str) -> float:
    (found,) = (part.most for part in plan_memory(setting).parts if part.name.startswith(name))
    return found


@pytest.fixture(scope="module")
def qwen_7b(tmp_path_factory: pytest.TempPathFactory, config_of_7b: Any) -> ModelSizes:
    """The sizes of Qwen2.5-7B-Instruct, from the config that it is published with."""
    folder = tmp_path_factory.mktemp("shape")
    config_of_7b.save_pretrained(folder)
    return model_sizes(Policy(str(folder)))


def test_7b_model_is_counted_as_published_without_memory_for_it(qwen_7b: ModelSizes) -> None:
    sizes = qwen_7b
    assert sizes.weights == 7_615_616_512
    assert sizes.head == sizes.largest == 152064 * 3584
    assert sizes.linear == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert (sizes.queries, sizes.keys, sizes.adapters) == (3584, 512, 0)
    assert sizes.is_known
    assert not sizes.tied


@pytest.mark.parametrize(
    "lora", [None, LoRA(r=3), LoRA(r=2, target_modules=["q_proj", "down_proj"])]
)
def test_counts_are_those_of_the_loaded_model(model_folder: Path, lora: LoRA | None) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    name = str(model_folder)
    model = load_policy(Policy(name, lora=lora), check=False).model
    sizes = model_sizes(Policy(name, lora=lora))
    trained = model.num_parameters(only_trainable=True)
    assert sizes.tied
    assert sizes.weights + sizes.adapters == model.num_parameters()  # tied ones count once
    assert sizes.adapters == (0 if lora is None else trained)


def test_counting_draws_no_random_numbers(model_folder: Path) -> None:
    pytest.importorskip("peft")
    before = torch.get_rng_state()
    model_sizes(Policy(str(model_folder), lora=LoRA(r=3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_small_adapters_are_those_of_rank_8(model_folder: Path) -> None:
    pytest.importorskip("peft")
    sizes = model_sizes(Policy(str(model_folder), lora=LoRA(r=8)))
    assert sizes.adapters == sizes.small_adapters > 0


def test_what_stays_is_weights_averages_and_teacher_and_gradients_come_with_the_step() -> None:
    plan = plan_memory(PLAIN)
    parts = parts_of(PLAIN)
    assert set(parts["weights, float32"].values()) == {4000}
    assert set(parts["averages of AdamW"].values()) == {8000}
    assert set(parts["teacher, an average in float32"].values()) == {4000}
    assert parts["gradients"] == {"backward": 4000, "step": 4000}
    assert plan.certain == 20_000


def test_gradients_of_a_window_stand_beside_its_later_micro_batches() -> None:
    parts = parts_of(replace(PLAIN, accumulate=2))
    assert set(parts["gradients"]) == {"backward", "later teacher", "later loss", "step"}
    assert parts["activations of the student"]["later loss"] > 0


def test_gradient_of_a_tied_embedding_waits_beside_the_heads() -> None:
    tied = replace(PLAIN, sizes=SIZES._replace(tied=True))
    name = "embedding's gradient, not yet added"
    assert name not in parts_of(PLAIN)
    assert parts_of(tied)[name] == {"backward": 4 * 300}
    assert parts_of(replace(PLAIN, accumulate=2))[name] == {"backward": 4 * 300}
    assert parts_of(replace(tied, accumulate=2))[name] == {"backward": 2 * 4 * 300}


def test_fused_activations_are_those_of_the_formula() -> None:
    tokens = 4 * 7 + 4 * 3
    layer = (4 + 4) * 10 + 4 * (10 + 2 * 5) + 2 * 4 * 20  # (4 + b) D + b (H + 2 K) E + 2 b F
    assert most(PLAIN, "activations") == tokens * 2 * layer
    halved = replace(PLAIN, stored_bytes=2)
    assert most(halved, "activations") == tokens * 2 * (6 * 10 + 2 * 20 + 4 * 20)


def test_completions_of_a_prompt_share_it_in_fused_blocks_only() -> None:
    several = replace(PLAIN, batch=1, completions=4)
    assert most(several, "activations") == most(PLAIN, "activations") * (7 + 12) / (28 + 12)
    checkpointed = replace(several, checkpointing=True)
    inputs = 4 * (7 + 3) * 2 * 4 * 10  # of each layer, in float32
    assert parts_of(checkpointed)["activations of the student"]["loss"] == inputs


def test_a_rollout_stores_what_later_micro_batches_need_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = replace(PLAIN, stores_rollout=True, lays_out=True, accumulate=3)
    parts = parts_of(stored)
    first = most(PLAIN, "activations")
    assert parts["activations of the student"]["sampling"] == 3 * first
    assert parts["activations of the student"]["later loss"] == 2 * first
    assert parts["weights laid out for few rows"]["sampling"] == 4 * (600 + 300)
    monkeypatch.setattr("sdft_lightning.forward.memory.MOST_BYTES", 1000)
    limited = parts_of(stored)["activations of the student"]
    assert limited["sampling"] == first + 2 * 1000


def test_adapters_alone_have_gradients_averages_and_a_teacher() -> None:
    adapted = replace(PLAIN, sizes=SIZES._replace(adapters=100), weight_bytes=2)
    plan = plan_memory(adapted)
    assert plan.certain == 2000 + 400 + 400 + 800 + 400
    assert "heads: gradient and casts" not in parts_of(adapted)
    wide = replace(adapted, device="cuda", weight_bytes=4, product_bytes=2)
    assert most(wide, "heads") == (2 + 2) * 300  # both are cast


def test_four_bits_leave_embeddings_and_head_as_they_are() -> None:
    quantized = replace(PLAIN, four_bits=True, weight_bytes=2, device="cuda")
    weights = parts_of(quantized)["weights, 4 bits"]["step"]
    assert weights == pytest.approx(2 * 400 + 0.5159 * 600, rel=1e-3)


def test_shards_and_buckets() -> None:
    spread = plan_memory(replace(PLAIN, shards=4, copied_bytes=2))
    assert spread.certain == 20_000 / 4 + 2000  # each process has a whole copy to sample with
    validated = replace(PLAIN, shards=4, copied_bytes=2, samples=False)
    assert plan_memory(validated).certain == 20_000 / 4  # it may come after the last step
    copied = plan_memory(replace(PLAIN, buckets=True))
    assert copied.certain == 24_000
    assert copied.at("sampling") - plan_memory(PLAIN).at("sampling") == 4000
    views = plan_memory(replace(PLAIN, buckets_are_gradients=True))
    assert views.certain == 20_000
    assert views.at("sampling") - plan_memory(PLAIN).at("sampling") == 4000


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"foreach": True}, 4000),
        ({"fused": True}, 0),
        ({}, 2 * 4 * 300),
        ({"optimizer": "LowMemoryAdamW", "weight_bytes": 2}, 3 * 4 * 300),
    ],
)
def test_temporaries_of_the_optimizer(changes: dict[str, Any], size: float) -> None:
    assert most(replace(PLAIN, **changes), "temporaries") == size


def test_peak_is_the_largest_phase_and_not_the_sum_of_all_parts() -> None:
    plan = plan_memory(replace(PLAIN, lays_out=True, stores_rollout=True))
    assert plan.peak == max(plan.at(phase) for phase in PHASES)
    assert plan.peak < sum(part.most for part in plan.parts)


def test_table_begins_with_the_largest_part_and_ends_with_what_is_left(
    qwen_7b: ModelSizes,
) -> None:
    plan = plan_memory(MemorySetting(qwen_7b, device="cuda", averaged=True))
    lines = plan.table(int(2 * plan.peak)).splitlines()
    assert lines[1].split() == ["averages", "of", "AdamW", "60.92", "exact"]
    numbers = [float(line[40:48]) for line in lines[1:-2]]
    assert numbers == sorted(numbers, reverse=True)
    assert lines[-2].startswith("  most at once (")
    assert lines[-1].endswith("50% of it is left")
    assert plan.table(int(plan.peak / 1.5)).endswith("50% more is needed")
    assert "free" not in plan.table()


def test_model_that_cannot_be_built_is_told_as_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 30}')
    with pytest.raises(UserError, match=r"model\.policy\.name"):
        model_sizes(Policy(str(tmp_path)))
