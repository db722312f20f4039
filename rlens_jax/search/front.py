"""The result of a joint search as values, and its file `front.json`: plans with their held-out score and measured time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import median
from typing import Any, Literal

import numpy as np

from rlens_jax.budget import Budget
from rlens_jax.files import check_schema, field_error, read_json_object
from rlens_jax.plans import Levels, Plan
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.confirmation import HeldOutLoss
from rlens_jax.search.joint import Path

FRONT = "front.json"
FRONT_SCHEMA = "rlens-front/1"

Kind = Literal["dense", "joint", "attention", "ffn", "both", "position", "random", "down-sampled"]
DOWN_SAMPLED: Kind = "down-sampled"


@dataclass(frozen=True)
class PrefillTime:
    """Times of one prefill, measured side by side: dense, and with a plan's work skipped.

    Attributes:
        dense, reduced: seconds, one value per repeat.
        dense_flops, reduced_flops: multiplications and additions of the decoder layers for the batch's tokens, probes included.
            Padding is not counted, so flops / seconds is the useful rate.
        samples, text_slots, visual_slots: shape of the timed batch, padding included.
    """

    dense: tuple[float, ...]
    reduced: tuple[float, ...]
    dense_flops: int
    reduced_flops: int
    samples: int
    text_slots: int
    visual_slots: int

    @property
    def saved(self) -> float:
        """The share of the dense prefill's time that is saved, from the medians."""
        return 1 - median(self.reduced) / median(self.dense)


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the held-out samples.

    Attributes:
        kind: where the plan comes from: `dense`; `joint`, a milestone of the joint search; `attention` and `ffn`, that search
            with one operator; `both`, two separate rankings together; `position` and `random`, controls of the published
            plan's cost; `down-sampled`, the dense model on smaller images.
        plan: the plan.
        cost: its share of the dense cost, as the search predicts it; None if it has a level that the search has not.
        flops: its share of the dense prefill's multiply-adds, probes counted; both sides skip the last layer's visual rows.
        visual_tokens: of a sample, on average.
        score: the mean score over the datasets, with a 95 % interval.
        loss: the held-out loss, with its one-sided 95 % bound.
        search_loss: the loss on the samples of the search, None where it was not evaluated.
        time: prefill times beside the dense model, None if not measured.
        on_front: whether no other plan is faster and, with 95 % confidence, at least as good.
    """

    kind: Kind
    plan: Plan
    cost: float | None
    flops: float
    visual_tokens: float
    score: Interval
    loss: HeldOutLoss
    search_loss: float | None
    time: PrefillTime | None
    on_front: bool = True


@dataclass(frozen=True)
class Front:
    """A joint search with its confirmation.

    Attributes:
        budget: what was asked for.
        cost: what the search spent.
        levels: the ladders.
        num_layers: L.
        path: of the search.
        points: the plans that were evaluated on held-out samples; dense first.
        published: the number of the plan that is published, 0 for dense.
        verdict: why, in a sentence.
        samples: held-out samples per dataset.
        images: their different images, which the bootstrap draws.
        model_hash, data_hash: as in ranking.json.
        device: device kind.
        settings: the configuration.
        largest_divergence: if plans were scored by KL, the largest KL(dense || published plan) in nats at one token of an answer
            to a sample of the search.
    """

    budget: Budget
    cost: Literal["time", "flops"]
    levels: Levels
    num_layers: int
    path: Path
    points: tuple[FrontPoint, ...]
    published: int
    verdict: str
    samples: Mapping[str, int]
    images: int
    model_hash: str
    data_hash: str
    device: str
    settings: Mapping[str, Any]
    largest_divergence: float | None = None

    @property
    def plan(self) -> Plan:
        """The published plan."""
        return self.points[self.published].plan


def dominating(costs: Sequence[float | None], differences: np.ndarray) -> list[list[int]]:
    """The plans that dominate each plan: they cost less and are, with confidence, at least as good. None: it is on the front.

    Args:
        costs: of each plan, such as its median time; one without a cost is compared with none.
        differences: [plans, plans], the one-sided lower bound of the score of the first minus that of the second.
    """

    def beats(other: int, one: int) -> bool:
        less, more = costs[other], costs[one]
        return less is not None and more is not None and less < more and bool(differences[other, one] >= 0)

    places = range(len(costs))
    return [[other for other in places if other != one and beats(other, one)] for one in places]


def undominated(costs: Sequence[float | None], differences: np.ndarray) -> list[bool]:
    """Whether each plan is on the front. Arguments as of `dominating`."""
    return [not others for others in dominating(costs, differences)]


def front_fields(front: Front) -> dict[str, Any]:
    """The fields of front.json."""
    return {
        "schema": FRONT_SCHEMA,
        "budget": str(front.budget),
        "cost": front.cost,
        "levels": {"attention": list(front.levels.attention), "ffn": list(front.levels.ffn)},
        "num_layers": front.num_layers,
        "model_hash": front.model_hash,
        "data_hash": front.data_hash,
        "device": front.device,
        "samples": dict(front.samples),
        "images": front.images,
        "published": front.published,
        "verdict": front.verdict,
        **({} if front.largest_divergence is None else {"largest_divergence": front.largest_divergence}),
        "points": [_point_fields(point) for point in front.points],
        "path": [
            {
                "attention": list(point.state.attention),
                "ffn": list(point.state.ffn),
                "cost": point.cost,
                "loss": point.loss,
                **({} if point.predicted is None else {"predicted_loss": point.predicted}),
            }
            for point in front.path.points
        ],
        "rounds": [
            {
                "chosen": None if each.chosen is None else list(each.chosen),
                "ties": [list(move) for move in each.ties],
                "trials": [
                    {
                        "move": list(trial.move),
                        "gain": trial.gain,
                        "loss": trial.loss.value,
                        **({"bound": True} if trial.loss.bound else {}),
                    }
                    for trial in each.trials
                ],
            }
            for each in front.path.rounds
        ],
        "configuration": dict(front.settings),
    }


def _point_fields(point: FrontPoint) -> dict[str, Any]:
    time = point.time
    return {
        "kind": point.kind,
        "plan": point.plan.fields(),
        "cost": point.cost,
        "flops": point.flops,
        "visual_tokens": point.visual_tokens,
        "score": point.score.fields(),
        "loss": point.loss.value,
        "loss_bound": point.loss.bound,
        "search_loss": point.search_loss,
        "time": None if time is None else {**vars(time), "dense": list(time.dense), "reduced": list(time.reduced)},
        "on_front": point.on_front,
    }


def read_front(path: FilePath) -> dict[str, Any]:
    """The fields of a front.json. UserError, naming file and field, if it is none."""
    fields = read_json_object(path)
    check_schema(fields, FilePath(__file__).with_suffix(".schema.json"), path)
    if fields["published"] >= len(fields["points"]):
        raise field_error(path, "published", "names no point")
    return fields
