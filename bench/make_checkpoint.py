"""Makes what both sides of the benchmark read: a model folder of an exact public shape with random bfloat16 weights, a LoRA adapter, and rows.

    python3 bench/make_checkpoint.py --shape llava-7b … --out DIR [--device cuda]     (each shape into DIR/martlet-bench-<shape>)

…/model     config.json and safetensors shards in the hub's spelling; every weight N(0, 0.02), T5's as transformers begins them; norm weights 1
…/adapter   a PEFT adapter on the language model, r 8, alpha 16, on the shape's targets or the seven linears of every layer; neither matrix is
            zero. Not for a shape without a peer: its runs start from a fresh one
…/data.safetensors   ids and labels [rows, tokens] int32 (labels of an encoder-decoder are its decoder's: [rows, decoder tokens]), pictures
                     [rows, size, size, 3] uint8; for the vision tower alone visionIds [1, tokens] and visionPictures [pictures, size, size, 3]
…/shape.json   the shape, written last: a folder with the same one is left as it is
"""

import argparse
import json
import math
import re
import shutil
import time
from pathlib import Path

import torch
from original_shapes import ORIGINAL_SHAPES
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
    "blip-2": [("", "")],
}
HUB_NAMES["qwen2_5_vl"] = HUB_NAMES["qwen2_vl"]
LANGUAGE_MODEL = {"blip-2": "language_model."}


def hub_name(name: str, model_type: str) -> str:
    for own, hub in HUB_NAMES[model_type]:
        if name.startswith(own):
            return hub + name[len(own) :]
    raise ValueError(name)


def is_norm(name: str) -> bool:
    return any(part in name.lower() for part in ("norm", "layrnorm", "ln_"))


def t5_stds(text: dict) -> dict[str, float]:
    """By the ending of a name: transformers' T5PreTrainedModel._init_weights. T5 does not divide scores by sqrt(d), its q does; with 0.02 for all
    of them softmax picks single keys, and gradients in bfloat16 have nothing to do with those in float32. The head, of its own here, is drawn so
    that logits are of the order of 1."""
    inner = text["num_heads"] * text["d_kv"]
    into = text["d_model"] ** -0.5
    return {
        ".q.weight": (text["d_model"] * text["d_kv"]) ** -0.5,
        ".k.weight": into,
        ".v.weight": into,
        ".o.weight": inner**-0.5,
        ".relative_attention_bias.weight": into,
        ".wi_0.weight": into,
        ".wi_1.weight": into,
        ".wo.weight": text["d_ff"] ** -0.5,
        ".shared.weight": 1.0,
        ".lm_head.weight": into,
    }


def std_of(name: str, config: dict) -> float:
    """Of the random weights of a name."""
    text = config.get("text_config", {})
    if text.get("model_type") == "t5" and name.startswith("language_model."):
        return next(std for ending, std in t5_stds(text).items() if name.endswith(ending))
    return 0.02


def meta_model(folder: Path) -> torch.nn.Module:
    """transformers' model of the folder's config.json, without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


def write_weights(out: Path, shapes: dict[str, tuple[int, ...]], config: dict, generator: torch.Generator) -> None:
    """Random weights under the hub's names, in shards with an index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if is_norm(name):
            fill = torch.ones if name.endswith("weight") else torch.zeros
            value = fill(shape, dtype=torch.bfloat16)
        else:
            value = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
            value = value.normal_(0, std_of(name, config), generator=generator).cpu()
        if size + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = value
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


def write_adapter(out: Path, model: torch.nn.Module, shape: dict, generator: torch.Generator) -> None:
    out.mkdir(parents=True)
    prefix = LANGUAGE_MODEL.get(shape["config"]["model_type"], "model.language_model.layers.")
    targets = shape["lora"]["targets"] if "lora" in shape else TARGETS
    tensors = {}
    for name, module in model.named_modules():
        if not (name.startswith(prefix) and name.rsplit(".", 1)[-1] in targets):
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
        "target_modules": rf"{re.escape(prefix)}.*\.({'|'.join(targets)})",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def marks(config: dict) -> dict:
    """Ids around the pictures of a row: `image`, its place; `start` and `end`, around the first; `slice`, a pair around each other one."""
    model_type = config["model_type"]
    if model_type == "qwen":
        first = config["visual"]["image_start_id"]
        return {"image": first + 2, "start": first, "end": first + 1}
    if model_type == "minicpmv":
        # <unk>, <image>, </image>, <slice>, </slice> of the published vocabulary; a trial's stand at its end.
        if "image_token_id" in config:
            return {"image": 500, "start": 501, "end": 502, "slice": (503, 504)}
        return {"image": 128244, "start": 151646, "end": 151647, "slice": (151656, 151657)}
    image = config["image_token_id"] if "image_token_id" in config else config["image_token_index"]
    if "vision_start_token_id" in config:
        return {"image": image, "start": config["vision_start_token_id"], "end": config["vision_end_token_id"]}
    return {"image": image}


def token_ids(rows: int, tokens: int, picture_tokens: list[int], config: dict, generator: torch.Generator):
    """A few words, the pictures, words. A start token where the model has one, marks around pictures where it has them."""
    mark = marks(config)
    special = [value for name, value in config.items() if name.endswith(("_token_id", "_token_index"))]
    special += [value for value in mark.values() if isinstance(value, int)]
    ids = torch.randint(30, min(special), (rows, tokens), generator=generator)
    if config["model_type"] == "llava":
        ids[:, 0] = 1
    at = min(35, (tokens - sum(picture_tokens)) // 8)
    if config["model_type"] == "blip-2":
        at = 0  # the queries stand in front of all text
    for i, count in enumerate(picture_tokens):
        start, end = mark["slice"] if i > 0 and "slice" in mark else (mark.get("start"), mark.get("end"))
        if start is not None:
            ids[:, at] = start
            ids[:, at + 1 + count] = end
            at += 1
        ids[:, at : at + count] = mark["image"]
        at += count + (start is not None)
    if config["model_type"] == "blip-2":
        if config["use_decoder_only_language_model"]:
            ids[:, at] = 2
        else:
            ids[:, -1] = 1
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
    views = row.get("views", 1)
    decoder = row.get("decoderTokens", 0)
    ids = token_ids(ROWS, row["tokens"] - decoder, [row["imageTokens"] // views] * views, config, generator)
    if decoder:
        labels = token_ids(ROWS, decoder, [], config, generator)
    else:
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
    config, folder = shape["config"], out / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shape.get("peer") == "none":
        shapes = ORIGINAL_SHAPES[config["model_type"]](config)
        write_weights(folder, shapes, config, generator)
    else:
        model = meta_model(folder)
        shapes = {hub_name(name, config["model_type"]): tuple(p.shape) for name, p in model.named_parameters()}
        text = config.get("text_config", {})
        if text.get("model_type") == "t5":
            # transformers 5 makes flan-T5's head the embedding unless the file has one of its own, as the published ones have.
            shapes["language_model.lm_head.weight"] = (text["vocab_size"], text["d_model"])
        write_weights(folder, shapes, config, generator)
        write_adapter(out / "adapter", model, shape, generator)
    write_rows(out / "data.safetensors", shape)
    parameters = sum(math.prod(size) for size in shapes.values())
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
