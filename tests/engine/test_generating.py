"""Generated text against reference answers."""

import numpy as np

from rlens_jax.data.samples import Sample, normalised
from rlens_jax.engine.generating import Generating
from rlens_jax.models.prompt import FILLER

COMPOSED, DECOMPOSED = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"


def test_spellings_of_one_answer_are_right() -> None:
    """White space at the ends and Unicode's two forms: data sources normalise the references, this the generated text."""
    texts = [" 9 ", "9\n", COMPOSED, DECOMPOSED, "Cafe", ""]
    scoring = Generating.__new__(Generating)  # no programs: the tokens are given
    scoring._decode_text = lambda ids: texts[ids[0]]
    samples = [Sample("s", "d", (), "?", (normalised("9\n"), normalised(DECOMPOSED)))]
    numbers = np.array([[0, 0, 0, 0, 0, FILLER]])
    outcomes = scoring.finish((numbers, np.arange(6)[None, :, None], np.ones((1, 6), bool)), samples)
    assert outcomes.outcome.tolist() == [[True] * 4 + [False] * 2]
