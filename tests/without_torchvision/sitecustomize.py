"""Put on PYTHONPATH of subprocesses: hides torchvision, whose wheel cannot be imported beside a CPU build of torch.

It also makes those subprocesses what the main job is on most machines: one without PyTorch's image code.
"""

import sys

sys.modules["torchvision"] = None  # type: ignore[assignment]
