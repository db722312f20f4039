"""The methods of a comparison, and how they are written.

    plan.json, opskip:llava-1.5-7b/12    a plan file, or a published policy
    fastv@0.5, vtw@8                     a way to prune visual tokens, one of `pruning.METHODS`, with its budget
    downsample@0.5                       images with at most this share of their visual tokens
    plan.json+fastv@0.5                  one of these on top of a plan
    fastv, downsample                    the same at each of the budgets of the comparison
    all                                  all methods that take a budget and that the model can have, at each of the budgets
    embedded-plan                        the plan that comes with the embedded model

The dense model is always compared.
"""

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property, partial
from typing import Any, get_origin

from rlens_jax.console import say
from rlens_jax.engine.preparing import Resize, as_it_is, down_sampled, share_reached
from rlens_jax.engine.session import ModelFolder
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted
from rlens_jax.mirrors import exists, place
from rlens_jax.models.prompt import Grid, Measure
from rlens_jax.plan_file import PlanFile, read_plan, read_pruning
from rlens_jax.pruning import METHODS, Pruning
from rlens_jax.published_policies import is_policy_name
from rlens_jax.resources import embedded_plan

DENSE, DOWNSAMPLE, ALL, EMBEDDED_PLAN = "dense", "downsample", "all", "embedded-plan"
BUDGETS = ("0.75", "0.5", "0.25")
"""Of a comparison, unless others are given (our decision)."""
_SHARE = re.compile(r"0?\.\d{1,6}", re.ASCII)
_DECIMALS = 9
_MOST_DIGITS = 4
"""Of a number of layers."""
FAMILIES = (DOWNSAMPLE, *METHODS)
"""The methods that take a budget."""


@dataclass(frozen=True)
class Method:
    """What is compared: a plan, perhaps with pruning, on images that are perhaps down-sampled."""

    name: str
    """As it was written, with its budget."""
    plan: PlanFile = field(default_factory=PlanFile)
    image_share: float | None = None
    """Images have at most this share of their visual tokens; None leaves them as they are."""

    def settings(self) -> dict[str, Any]:
        """All that decides what it computes, as JSON values."""
        return {"plan": self.plan.fields(), "image_share": self.image_share}

    @property
    def key(self) -> str:
        """Identifies the settings in logs."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    def resized(self, measure: Measure) -> Resize:
        """What the model gets in place of an image."""
        return as_it_is if self.image_share is None else partial(down_sampled, self.image_share, measure)


Sizes = Sequence[tuple[Measure, Sequence[Grid]]]
"""Widths and heights of some images, with the rule by which the model sizes them."""


def read_methods(texts: Sequence[str], budgets: Sequence[str], model: ModelFolder, images: Sizes) -> list[Method]:
    """The dense model and the methods of `texts`, in order.

    Args:
        texts: see above.
        budgets: of the methods without one of their own.
        model: the model, whose weights are not read.
        images: of the data, for what down-sampling reaches.

    Raises:
        UserError: a method is unknown or cannot be had by the model, a budget is out of range or below what the model's images
            can have, a plan cannot be read, or two methods are the same.
    """
    reader = _Reader(model, images)
    for budget in budgets:
        share_of_budget(budget)
    methods = [Method(DENSE), *reader.read_all(texts, budgets)]
    names = defaultdict(list)
    for method in methods:
        names[method.key].append(method.name)
    for first, *others in names.values():
        if others:
            raise UserError(f"--methods: {others[0]} is the same method as {first}; name each method once")
    return methods


@dataclass(frozen=True)
class _Reader:
    model: ModelFolder
    images: Sizes

    def read_all(self, texts: Sequence[str], budgets: Sequence[str]) -> Iterator[Method]:
        for text in texts:
            if text == ALL:
                yield from self._all_possible(budgets)
                continue
            plan, plus, name = text.rpartition("+")
            known = name.partition("@")[0] in FAMILIES
            if not known:  # a plus may be part of a file's name
                plan, plus, name = text, "", ""
            base = self._plan(plan) if plan else PlanFile()
            if known and "@" not in name:
                yield from self._expanded(plan + plus, name, budgets, base)
            else:
                yield self._budgeted(text, name, base) if known else self._checked(Method(text, base))

    def _all_possible(self, budgets: Sequence[str]) -> Iterator[Method]:
        """Each method that takes a budget, except those that the model cannot have, which is said."""
        for name in FAMILIES:
            try:
                yield from list(self._expanded("", name, budgets, PlanFile()))
            except UserError as error:
                say(f"left out: {error}")

    def _expanded(self, prefix: str, name: str, budgets: Sequence[str], base: PlanFile) -> Iterator[Method]:
        """A method at all budgets. Below the fewest tokens that images can have, there is one with these."""
        found: dict[str, Method] = {}
        for budget in budgets:
            least = self._least_share if name == DOWNSAMPLE else 0.0
            if least > share_of_budget(budget):
                if least == 1:
                    raise _fixed_images(name)
                say(f"{name}@{budget}: images of this model have at least {least:.4f} of their visual tokens; that is compared")
                budget = f"{least:.4f}"
            method = self._budgeted(f"{prefix}{name}@{budget}", f"{name}@{budget}", base)
            found.setdefault(method.key, method)
        yield from found.values()

    def _budgeted(self, text: str, name: str, base: PlanFile) -> Method:
        family, _, budget = name.partition("@")
        try:
            if family == DOWNSAMPLE:
                return self._checked(self._down_sampled(text, budget, base))
            if base.pruning is not None:
                raise UserError(f"the plan prunes already: {base.pruning.label()}")
            pruning = pruning_of_budget(family, budget, self.model)
            return self._checked(Method(text, replace(base, pruning=pruning)))
        except UserError as error:
            raise UserError(f"{text}: {error}") from None

    def _down_sampled(self, text: str, budget: str, base: PlanFile) -> Method:
        share, least = share_of_budget(budget), self._least_share
        if least == 1:
            raise _fixed_images(DOWNSAMPLE)
        if share < least - 1e-4:
            raise UserError(f"images of this model have at least {least:.4f} of their visual tokens; choose that or more")
        return Method(text, base, float(share))

    @cached_property
    def _least_share(self) -> float:
        """The least share of visual tokens that the images can have."""
        reached = [share_reached(0.0, measure, sizes) for measure, sizes in self.images]
        fewest, whole = (sum(counts) for counts in zip(*reached, strict=True))
        return fewest / whole if whole else 1.0

    def _checked(self, method: Method) -> Method:
        kind = self.model.kind
        method.plan.validate(kind.config.decoder, kind.model_type)
        kind.check_pruning(method.plan.pruning)
        return method

    def _plan(self, text: str) -> PlanFile:
        if text == DENSE:
            return PlanFile()
        if text == EMBEDDED_PLAN:
            return read_plan(embedded_plan())
        if not is_policy_name(text) and not exists(place(text)):
            family, _, _ = text.partition("@")
            near, known = suggest(family, (*FAMILIES, ALL, EMBEDDED_PLAN)), ", ".join(FAMILIES)
            raise UserError(f"--methods: {quoted(text)} is no plan file, no published policy, and none of {known}{near}")
        return read_plan(text)


def share_of_budget(budget: str) -> Decimal:
    """The share of the visual tokens that a budget keeps. UserError unless it is a decimal above 0 and below 1."""
    share = Decimal(budget) if _SHARE.fullmatch(budget) else Decimal(0)
    if not share:
        raise UserError(f"a budget is the share of the visual tokens that is kept, above 0 and below 1, not {quoted(budget)}")
    return share


def pruning_of_budget(method: str, budget: str, model: ModelFolder) -> Pruning:
    """A way to prune with a budget b, by the fields that plan files have for it.

    `share`, which is dropped, is 1 - b. `keep` is b, or for several steps b, b^2 and b^3, for 0.5 those of PyramidDrop's paper. A
    method with a `layer` alone drops all tokens behind it: a whole number is this layer, and a share that of the layers before
    it, so of the tokens in the mean. UserError if the budget is out of range.
    """
    known, kind = {item.name: item.type for item in dataclasses.fields(METHODS[method])}, model.kind
    num_layers, side = kind.config.decoder.num_layers, kind.family.grid(kind.config)
    if not known.keys() & {"share", "keep"} and budget.isdecimal() and len(budget) <= _MOST_DIGITS:
        return read_pruning({"method": method, "layer": int(budget)})
    share = share_of_budget(budget)
    fields: dict[str, Any] = {"method": method}
    if "share" in known:
        fields["share"] = float(1 - share)
    elif "keep" in known:
        steps = [round(float(share**step), _DECIMALS) for step in (1, 2, 3)]
        fields["keep"] = steps if get_origin(known["keep"]) is tuple else steps[0]
    else:
        fields["layer"] = max(1, int(share * num_layers + Decimal("0.5")))
    if "side" in known and side is not None:  # without one, the method is refused
        fields["side"] = side
    return read_pruning(fields)


def _fixed_images(name: str) -> UserError:
    return UserError(f"{name}: all images of this model have as many visual tokens, whatever their size; compare pooling instead")
