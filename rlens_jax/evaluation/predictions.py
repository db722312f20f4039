"""Files of predictions as VLMEvalKit reads and rescores them: a TSV with one row an index and a `prediction` column."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rlens_jax.evaluation.datasets import Dataset
from rlens_jax.files import replace_file


def write_predictions(path: Path, dataset: Dataset, predictions: Sequence[str]) -> None:
    """Write the file, whole or not at all; the folder is made. UserError when it cannot be written.

    The columns of the dataset's own file without the image, then `prediction`; quoted as pandas quotes.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    for place, prediction in enumerate(predictions):
        row = dataset.columns(place)
        if place == 0:
            writer.writerow([*row, "prediction"])
        writer.writerow([*row.values(), prediction])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue().encode())
