"""Measure the memory and time of reading a large TSV file: `python benchmarks/tsv_memory.py --folder DISK [--gigabytes 2]`.

Makes a synthetic OCRBench.tsv with noise images of 3 to 12 MB, references to images and lists of images. Three processes then
read every row with its images, as the reader of benchmarks does; prepare the tensorflow-dataset from it; and read that dataset.
Prints the time and the peak of anonymous and shared memory of each process. The folder needs 2.5 times the size and is left
empty. The peaks should depend on the largest image and not on the size of the file: 0.1 to 0.2 GB for a file of 56 MB.
"""

import argparse
import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from process_memory import measured

COLUMNS = ("index", "image", "question", "answer", "category")
SIDES = (1000, 1400, 2000)
"""Sides of the square noise images in pixels: 3, 5.9 and 12 MB of PNG."""
READ = """
import sys
from pathlib import Path
from rlens_jax.data.benchmarks.tsv import scan

table = scan(Path(sys.argv[1]), ("question", "answer", "category"))
print(len(table.rows), sum(len(image) for row in table.rows for image in table.images(row)))
"""
PREPARE = """
import sys
from pathlib import Path
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark

path = Path(sys.argv[1])
source = read_benchmark("OCRBench", path.parent, path.parent / "prepared", md5=sys.argv[2])
print(len(source), sum(len(image) for instance in source for image in instance.images))
"""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    folder = options.folder / "tsv_memory"
    folder.mkdir(parents=True)
    try:
        path = folder / "OCRBench.tsv"
        rows = make_tsv(path, options.gigabytes * 1e9)
        md5 = subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        result: dict[str, object] = {"gigabytes": path.stat().st_size / 1e9, "rows": rows}
        for name, program in (("read", READ), ("prepare", PREPARE), ("read_prepared", PREPARE)):
            seconds, peak, output = measured(["-c", program, str(path), md5])
            result[name] = {
                "peak_anonymous_and_shared_gigabytes": peak / 1e9,
                "seconds": seconds,
                "rows_and_image_bytes": output.split(),
            }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))


def make_tsv(path: Path, size: float) -> int:
    """Make a file of about `size` bytes; returns its number of rows."""
    rng, images = np.random.default_rng(0), []
    for side in SIDES:
        png = io.BytesIO()
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(png, "png", compress_level=0)
        images.append(base64.b64encode(png.getvalue()).decode())
    number = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("\t".join(COLUMNS) + "\n")
        while file.tell() < size:
            image = images[number % len(images)]
            if number % 10 == 9:
                image = str(number - 1)
            elif number % 10 == 8:
                image = str([images[0], images[1]])
            # The reader has a different path for rows with quotation marks.
            question = "What does it say?" if number % 4 else '"What does ""it"" say?"'
            file.write(f"{number}\t{image}\t{question}\t['a', 'b']\tDoc-oriented VQA\n")
            number += 1
    return number


if __name__ == "__main__":
    main()
