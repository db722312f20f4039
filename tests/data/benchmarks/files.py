"""Tiny TSV files of the benchmarks, with real images."""

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.metrics.choice_metrics import ROTATION


def picture(seed: int, kind: str = "png") -> bytes:
    """An image file of noise, larger than a reference could be."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """As pandas.to_csv(sep=tab, index=False) writes it; columns as in the first row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([row.get(name, "") for name in rows[0]] for row in rows)
    return path


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def benchmark_rows(dataset: str, images: int, questions: int = 2, first: int = 0) -> list[dict[str, object]]:
    """`questions` about each of `images` images, the later ones by reference; `first` is the number of the first picture.

    Of MMBench, the rotations of a question with `questions` options about each image.
    """
    rows: list[dict[str, object]] = []
    for number in range(images * questions):
        image, question = divmod(number, questions)
        row: dict[str, object] = {
            "index": str(number),
            "question": f"Question {number}?",
            "image": str(number - question) if question else encoded(picture(first + image)),
        }
        benchmark = BENCHMARKS[dataset]
        if benchmark.answers != "none":
            row[benchmark.answer_column] = "['a', 'b', 'a']" if benchmark.answers == "list" else "Yes"
        if dataset == "OCRBench":
            row["category"] = f"kind {image % 3}"
        elif dataset == "ChartQA_TEST":
            row["split"] = ("test_human", "test_augmented")[image % 2]
        elif dataset == "MME":
            # Files of different categories have equal names.
            row |= {"category": ("OCR", "count")[image % 2], "image_path": f"{image // 2}.jpg"}
        elif dataset == "POPE":
            row["category"] = ("adversarial", "popular,random")[image % 2]
        elif benchmark.circular:
            colours = ["blue", "red", "green", "black"][:questions]
            rotated = dict(zip("ABCD", colours[question:] + colours[:question], strict=False))
            row |= {"index": str(image + question * ROTATION), "image": str(image) if question else row["image"]}
            row |= dict.fromkeys("ABCD", "") | rotated | {"answer": next(key for key in rotated if rotated[key] == "blue")}
            row |= {"hint": "", "category": f"kind {image % 3}", "l2-category": "fine", "split": "dev"}
        elif benchmark.task == "choice":
            row |= {"answer": "B", "A": "red", "B": "blue", "C": "green", "D": "None"}
            row |= {name: "" for name in benchmark.columns if name not in row}
            for name, text in (("category", f"kind {image % 3}"), ("l2-category", "fine"), ("split", "validation")):
                row |= {name: text} if name in benchmark.columns else {}
            if dataset == "MMStar":
                row["l2_category"] = "fine"
            elif dataset == "MMMU_DEV_VAL":
                row["image_path"] = f"{image}.png"
        elif dataset == "HallusionBench":
            # Sets of two figures, and two questions about each figure.
            kind = ("VD", "VS")[image % 4 // 2]
            index = f"{kind}_chart_0_{image // 2}_{image % 2}_{question}"
            reference = f"{kind}_chart_0_{image // 2}_{image % 2}_0"
            row |= {"index": index, "category": kind, "l2-category": f"{kind} chart"}
            row["image"] = reference if question else row["image"]
        rows.append(row)
    return rows


def five_rows(name: str) -> list[dict[str, object]]:
    """Of MMBench a question of three rotations and one of two."""
    if not BENCHMARKS[name].circular:
        return benchmark_rows(name, images=5, questions=1)
    second = [
        row | {"index": str(7 + k * ROTATION), "image": encoded(picture(7))}
        for k, row in enumerate(benchmark_rows(name, images=1, questions=2))
    ]
    return [*benchmark_rows(name, images=1, questions=3), *second]
