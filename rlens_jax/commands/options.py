"""What commands that run a model under a plan ask for."""

from argparse import ArgumentParser

from rlens_jax.config import DTYPES
from rlens_jax.plan_file import add_plan_options


def add_model_options(parser: ArgumentParser) -> None:
    """MODEL, the plan, and how the model is computed, by the names that `deployment.model.load` has for it."""
    parser.add_argument("model", metavar="MODEL", help='a model folder, or "embedded"')
    add_plan_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation")
    parser.add_argument("--model-shards", metavar="N", type=int, default=1, help="devices that share the model")
    parser.add_argument(
        "--chunk", metavar="N", type=int, help="tokens of a prompt in an FFN at a time (default: by size)"
    )
