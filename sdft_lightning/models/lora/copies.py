"""Models and checkpoints beside an adapted model, without its frozen weights once more."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.lora.adapters import (
    ADAPTER,
    adapted_weight,
    adapter_layers,
    adapter_parameters,
    base_name,
    is_adapted,
    weight_name,
)
from sdft_lightning.models.precision import eval_mode


@torch.no_grad()
def check_adapters_are_called(model: Any) -> None:
    """Refuse adapters on layers whose weights other modules multiply by themselves.

    Such an adapter would change nothing while it is trained, and the model once it is merged.
    Layers that three tokens do not need, such as an expert's or a picture's, need not be called.

    Args:
        model: A causal language model of transformers, with adapters or without.

    Raises:
        UserError: If there are such layers.
    """
    layers = adapter_layers(model)
    if not layers:
        return
    with eval_mode(model):  # which puts the modes back
        for training in (False, True):  # a model may read a weight in one mode only
            model.train(training)
            past = _read_past(model, layers)
            if past:
                raise UserError(_sentence(model, layers, past))


def _read_past(model: Any, layers: dict[str, Any]) -> list[str]:
    """Names of layers that are not called, but change what comes out."""
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    try:
        plain = _states(model)
    finally:
        for handle in handles:
            handle.remove()
    kinds: dict[str, list[str]] = {}
    for name in layers:
        if name not in called and adapted_weight(layers[name]).is_floating_point():
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
    found: list[str] = []
    for names in kinds.values():
        weights = [adapted_weight(layers[name]).data for name in names]
        for weight in weights:
            weight.neg_()
        changed = not torch.equal(_states(model), plain)
        for weight in weights:
            weight.neg_()  # exact
        found += names if changed else []
    return found


def _states(model: Any) -> Tensor:
    ids = torch.tensor([[0, 1, 2]], device=model.device)  # (1, 3)
    states: Tensor = model.base_model(input_ids=ids).last_hidden_state  # (1, 3, D)
    return states


def _sentence(model: Any, layers: dict[str, Any], past: list[str]) -> str:
    ends = {name.rpartition(".")[2] for name in past}
    rest = {
        name.rpartition(".")[2]
        for name, layer in layers.items()
        if isinstance(layer.get_base_layer(), nn.Linear)
    }
    around = type(model.get_submodule(past[0].rpartition(".")[0])).__name__
    return (
        f"lora.target_modules: {around} reads the weights of {', '.join(sorted(ends))} past their "
        f"adapters (e.g. {past[0]}), so the exported model would not be the trained one. Name "
        f"layers without them: [{', '.join(sorted(rest - ends))}]."
    )


def sharing_copy(model: Any) -> Any:
    """A copy with adapters of its own, on the very same frozen parameters.

    Args:
        model: A model; one without adapters shares nothing with its copy.

    Returns:
        A model with modules, modes and hooks of its own; names as in the original.
    """
    if not is_adapted(model):
        return copy.deepcopy(model)
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    shared: list[Any] = [p for p in model.parameters() if id(p) not in own]
    # What bitsandbytes needs to read a quantized layer belongs to the layer's weight.
    states = (getattr(part, "quant_state", None) for part in model.modules())
    shared += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(each): each for each in shared})


def base_copy(model: Any) -> Any:
    """The model with its adapters off: without them, on the same frozen parameters.

    Args:
        model: A model; one without adapters is copied as it is.
    """
    base = sharing_copy(model)
    for name, layer in _outermost(adapter_layers(base)).items():
        _replace_(base, name, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)
    return base


@torch.no_grad()
def merged_copy(model: Any) -> Any:
    """A plain model with W + s · B A in each adapted layer; the rest is shared.

    Args:
        model: An adapted model whose layers are not quantized.
    """
    merged = sharing_copy(model)
    layers = adapter_layers(merged)
    for layer in layers.values():
        own = adapted_weight(layer)
        weight = merged_weight(layer).to(own.dtype)
        # A parameter of its own: the present one is the student's.
        new = nn.Parameter(weight, requires_grad=False)
        setattr(layer.get_base_layer(), weight_name(layer), new)
    for name, layer in _outermost(layers).items():
        _replace_(merged, name, layer.get_base_layer())
    del merged.peft_config
    return merged


class EffectiveWeight(NamedTuple):
    """Reads a weight when it is called, see `effective_weights`.

    Attributes:
        parameter: W, perhaps in 4 bits.
        layer: The adapted layer whose s · B A is added; None adds nothing.
        dtype: What it is read in.
    """

    parameter: Tensor
    layer: Any
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of what is read."""
        stored = getattr(self.parameter, "quant_state", None)
        return self.parameter.shape if stored is None else torch.Size(stored.shape)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The present weight; the parameter's own storage where it already has the dtype."""
        weight = self.parameter
        if type(weight).__name__ == "Params4bit":
            from peft.utils.integrations import dequantize_bnb_weight

            weight = dequantize_bnb_weight(cast(nn.Parameter, weight))
        if self.layer is None:
            return weight.to(self.dtype)
        delta: Tensor = self.layer.get_delta_weight(ADAPTER)
        return (weight.float() + delta.float()).to(self.dtype)


def effective_weights(
    model: Any, dtype: torch.dtype = torch.float32, merge: bool = True
) -> dict[str, EffectiveWeight]:
    """What reads each weight of a model, under its name in the base model.

    Of an adapted layer that is W + s · B A, summed in float32; tied weights are there once. They
    are read one by one, since all of them at once would be a second model.

    Args:
        model: A model, adapted or not, quantized or not.
        dtype: What they are read in.
        merge: False reads W alone, the base model's weight.
    """
    layers = {id(adapted_weight(layer)): layer for layer in adapter_layers(model).values()}
    adapters = adapter_parameters(model)
    return {
        base_name(name): EffectiveWeight(
            parameter, layers.get(id(parameter)) if merge else None, dtype
        )
        for name, parameter in model.named_parameters()
        if name not in adapters
    }


def merged_weight(layer: Any) -> Tensor:
    """W + s · B A of an adapted layer, `(out, in)` in float32; `(E, out, in)` of E fused experts.

    Args:
        layer: One of `adapter_layers`.
    """
    return EffectiveWeight(adapted_weight(layer), layer, torch.float32)()


def _outermost(layers: dict[str, Any]) -> dict[str, Any]:
    """Adapted layers that stand in no other: each of the parameters of fused experts has one."""
    return {name: layer for name, layer in layers.items() if not name.endswith(".base_layer")}


def _replace_(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def keep_adapters_only_(module: nn.Module, student: Any) -> None:
    """Let `module.state_dict()` hold no frozen weights of the student, and let such a one load.

    They are left out of the student itself and of every teacher that shares them. An adapter that
    is missing when loading is an error as ever.

    Args:
        module: A LightningModule of ours.
        student: Its adapted model.
    """
    adapters = frozenset(adapter_parameters(student))
    module.register_state_dict_post_hook(partial(_drop_frozen, adapters))
    module.register_load_state_dict_post_hook(partial(_forgive_frozen, adapters))


def _is_frozen(adapters: frozenset[str], module: nn.Module, key: str) -> bool:
    sharing = (name for name, part in module.named_children() if _shares_weights(part))
    models = ("student.", *(f"{name}.model." for name in sharing))
    return any(
        key.startswith(model) and key.removeprefix(model) not in adapters for model in models
    )


def _shares_weights(part: nn.Module) -> bool:
    return bool(getattr(part, "shares_weights", False))


def _drop_frozen(
    adapters: frozenset[str], module: nn.Module, state: dict[str, Any], prefix: str, _: object
) -> None:
    for key in list(state):
        if key.startswith(prefix) and _is_frozen(adapters, module, key.removeprefix(prefix)):
            del state[key]


def _forgive_frozen(adapters: frozenset[str], module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [
        key for key in found.missing_keys if not _is_frozen(adapters, module, key)
    ]
