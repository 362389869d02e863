"""Copies what the tests of Qwen-VL-Chat and MiniCPM-V always need from the given reference tensors (../shared/reference): tokens, sizes, hashes and
small pictures, no weights. How the reference was computed: the README of each folder there.

    python test/reference/take_small.py
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "reference"
FIXTURES = ROOT / "test" / "fixtures"


def dump(path: Path, rows: list, **head) -> None:
    """One row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    top = "".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)},\n" for k, v in head.items())
    path.write_text("{\n" + top + '"rows": [\n' + lines + "\n]\n}\n", encoding="utf8")


def ints(path: Path, names: list[str]) -> dict[str, list]:
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name).tolist() for name in names if name in f.keys()}


def shapes(target: Path, tensors: dict[str, list[int]]) -> None:
    """Names and shapes of a model's weights: tests that need no reference values make weights of their own."""
    dump(target / "shapes.json", [{"name": name, "shape": shape} for name, shape in sorted(tensors.items())])


def copy(source: Path, target: Path, names: list[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def qwen_vl_chat() -> None:
    source, target = SHARED / "qwen_vl_chat", FIXTURES / "qwen_vl_chat"
    copy(source / "model", target / "model", ["config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"])
    copy(source, target, ["images/a.png", "images/b.jpg"])
    tensors = {}
    for shard in sorted((source / "model").glob("*.bin")):
        tensors |= {name: list(t.shape) for name, t in torch.load(shard, weights_only=True).items()}
    shapes(target, tensors)
    case = json.loads((source / "case.json").read_text())
    keys = ["input_ids", "labels", "labels_official", "prompt_ids", "input_ids_official", "prompt_ids_official"]
    rows = []
    for sample in case["samples"]:
        found = ints(source / "expected" / f"{sample['name']}.safetensors", keys)
        rows.append({"name": sample["name"], "images": sample["images"], "messages": sample["messages"], **found})
    dump(target / "tokens.json", rows, system=case["system"])
    cases = json.loads((source / "tokenizer_full" / "cases.json").read_text())
    texts = [{"text": c["text"], "ids": c["ids_512"], "decoded": c["decoded"]} for c in cases["cases"] if "<img>" not in c["text"]]
    dump(target / "tokenizer.json", texts, special_tokens=cases["reduced"]["special_tokens"])


def minicpm_v() -> None:
    source, target = SHARED / "minicpm_v_2_6", FIXTURES / "minicpm_v"
    copy(
        source / "model",
        target / "model",
        ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"],
    )
    copy(source, target, ["pixels/pixels.json", *(f"images/{p.name}" for p in sorted((source / "images").iterdir()))])
    with safe_open(source / "model" / "model.safetensors", "pt") as f:
        shapes(target, {name: list(f.get_slice(name).get_shape()) for name in f.keys()})
    slicing = json.loads((source / "slicing.json").read_text())
    dump(target / "slicing.json", slicing.pop("rows"), **slicing)
    case = json.loads((source / "case.json").read_text())
    keys = ["input_ids", "labels", "prompt_ids", "image_bound", "best_grid", "tgt_sizes"]
    rows = [
        {**s, **ints(source / "expected" / f"{s['name']}.safetensors", keys)} for s in case["samples"]
    ]
    dump(target / "tokens.json", rows, system=case["system"])
    dump(target / "tokens_only.json", json.loads((source / "expected" / "tokens_only.json").read_text()))
    copy(source / "expected", target, ["pictures.json"])
    buckets = json.loads((source / "position_buckets.json").read_text())
    dump(target / "position_buckets.json", buckets.pop("rows"), **buckets)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    qwen_vl_chat()
    minicpm_v()


if __name__ == "__main__":
    main()
