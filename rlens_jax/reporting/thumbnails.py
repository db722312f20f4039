"""Small JPEGs in JSON files, so that a report needs no other file."""

import base64
import io

from PIL import Image

_SIDE, _BYTES = 448, 24_000
_QUALITIES = (85, 70, 55, 40, 25)


def thumbnail(image: Image.Image) -> dict[str, str | int]:
    """The fields of a JPEG of at most `_SIDE` pixels a side and about `_BYTES` bytes: coarser if the image is rich in detail."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _BYTES:
            break
    return {
        "media_type": "image/jpeg",
        "width": small.width,
        "height": small.height,
        "base64": base64.b64encode(buffer.getvalue()).decode(),
    }


def is_jpeg(encoded: str) -> bool:
    """Whether a text is a thumbnail in base64."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["JPEG"]) as image:
            if max(image.size) > 2 * _SIDE:  # from the header: a small file may claim any size
                return False
            image.load()
    # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
    except Exception:
        return False
    return True
