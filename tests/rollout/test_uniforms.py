"""The numbers that completions are sampled from belong to (seed, step, row, sample)."""

from __future__ import annotations

import torch

from sdft_lightning.rollout.sampling import row_key, row_uniforms

# Of ("row-1") and (seed 42, step 3, "row-1", sample 0): a change makes old runs irreproducible.
KNOWN_KEY = 3330157096919822957
KNOWN_NUMBERS = [0.2833674847619396, 0.09682662323034286, 0.7640262963471272]


def one(
    seed: int = 42, step: int = 3, row: str = "row-1", sample: int = 0, length: int = 6
) -> torch.Tensor:
    return row_uniforms(seed, step, [row], sample + 1, length)[sample]


def test_a_row_does_not_depend_on_its_batch_or_place() -> None:
    alone = row_uniforms(42, 3, ["row-1"], 2, 6)
    batch = row_uniforms(42, 3, ["row-7", "row-1", "x"], 2, 6)
    turned = row_uniforms(42, 3, ["row-1", "x", "row-7"], 2, 6)
    assert torch.equal(batch[2:4], alone)
    assert torch.equal(turned[:2], alone)
    assert torch.equal(turned[4:], batch[:2])


def test_a_row_does_not_depend_on_samples_or_longest_length() -> None:
    assert torch.equal(row_uniforms(1, 2, ["a"], 5, 9)[:2, :4], row_uniforms(1, 2, ["a"], 2, 4))


def test_row_b_sample_j_stands_at_b_times_n_plus_j() -> None:
    numbers = row_uniforms(42, 3, ["a", "b"], 3, 4)
    assert numbers.shape == (6, 4)
    assert torch.equal(numbers[4], one(row="b", sample=1, length=4))


def test_seed_step_row_and_sample_each_give_other_numbers() -> None:
    base = one()
    for other in (one(seed=43), one(step=4), one(row="row-2"), one(sample=1)):
        assert not (base == other).any()


def test_step_and_seed_do_not_simply_add_up() -> None:
    assert not torch.equal(one(seed=1, step=2), one(seed=2, step=1))


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = one()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(one(), first)


def test_known_values_stay_the_same_on_every_machine_and_release() -> None:
    assert row_key("row-1") == KNOWN_KEY
    expected = torch.tensor(KNOWN_NUMBERS, dtype=torch.float64)
    assert torch.equal(one(length=3), expected)


def test_numbers_are_float64_in_the_half_open_unit_interval_and_uniform() -> None:
    rows = [f"row-{i}" for i in range(200)]
    numbers = row_uniforms(0, 0, rows, 1, 100)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    # 20,000 numbers in ten bins: 2000 ± 42; chi-square with 9 degrees of freedom, p = 1e-4 at 34.
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 34
    # The first position alone is uniform over rows, too.
    assert abs(float(numbers[:, 0].mean()) - 0.5) < 4 * 0.289 / 200**0.5
