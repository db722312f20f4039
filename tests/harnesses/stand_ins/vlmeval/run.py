"""Asks a model all questions of LMUData/DATA.tsv, one at a time, and writes its predictions."""

import argparse
import base64
import csv
import os
from pathlib import Path

from vlmeval.config import supported_VLM


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--work-dir"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    folder = Path(os.environ["LMUData"])  # noqa: SIM112  (its name)
    model = supported_VLM[options.model]()
    images = folder / "images"
    images.mkdir()

    def dump_image(line):
        (path := images / f"{line['index']}.png").write_bytes(base64.b64decode(line["image"]))
        return [str(path)]

    model.set_dump_image(dump_image)
    with (folder / f"{options.data}.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        assert model.use_custom_prompt(options.data)
        message = model.build_prompt(row, dataset=options.data)
        row["prediction"] = model.generate(message=message, dataset=options.data)
    Path(options.work_dir).mkdir()
    with (Path(options.work_dir) / f"{options.model}_{options.data}.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", "prediction"], delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
