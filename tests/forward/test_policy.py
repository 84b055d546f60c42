"""A loaded policy is ready to be trained, and folders that cannot be one are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.policy import Policy, check_vocabulary, load_policy
from sdft_lightning.types import Tokens


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def change_json(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


def test_a_policy_is_float32_and_in_train_mode_although_transformers_loads_in_eval(
    model_folder: Path,
) -> None:
    policy = load_policy(Policy(str(model_folder)))
    assert all(module.training for module in policy.model.modules())
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.model.parameters())


def test_weights_are_those_of_the_folder(model_folder: Path, model: Any) -> None:
    policy = load_policy(Policy(str(model_folder)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(policy.model.state_dict()[name], tensor)


def test_a_folder_saved_in_bfloat16_is_trained_in_float32(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    assert next(load_policy(Policy(str(folder))).model.parameters()).dtype == torch.float32
    low = load_policy(Policy(str(folder), weights_dtype="bfloat16"))
    assert next(low.model.parameters()).dtype == torch.bfloat16


def test_dropout_of_the_config_is_off_in_train_mode(folder: Path) -> None:
    change_json(folder / "config.json", attention_dropout=0.5)
    model = load_policy(Policy(str(folder))).model
    assert model.config.attention_dropout == 0.0
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_stop_ids_hold_the_tokenizers_and_all_of_the_generation_config(
    folder: Path, tokenizer: Any
) -> None:
    assert load_policy(Policy(str(folder))).stop_ids == [tokenizer.eos_token_id]
    change_json(folder / "generation_config.json", eos_token_id=[9, 0])
    assert load_policy(Policy(str(folder))).stop_ids == [0, tokenizer.eos_token_id, 9]
    change_json(folder / "generation_config.json", eos_token_id=7)
    assert load_policy(Policy(str(folder))).stop_ids == [tokenizer.eos_token_id, 7]


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model_folder: Path) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    completion = torch.tensor([[8, 9]])
    kept = torch.ones_like(completion).bool()
    results = []
    for checkpointing in (False, True):
        model = load_policy(Policy(str(model_folder), gradient_checkpointing=checkpointing)).model
        found = [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
        assert any(found) == checkpointing
        hidden = completion_hidden_states(
            model,
            Tokens(prompt, torch.ones_like(prompt).bool()),
            Tokens(completion, kept),
            kept,
            fuse=False,
        )
        loss = hidden.square().sum()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    assert results[0][0] == results[1][0]
    assert len(results[0][1]) == len(results[1][1]) > 10
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./nowhere", "a/b/c", "runs/last.ckpt", "model.safetensors"]
)
def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.name: there is no folder"):
        load_policy(Policy(name))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.policy\.name.*no config\.json"):
        load_policy(Policy(str(folder)))


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.policy\.name.*safetensors"):
        load_policy(Policy(str(folder)))


def test_a_damaged_weights_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])  # as after a broken copy
    with pytest.raises(UserError, match=r"model\.policy\.name"):
        load_policy(Policy(str(folder)))


def test_weights_that_lack_a_layer_are_refused_and_not_drawn_at_random(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"model\.policy\.name"):
        load_policy(Policy(str(folder)))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"model\.policy\.name.*no tokenizer"):
        load_policy(Policy(str(folder)))


def test_a_tokenizer_bigger_than_the_embeddings_is_taken_while_its_stop_token_is_inside(
    folder: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    make_model(vocab_size=len(tokenizer) - 1).save_pretrained(folder)
    assert load_policy(Policy(str(folder))).tokenizer.pad_token_id < len(tokenizer) - 1
    with pytest.raises(UserError, match=r"model\.policy\.name: answers.*\[2\].*only 2 embeddings"):
        check_vocabulary(make_model(vocab_size=2, pad_token_id=0), [2], "tiny")


def test_a_model_whose_logits_are_not_known_is_refused_at_loading(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match=r"model\.policy\.name.*LlamaForCausalLM"):
        load_policy(Policy(str(model_folder)))
