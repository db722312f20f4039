"""All settings of a plan for PyTorch users: run a Hugging Face model under it (extra `torch`).

    from rlens_jax.plans import Plan, Reduction
    from rlens_jax.torch_twin import reduced

    with reduced(model, Plan(attention=(20, 21), ffn=(22, 23)), Reduction()):
        logits = model(**inputs).logits        # or model.generate(**inputs)

Supported are models with a `language_model` built like Llama or Qwen2: Qwen2-VL, -hf models of LLaVA and InternVL, and others,
with eager or SDPA attention, padded on either side. The Dynamic FFN computes gate, up and down of visual tokens on the kept units
only, and a skipped FFN computes nothing for them. Hollow Attention and attention to text only are masks, and a skipped attention
sets updates to zero, so their saving is *simulated*. Keys and values of all tokens are made and cached in every layer. A prefill
must contain all visual tokens of its samples; decoding steps run the plain layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlens_jax.errors import UserError
from rlens_jax.plans import SKIP, TEXT, Level, Plan, Reduction, value_of

ATTENTION_KINDS = ("eager", "sdpa")


@dataclass
class Record:
    """The selection of the probes in the latest prefill."""

    kept_units: dict[int, Tensor] = field(default_factory=dict)
    """Per layer int64 [B, U], highest score first; 0 ... U - 1 for a sample without visual tokens."""


@contextmanager
def reduced(
    model: nn.Module,
    plan: Plan,
    reduction: Reduction,
    *,
    image_token: int | None = None,
    kept_units: Mapping[int, Tensor] | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """Reduce layers of a model while the context is open.

    Args:
        model: a Hugging Face model with a `language_model`.
        plan: what each layer does for visual tokens.
        reduction: the standard range and fraction, and the choice of probes.
        image_token: id of the placeholder of a visual token; None takes it from the config of the model.
        kept_units: per layer int [B, U], used instead of the selection of the probes, which is recorded anyway.
        seed: seed of random probes; the JAX package draws other probes from the same seed.

    Raises:
        UserError: the plan names a layer that the model lacks, or the architecture or the attention of the model is not
            supported.
    """
    layers = decoder_layers(model)
    plan.validate(len(layers))
    _check_attention(model, plan)
    token = _image_token(model) if image_token is None else image_token
    state, record = _Pass(), Record()
    undo: list[Callable[[], None]] = []

    def look_at_inputs(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        if ids is None:
            raise UserError("a reduced model needs input_ids, which show which tokens are visual")
        state.begin(ids == token, named.get("past_key_values"))

    def wrap(module: Any, forward: Callable[..., Any]) -> None:
        module.forward = forward
        undo.append(lambda: delattr(module, "forward"))

    hook = model.register_forward_pre_hook(look_at_inputs, with_kwargs=True)
    undo.append(hook.remove)
    held_text = plan.frozen if plan.freeze_text_before else ()
    try:
        for number, level in plan.reduced("attention").items():
            attention: Any = layers[number].self_attn
            held = partial(state.held, number in held_text)
            wrap(attention, _attention(attention.forward, state, value_of("attention", level, reduction), reduction.window, held))
        for number, level in plan.reduced("ffn").items():
            mlp: Any = layers[number].mlp
            if level == SKIP:
                wrap(mlp, _without(mlp.forward, partial(state.held, number in held_text)))
                continue
            imposed = None if kept_units is None else kept_units.get(number)
            settings = replace(reduction, active_fraction=_fraction(level, reduction))
            wrap(mlp, _dynamic(mlp, mlp.forward, state, settings, record, number, imposed, seed))
        yield record
    finally:
        for step in reversed(undo):
            step()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a multimodal model. UserError when its architecture is not supported."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "language_model":
            for inner in (module, getattr(module, "model", None)):
                layers = getattr(inner, "layers", None)
                if isinstance(layers, nn.ModuleList) and all(_fits(layer) for layer in layers):
                    return layers
    raise UserError(f"{type(model).__name__}: has no language_model with layers of self_attn and mlp (gate, up and down)")


def _fits(layer: nn.Module) -> bool:
    mlp = getattr(layer, "mlp", None)
    return hasattr(layer, "self_attn") and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _image_token(model: nn.Module) -> int:
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    raise UserError(f"{type(model).__name__}: its config has no image token; pass image_token")


def _check_attention(model: nn.Module, plan: Plan) -> None:
    text = getattr(model.config, "text_config", model.config)
    kind = getattr(text, "_attn_implementation", None)
    masked = any(level != SKIP for level in plan.reduced("attention").values())
    if masked and kind not in ATTENTION_KINDS:
        raise UserError(
            f"reduced attention needs a mask, which {kind} does not take; load the model with attn_implementation "
            f"{' or '.join(ATTENTION_KINDS)}"
        )


class _Pass:
    """The current forward pass: which tokens are visual, or None if it is not a prefill."""

    def __init__(self) -> None:
        self.is_visual: Tensor | None = None
        self.ordinal: Tensor | None = None

    def begin(self, is_visual: Tensor, cache: Any) -> None:
        """Start a pass; `is_visual` is bool [B, T], `cache` has the earlier tokens."""
        first = cache is None or cache.get_seq_length() == 0
        if not first and bool(is_visual.any()):
            raise UserError("visual tokens after the first pass cannot be reduced: the probes need all visual tokens of a sample")
        self.is_visual = is_visual if first else None
        self.ordinal = is_visual.cumsum(dim=1) - is_visual.long()

    def held(self, with_text_before: bool) -> Tensor | None:
        """Which tokens a skipping layer leaves as they are, bool [B, T]; None if the pass is no prefill."""
        if self.is_visual is None or not with_text_before:
            return self.is_visual
        later = self.is_visual.long().flip(1).cumsum(dim=1).flip(1)  # visual tokens from here on
        return later > 0


Held = Callable[[], Tensor | None]
"""`_Pass.held` of a layer."""


def _fraction(level: Level, reduction: Reduction) -> float:
    """The share of units at a level of the FFN that is not SKIP."""
    value = value_of("ffn", level, reduction)
    return value if isinstance(value, float) else 1.0


def _attention(plain: Callable[..., Any], state: _Pass, level: Level, window: str, held: Held) -> Callable[..., Any]:
    """Attention at a level; rows without update come out as zeros, which the layer adds."""

    def without(output: Any, rows: Tensor) -> Any:
        first, *others = output
        return first.masked_fill(rows[..., None], 0), *others

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        rows, visual = held(), state.is_visual
        if rows is None or visual is None:
            return plain(hidden_states=hidden_states, attention_mask=attention_mask, **others)
        if level == SKIP:
            return without(plain(hidden_states=hidden_states, attention_mask=attention_mask, **others), rows)
        assert isinstance(level, int)
        mask = _hollow(hidden_states, attention_mask, state, level, window)
        output = plain(hidden_states=hidden_states, attention_mask=mask, **others)
        # A visual token with nothing to attend to would attend to all equally.
        return without(output, visual & (mask[:, 0, :, :].amax(dim=-1) < 0)) if level == TEXT else output

    return forward


def _hollow(x: Tensor, attention_mask: Tensor | None, state: _Pass, reach: int, window: str) -> Tensor:
    """The mask to add in which visual tokens see all text before them and the last `reach` visual tokens, themselves included."""
    visual, length = state.is_visual, x.shape[1]
    assert visual is not None
    place = torch.arange(length, device=visual.device)
    order = state.ordinal if window == "ordinal" else place.expand_as(visual)
    assert order is not None
    far = order[:, :, None] - order[:, None, :] >= reach
    hidden = (far & visual[:, :, None] & visual[:, None, :])[:, None]
    lowest = torch.finfo(x.dtype).min
    if attention_mask is None:
        hidden = hidden | (place[None, :] > place[:, None])
        mask = torch.zeros((), dtype=x.dtype, device=visual.device).expand(hidden.shape)
    elif attention_mask.dtype == torch.bool:
        mask = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(~attention_mask, lowest)
    else:
        mask = attention_mask
    # A cache of fixed size has keys after the prefill; the mask passed in hides them already.
    hidden = nn.functional.pad(hidden, (0, mask.shape[-1] - length))
    return mask.masked_fill(hidden, lowest)


def _without(plain: Callable[[Tensor], Tensor], held: Held) -> Callable[[Tensor], Tensor]:
    """FFN whose update is computed for the other tokens only."""

    def forward(x: Tensor) -> Tensor:
        rows = held()
        if rows is None:
            return plain(x)
        y = torch.zeros_like(x)
        y[~rows] = plain(x[~rows][None])[0]
        return y

    return forward


def _dynamic(
    mlp: Any,
    plain: Callable[[Tensor], Tensor],
    state: _Pass,
    reduction: Reduction,
    record: Record,
    layer: int,
    imposed: Tensor | None,
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """FFN in which visual tokens use only the units that the probes of their sample choose."""

    def forward(x: Tensor) -> Tensor:
        if state.is_visual is None:
            return plain(x)
        y = torch.empty_like(x)
        text = ~state.is_visual
        y[text] = plain(x[text][None])[0]
        num_units = reduction.kept_units(mlp.gate_proj.out_features)
        chosen = torch.arange(num_units, device=x.device).repeat(x.shape[0], 1)
        for sample, visual in enumerate(state.is_visual):
            tokens = x[sample, visual]
            if not len(tokens):
                continue
            probes = _probes(len(tokens), reduction, (seed, layer, sample))
            chosen[sample] = _choose(mlp, tokens[probes.to(x.device)], num_units, layer)
            units = chosen[sample] if imposed is None else imposed[sample].to(x.device).long()
            y[sample, visual] = _through(mlp, tokens, units)
        record.kept_units[layer] = chosen
        return y

    return forward


def _probes(num_visual: int, reduction: Reduction, draw: tuple[int, int, int]) -> Tensor:
    """Ordinals of the probes."""
    count = reduction.probe_count(num_visual)
    if reduction.probe == "strided":
        return torch.arange(count) * num_visual // count
    generator = torch.Generator().manual_seed(hash(draw) % 2**63)
    return torch.randperm(num_visual, generator=generator)[:count]


def _choose(mlp: Any, probes: Tensor, num_units: int, layer: int) -> Tensor:
    """The units with the largest mean |H| over the probes [M, D]; ties go to the lower index."""
    hidden = mlp.act_fn(mlp.gate_proj(probes)) * mlp.up_proj(probes)
    scores = hidden.float().abs().mean(dim=0)
    if not bool(scores.isfinite().all()):
        raise UserError(f"layer {layer}: probe scores are not numbers; check the weights, or compute in float32")
    return torch.sort(scores, descending=True, stable=True).indices[:num_units]


def _through(mlp: Any, x: Tensor, units: Tensor) -> Tensor:
    """The FFN on visual tokens [P, D] with some units only, and with the whole output bias."""

    def rows(linear: Any) -> Tensor:
        bias = None if linear.bias is None else linear.bias[units]
        return nn.functional.linear(x, linear.weight[units], bias)

    hidden = mlp.act_fn(rows(mlp.gate_proj)) * rows(mlp.up_proj)
    return nn.functional.linear(hidden, mlp.down_proj.weight[:, units], mlp.down_proj.bias)
