"""Makes test/fixtures/smart_resize.json: sizes that transformers 5.17's `smart_resize` functions give, for pictures (Qwen2-VL's, which all three
families use) and for Qwen3-VL's videos.

Run: python3 -m venv v && v/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.17.0 pillow
     v/bin/python test/reference/make_smart_resize.py
"""

import ast
import json
import math
import random
from pathlib import Path

import transformers

OUT = Path(__file__).resolve().parents[1] / "fixtures" / "smart_resize.json"
MODELS = Path(transformers.__file__).parent / "models"


def function(path: str):
    """The function alone: its module wants torchvision, whose wheel does not load beside a CPU build of torch."""
    module = ast.parse((MODELS / path).read_text(encoding="utf8"))
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "smart_resize"]
    scope = {"math": math}
    exec(compile(module, path, "exec"), scope)
    return scope["smart_resize"]


def call(make, **kwargs):
    try:
        return list(make(**kwargs))
    except ValueError:
        return None


rng = random.Random(3)
image, video = function("qwen2_vl/image_processing_qwen2_vl.py"), function("qwen3_vl/video_processing_qwen3_vl.py")
SIDES = [1, 2, 13, 14, 15, 27, 28, 29, 42, 56, 70, 98, 126, 224, 336, 392, 448, 640, 1080, 1920, 4000, 8191]
LIMITS = {28: [(3136, 12845056), (3136, 1003520), (200704, 1003520), (4 * 784, 64 * 784)], 32: [(65536, 16777216), (4096, 262144)], 8: [(256, 2048)]}
pictures = []
for factor, limits in LIMITS.items():
    for low, high in limits:
        sizes = [(h, w) for h in SIDES for w in rng.sample(SIDES, 5)]
        # halves of the factor: Python's round goes to the even neighbour
        sizes += [(factor * a // 2, factor * b // 2) for a, b in ((1, 3), (3, 5), (5, 7), (7, 1), (9, 11), (13, 2))]
        for height, width in sizes:
            pictures.append([factor, low, high, height, width, call(image, height=height, width=width, factor=factor, min_pixels=low, max_pixels=high)])
videos = []
for factor, low, high in ((32, 4096, 25165824), (32, 128 * 1024, 32 * 32 * 768), (8, 1024, 8192)):
    for _ in range(60):
        frames, height, width = rng.choice([2, 3, 4, 5, 6, 7, 16, 64, 301]), rng.choice(SIDES), rng.choice(SIDES)
        videos.append([factor, low, high, frames, height, width,
                       call(video, num_frames=frames, height=height, width=width, factor=factor, temporal_factor=2, min_pixels=low, max_pixels=high)])

rows = lambda table: "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in table) + "\n]"
OUT.write_text(f'{{"pictures": {rows(pictures)},\n"videos": {rows(videos)}}}\n', encoding="utf8")
print(len(pictures), sum(row[-1] is None for row in pictures), len(videos), sum(row[-1] is None for row in videos))
