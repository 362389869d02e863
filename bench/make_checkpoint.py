"""Makes what both sides of the benchmark read: a model folder of an exact public shape with random bfloat16 weights, a LoRA adapter, and rows.

    python3 bench/make_checkpoint.py --shape llava-7b … --out DIR [--device cuda]     (each shape into DIR/martlet-bench-<shape>)

…/model     config.json and safetensors shards in the hub's spelling; every weight N(0, 0.02), norm weights 1
…/adapter   a PEFT adapter, r 8, alpha 16, on the seven linears of every language layer; neither matrix is zero
…/data.safetensors   ids and labels [rows, tokens] int32, pictures [rows, size, size, 3] uint8; for the vision tower alone visionIds [1, tokens]
                     and visionPictures [pictures, size, size, 3]
…/shape.json   the shape, written last: a folder with the same one is left as it is
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

ROWS = 32
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD_BYTES = 5_000_000_000
# By model type: transformers 5's module paths → the spelling of the files on the hub
HUB_NAMES = {
    "llava": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual."), ("lm_head.", "lm_head.")],
}
HUB_NAMES["qwen2_5_vl"] = HUB_NAMES["qwen2_vl"]


def hub_name(name: str, model_type: str) -> str:
    for own, hub in HUB_NAMES[model_type]:
        if name.startswith(own):
            return hub + name[len(own) :]
    raise ValueError(name)


def is_norm(name: str) -> bool:
    return any(part in name for part in ("norm", "layrnorm", "ln_q"))


def write_model(out: Path, config: dict, generator: torch.Generator) -> torch.nn.Module:
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out))
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if is_norm(name):
            fill = torch.ones if name.endswith("weight") else torch.zeros
            value = fill(parameter.shape, dtype=torch.bfloat16)
        else:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
            value = value.normal_(0, 0.02, generator=generator).cpu()
        if size + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][hub_name(name, config["model_type"])] = value
        size += value.nbytes
    index: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        total += sum(t.nbytes for t in shard.values())
        shard.clear()
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    return model


def write_adapter(out: Path, model: torch.nn.Module, generator: torch.Generator) -> None:
    out.mkdir(parents=True)
    tensors = {}
    for name, module in model.named_modules():
        if not (name.startswith("model.language_model.layers.") and name.rsplit(".", 1)[-1] in TARGETS):
            continue
        for part, shape, std in (
            ("lora_A", (RANK, module.in_features), module.in_features**-0.5),
            ("lora_B", (module.out_features, RANK), 0.01),
        ):
            value = torch.empty(shape, device=generator.device).normal_(0, std, generator=generator)
            # Rounded to bfloat16, so that every side starts from the same numbers whatever it computes in.
            tensors[f"base_model.model.{name}.{part}.weight"] = value.bfloat16().float().cpu()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(out.parent / "model"),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"model\.language_model\.layers\..*\.({'|'.join(TARGETS)})",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def token_ids(rows: int, tokens: int, picture_tokens: list[int], config: dict, generator: torch.Generator):
    """A few words, the pictures, words. A start token where the model has one, marks around pictures where it has them."""
    special = [value for name, value in config.items() if name.endswith(("_token_id", "_token_index"))]
    ids = torch.randint(10, min(special), (rows, tokens), generator=generator)
    if config["model_type"] == "llava":
        ids[:, 0] = 1
    at = min(35, (tokens - sum(picture_tokens)) // 8)
    for count in picture_tokens:
        if "vision_start_token_id" in config:
            ids[:, at] = config["vision_start_token_id"]
            ids[:, at + 1 + count] = config["vision_end_token_id"]
            at += 1
        ids[:, at : at + count] = config["image_token_id" if "image_token_id" in config else "image_token_index"]
        at += count + ("vision_start_token_id" in config)
    return ids


def random_pictures(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Soft blobs with noise on them: neither constant nor pure noise. [count, size, size, 3]"""
    coarse = torch.rand((count, 3, 7, 7), generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * 200
    pictures = (pictures + torch.rand(pictures.shape, generator=generator) * 55).clamp(0, 255)
    return pictures.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def write_rows(path: Path, shape: dict) -> None:
    row, config = shape["row"], shape["config"]
    generator = torch.Generator().manual_seed(7)
    ids = token_ids(ROWS, row["tokens"], [row["imageTokens"]], config, generator)
    labels = torch.full_like(ids, -100)
    labels[:, -row["labelled"] :] = ids[:, -row["labelled"] :]
    tensors = {
        "ids": ids.int(),
        "labels": labels.int(),
        "pictures": random_pictures(ROWS, row["picture"], generator),
    }
    if vision := shape.get("vision"):
        each = vision["imageTokens"]
        tokens = vision["pictures"] * (each + 2) + 64
        tensors["visionIds"] = token_ids(1, tokens, [each] * vision["pictures"], config, generator).int()
        tensors["visionPictures"] = random_pictures(vision["pictures"], vision["size"], generator)
    save_file(tensors, path)


def make(name: str, out: Path, device: str) -> None:
    shape = json.loads((Path(__file__).parent / "shapes.json").read_text())[name]
    wanted = json.dumps(shape, sort_keys=True)
    done = out / "shape.json"
    if done.exists() and done.read_text() == wanted:
        return
    began = time.time()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    generator = torch.Generator(device=device).manual_seed(1)
    model = write_model(out / "model", shape["config"], generator)
    write_adapter(out / "adapter", model, generator)
    write_rows(out / "data.safetensors", shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    done.write_text(wanted)
    print(f"  {name}: {parameters / 1e9:.3f}e9 parameters, made in {time.time() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name in args.shape:
        make(name, args.out / f"martlet-bench-{name}", args.device)


if __name__ == "__main__":
    main()
