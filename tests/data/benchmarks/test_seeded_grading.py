"""Graders that draw numbers give the same answer the same grade."""

from __future__ import annotations

import random

import langdetect
import pytest

from sdft_lightning.data.benchmarks.suite import seeded_grading

# Names of one kind only: without a seed it is one language now and another one the next time.
AMBIGUOUS = "hotel taxi"


def languages(times: int) -> set[str]:
    return {langdetect.detect(AMBIGUOUS) for _ in range(times)}


def test_a_text_of_no_clear_language_is_taken_for_the_same_each_time() -> None:
    assert len(languages(40)) > 1  # what is guarded against
    with seeded_grading():
        first = languages(20)
    with seeded_grading():
        assert languages(20) == first
    assert len(first) == 1


def test_what_is_drawn_is_the_same_and_the_state_comes_back() -> None:
    random.seed(7)
    state, seed = random.getstate(), langdetect.DetectorFactory.seed
    with seeded_grading():
        drawn = random.random()
    assert random.getstate() == state
    assert langdetect.DetectorFactory.seed == seed
    with seeded_grading():
        assert random.random() == drawn


def test_the_state_comes_back_also_after_an_error() -> None:
    state, seed = random.getstate(), langdetect.DetectorFactory.seed
    with pytest.raises(ZeroDivisionError), seeded_grading():
        random.randint(0, 1 // 0)
    assert random.getstate() == state
    assert langdetect.DetectorFactory.seed == seed
