"""Memory and time of reading a large TSV file: `python benchmarks/tsv_memory.py --gigabytes 2 --folder DISK`.

Makes a synthetic OCRBench.tsv with noise images of 3 to 12 MB, references and lists of images, and then, each in a process of
its own: reads every row with its images, as the benchmarks' reader does; prepares the tensorflow-dataset from it; reads that
back. Prints the peak of each process's anonymous and shared memory. The folder needs 2.5 times the size; it is left empty.
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
"""Of the square noise images: 3, 5.9 and 12 MB of PNG."""
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
    """A file of about `size` bytes; the number of its rows."""
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
            # Rows with quotation marks take another way through the reader.
            question = "What does it say?" if number % 4 else '"What does ""it"" say?"'
            file.write(f"{number}\t{image}\t{question}\t['a', 'b']\tDoc-oriented VQA\n")
            number += 1
    return number


if __name__ == "__main__":
    main()
