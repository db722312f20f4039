"""Plan files: which layers of a model are reduced, and how, as JSON that can be written by hand.

    {"format": "rlens-plan/1",
     "num_layers": 28,                     optional; checked against the model
     "attention": [14, 15, 16, 27],        layers with Hollow Attention, 0-based
     "ffn": [20, 21, 27],                  layers with the Probe-Activated Dynamic FFN
     "attention_range": 256,               R, in visual tokens
     "active_fraction": 0.2,               share of the FFN units that visual tokens keep
     "probe_fraction": 0.1,                share of the visual tokens that are probes
     "probe": "strided",                   or "random"
     "window": "ordinal",                  or "position"
     "pruning": null}                      token pruning, see below

Only `format` is required. Without layers the plan is the dense model, and other fields have the defaults of `Reduction`. With
"rlens-plan/2" single layers may have levels of their own (docs/method.md). A layer is named at most once per operator:

     "attention_levels": [{"layers": [20, 21], "range": 64},      another range
                          {"layers": [22], "range": 0},           visual tokens attend to text only
                          {"layers": [23], "skip": true}],        no attention update of visual tokens
     "ffn_levels": [{"layers": [20], "fraction": 0.5},            another share of units
                    {"layers": [23, 24], "skip": true}],          no FFN update of visual tokens
     "freeze": [25, 26, 27]                                       neither update

In the frozen layers, `"freeze_text_before": true` also holds the text before the last visual token. It is there to repeat what
Op-Skip's own runs compute; it is done by a mask and saves nothing.

A plan may also be a policy of Op-Skip or ShortV, by name or in its own format (rlens_jax/published_policies.py).
The ranking.json of a run of rlens_jax.rank is also a plan, together with the number of layers to reduce from each
ranking.

Pruning is one of (shares are exact decimals; `layer` is the number of layers that see all visual tokens):

    {"method": "fastv", "layer": 2, "share": 0.5}     FastV: drop this share of the visual tokens, by attention
    {"method": "fastv", "layer": 2, "keep": 192}      ... keep this number; "attention": "all_tokens" as in the paper's text
    {"method": "vtw", "layer": 14}                    VTW: drop all visual tokens
    {"method": "folder", "share": 0.5}                FOLDER-style: merge this share away before the first layer
    {"method": "pyramiddrop"}                         PyramidDrop: after a quarter, half and three quarters of the layers, keep
                                                      "keep": [0.5, 0.25, 0.125]; or after "layers": [8, 16, 24]
    {"method": "sparsevlm", "keep": [300, 200, 118]}  SparseVLM "+", after 3, 7 and 16 of 32 layers, or after "layers";
                                                      "version": "1.5" merges dropped tokens as well
    {"method": "dart", "layer": 2, "keep": 192}       DART: keep the tokens least like a few pivots

All but FOLDER take "positions": "kept" (default), or "renumbered", which models with M-RoPE cannot have.

These keep so many of each sample's visual tokens before the first layer (rlens_jax/kept_tokens.py): `keep` is a number of tokens
if it is a whole number, and a share of them if it is a decimal number above 0 and at most 1. So 1 is one token, 1.0 is all.

    {"method": "random", "keep": 64}                  drawn by the run's seed and the sample
    {"method": "strided", "keep": 64}                 every so-many-th
    {"method": "pooling", "keep": 64, "side": 24}     averages of each image's grid of 24 x 24 tokens
    {"method": "divprune", "keep": 0.098}             DivPrune: those that differ most
    {"method": "cdpruner-embeddings", "keep": 64}     CDPruner: those that differ and have to do with the question
    {"method": "fastervlm", "keep": 64}               FasterVLM: those with most attention in the vision tower
    {"method": "visionzip", "keep": 64, "merge": "sum"}   VisionZip: those, and others merged ("sum" as published, or "mean")

On a command line the same is written --pruning fastv:layer=2,share=0.5, --pruning divprune:keep=64, or with a list, --pruning
sparsevlm:keep=300+200+118.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted, read_json
from rlens_jax.flops import DecoderSizes
from rlens_jax.kept_tokens import TowerSelection
from rlens_jax.mirrors import fetched, place
from rlens_jax.plans import LEVEL_FIELDS, MOST_LAYERS, OPERATORS, PLAN_FIELDS, Operator, Plan, Reduction
from rlens_jax.pruning import METHODS, Pruning, pruning_fields
from rlens_jax.published_policies import MadeFor, Policy, is_policy, is_policy_name, named_policy, policy_of
from rlens_jax.search.ranking_file import LARGEST_RANKING, SCHEMA, RankingFile, check_ranking

FORMAT, LEVELS_FORMAT = "rlens-plan/1", "rlens-plan/2"
"""Without and with levels of single layers."""
_MOST_DIGITS = 4
"""Of a number of layers."""
_MOST_DIGITS_OF_COUNT = 12
"""Of other numbers on a command line."""

_REDUCTION_FIELDS = tuple(item.name for item in dataclasses.fields(Reduction))
_FIELDS = ("format", "num_layers", *PLAN_FIELDS, *_REDUCTION_FIELDS, "pruning")
_REFUSED = {"cdpruner": "needs CLIP's text tower, which no family has; use cdpruner-embeddings"}
_NEEDED = {
    "layer": "the number of layers that see the visual tokens",
    "keep": "a number of visual tokens, such as 64, or a share of them, such as 0.25",
}
"""Fields of methods without a default, by name."""


@dataclass(frozen=True)
class PlanFile:
    """How a deployed model computes: static and hashable. `PlanFile()` is the dense model."""

    plan: Plan = field(default_factory=Plan)
    reduction: Reduction = field(default_factory=Reduction)
    num_layers: int | None = None
    """Number of layers of the plan's model, None if the file does not say."""
    pruning: Pruning | None = None
    """How visual tokens are dropped or merged, None for no pruning."""
    made_for: MadeFor | None = None
    """The model of somebody else's policy."""

    @property
    def marked(self) -> bool:
        """Whether pruning looks at the vision tower, so that visual tokens need marks (`ModelPrograms.encode`)."""
        return isinstance(self.pruning, TowerSelection)

    def validate(self, sizes: DecoderSizes, model_type: str | None = None) -> None:
        """Raise UserError unless the plan fits a model of these sizes and, if it is known, of this `model_type`."""
        num_layers = sizes.num_layers
        if self.made_for is not None:
            self.made_for.validate(sizes, model_type)
        if self.num_layers not in (None, num_layers):
            raise UserError(f"the plan is for a model with {self.num_layers} layers, but this model has {num_layers}")
        self.plan.validate(num_layers)
        if self.pruning is not None:
            self.pruning.validate(num_layers)
            if sizes.position_axes > 1 and getattr(self.pruning, "positions", "kept") == "renumbered":
                raise UserError(
                    f"{self.pruning.label()}: this model's positions have {sizes.position_axes} parts (M-RoPE), which cannot be "
                    'renumbered; use "positions": "kept"'
                )

    def label(self) -> str:
        """A short text for tables and messages."""
        pruned = [] if self.pruning is None else [self.pruning.label()]
        return ", ".join([self.plan.label(), *pruned])

    def fields(self) -> dict[str, Any]:
        """All settings of the computation, as JSON values with the names of a plan file."""
        return {**self.plan.fields(), **dataclasses.asdict(self.reduction), "pruning": pruning_fields(self.pruning)}

    def document(self) -> dict[str, Any]:
        """The plan file, as JSON values: of format 1 if no layer has a level of its own."""
        fields = self.fields()
        start: dict[str, Any] = {"format": LEVELS_FORMAT if fields.keys() & set(LEVEL_FIELDS) else FORMAT}
        return start | ({} if self.num_layers is None else {"num_layers": self.num_layers}) | fields


def read_plan(path: str | Path, first: Mapping[Operator, int] | None = None) -> PlanFile:
    """Read a plan file, or a ranking.json with `first`: how many layers to reduce per operator, from the start of its ranking.

    `path` may also be the name of a published policy, such as opskip:llava-1.5-7b/12.

    Raises:
        UserError: the file cannot be read, a field is unknown or wrong, or `first` does not suit the file.
    """
    if is_policy_name(str(path)):
        if first is not None:
            raise UserError(f"{path}: first layers can be chosen from a ranking.json only, and this is a published policy")
        return _from_policy(named_policy(str(path)))
    path = fetched(place(path))
    fields = read_json(path, LARGEST_RANKING)
    if not isinstance(fields, dict) and not is_policy(fields):
        raise UserError(f"{path}: a plan file must hold one JSON object")
    ranking = check_ranking(fields, path) if isinstance(fields, dict) and fields.get("schema") == SCHEMA else None
    try:
        if ranking is not None:
            return _from_ranking(ranking, first)
        if first is not None:
            raise UserError("first layers can be chosen from a ranking.json only, and this file is not one")
        return _from_policy(policy_of(fields)) if is_policy(fields) else _from_plan(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_first(text: str) -> dict[Operator, int]:
    """`attention=11,ffn=5` as a mapping. UserError for anything else."""
    counts: dict[Operator, int] = {}
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition("="))
        operator = next((known for known in OPERATORS if known == name), None)
        if operator is None or not count.isdecimal() or len(count) > _MOST_DIGITS:
            raise UserError(f"the first layers must have the form attention=11,ffn=5, not {text!r}{suggest(name, OPERATORS)}")
        if operator in counts:
            raise UserError(f"{text!r} names the first layers of {operator} twice")
        counts[operator] = int(count)
    return counts


def parse_pruning(text: str) -> Pruning:
    """`divprune:keep=64` or `fastv:layer=2,share=0.5`, with the names of a plan file. UserError for anything else."""
    method, _, settings = text.partition(":")
    fields: dict[str, Any] = {"method": method.strip()}
    for part in settings.split(",") if settings else []:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name == "method":
            raise UserError(f"--pruning must have the form divprune:keep=64 or fastv:layer=2,share=0.5, not {quoted(text)}")
        if name in fields:
            raise UserError(f"--pruning {quoted(text)} gives {name} twice")
        numbers = [int(one) if one.isdecimal() and len(one) < _MOST_DIGITS_OF_COUNT else one for one in value.split("+")]
        fields[name] = numbers if "+" in value else numbers[0]
    return read_pruning(fields)


def _from_plan(fields: Mapping[str, Any]) -> PlanFile:
    for name in fields:
        if name not in _FIELDS:
            raise UserError(f"unknown field {name!r}{suggest(name, _FIELDS)}; known: {', '.join(_FIELDS)}")
    if fields.get("format") not in (FORMAT, LEVELS_FORMAT):
        known = f"{FORMAT!r} or {LEVELS_FORMAT!r}"
        raise UserError(f"field 'format' must be {known}, not {quoted(fields.get('format'))}; is this a plan, or a ranking.json?")
    if fields["format"] == FORMAT and (newer := [name for name in LEVEL_FIELDS if name in fields]):
        raise UserError(f"field {newer[0]!r} needs the format {LEVELS_FORMAT!r}, but the file has {FORMAT!r}")
    num_layers = fields.get("num_layers")
    if num_layers is not None and (type(num_layers) is not int or not 1 <= num_layers <= MOST_LAYERS):
        raise UserError(f"num_layers must be a whole number from 1 to {MOST_LAYERS}, not {quoted(num_layers)}")
    plan = Plan.from_fields(fields)
    if num_layers is not None:
        plan.validate(num_layers)
    reduction = Reduction(**{name: fields[name] for name in _REDUCTION_FIELDS if name in fields})
    pruning = fields.get("pruning")
    return PlanFile(plan, reduction, num_layers, None if pruning is None else read_pruning(pruning))


def _from_policy(policy: Policy) -> PlanFile:
    plan, made_for = policy
    return PlanFile(plan, num_layers=None if made_for is None else made_for.num_layers, made_for=made_for)


def read_pruning(fields: Any) -> Pruning:
    """The value of the field `pruning` of a plan file, which is not null. UserError if it is none."""
    if not isinstance(fields, dict) or not isinstance(fields.get("method"), str):
        raise UserError(f"pruning must be null or an object with a method, not {quoted(fields)}")
    method = fields["method"]
    if method in _REFUSED:
        raise UserError(f"pruning.method {method} {_REFUSED[method]}")
    if method not in METHODS:
        raise UserError(f"pruning.method must be one of {', '.join(METHODS)}, not {quoted(method)}{suggest(method, METHODS)}")
    known = [item.name for item in dataclasses.fields(METHODS[method])]
    values = {name: value for name, value in fields.items() if name != "method"}
    for name in values:
        if name not in known:
            raise UserError(f"unknown field pruning.{name}{suggest(name, known)}; {method} knows {', '.join(known)}")
    for item in dataclasses.fields(METHODS[method]):
        if item.default is dataclasses.MISSING and item.name not in values:
            raise UserError(f"pruning.{item.name} is missing: {method} needs {_NEEDED[item.name]}")
    return METHODS[method](**values)


def _from_ranking(ranking: RankingFile, first: Mapping[Operator, int] | None) -> PlanFile:
    orders = ranking.orders
    if first is None:
        known = ",".join(f"{operator}=K" for operator in orders)
        raise UserError(f"is a ranking: choose how many of its first layers to reduce, as in --first {known}")
    # Operators that were not ranked may have been reduced throughout the search.
    layers = {operator: set(ranking.base.layers(operator)) for operator in OPERATORS}
    for operator, count in first.items():
        if operator not in orders:
            more = "; the file is provisional, its run goes on or was stopped" if ranking.provisional else ""
            raise UserError(f"ranks {' and '.join(orders)}, so there are no first layers of {operator}{more}")
        if not 0 <= count <= len(orders[operator]):
            raise UserError(f"ranks {len(orders[operator])} layers of {operator}; {count} cannot be reduced")
        layers[operator] |= set(orders[operator][:count])
    plan = Plan(tuple(layers["attention"]), tuple(layers["ffn"]))
    return PlanFile(plan, ranking.reduction, ranking.num_layers)
