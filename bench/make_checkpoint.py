"""Makes what both sides of the benchmark read: a model folder of an exact public shape with random bfloat16 weights, a LoRA adapter, and rows.

    python3 bench/make_checkpoint.py --shape llava-7b --out DIR [--device cuda]

DIR/model     config.json and safetensors shards in the hub's spelling; every weight N(0, 0.02), norm weights 1
DIR/adapter   a PEFT adapter, r 8, alpha 16, on the seven linears of every language layer; neither matrix is zero
DIR/data.safetensors   ids and labels [rows, tokens] int32, pictures [rows, size, size, 3] uint8
Nothing is done if DIR/done says that it was made for this shape already.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

ROWS = 32
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD_BYTES = 5_000_000_000
# transformers 5's module paths → the spelling of the files on the hub
HUB_NAMES = [
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
]


def hub_name(name: str) -> str:
    for own, hub in HUB_NAMES:
        if name.startswith(own):
            return hub + name[len(own) :]
    raise ValueError(name)


def write_model(out: Path, config: dict, generator: torch.Generator) -> LlavaForConditionalGeneration:
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or "layer_norm" in name or "layrnorm" in name or "layernorm" in name:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            value = fill(parameter.shape, dtype=torch.bfloat16)
        else:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
            value = value.normal_(0, 0.02, generator=generator).cpu()
        if size + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][hub_name(name)] = value
        size += value.nbytes
    index: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        total += sum(t.nbytes for t in shard.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    print(f"  {total / 1e9:.1f} GB in {len(shards)} files", flush=True)
    return model


def write_adapter(out: Path, model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
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


def write_rows(path: Path, shape: dict) -> None:
    """<s>, a few words, the picture, words; the last of them labelled."""
    row, config = shape["row"], shape["config"]
    generator = torch.Generator().manual_seed(7)
    image_token = config["image_token_index"]
    text = row["tokens"] - row["imageTokens"]
    before = min(35, text // 8)
    ids = torch.randint(10, image_token - 10, (ROWS, row["tokens"]), generator=generator)
    ids[:, 0] = 1
    ids[:, before : before + row["imageTokens"]] = image_token
    labels = torch.full_like(ids, -100)
    labels[:, -row["labelled"] :] = ids[:, -row["labelled"] :]
    size = config["vision_config"]["image_size"]
    # Soft blobs with noise on them: neither constant nor pure noise.
    coarse = torch.rand((ROWS, 3, 7, 7), generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * 200
    pictures = (pictures + torch.rand(pictures.shape, generator=generator) * 55).clamp(0, 255)
    save_file(
        {
            "ids": ids.int().contiguous(),
            "labels": labels.int().contiguous(),
            "pictures": pictures.permute(0, 2, 3, 1).to(torch.uint8).contiguous(),
        },
        path,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape = json.loads((Path(__file__).parent / "shapes.json").read_text())[args.shape]
    wanted = json.dumps(shape, sort_keys=True)
    done = args.out / "done"
    if done.exists() and done.read_text() == wanted:
        print(f"  {args.out} is there already", flush=True)
        return
    began = time.time()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    generator = torch.Generator(device=args.device).manual_seed(1)
    model = write_model(args.out / "model", shape["config"], generator)
    write_adapter(args.out / "adapter", model, generator)
    write_rows(args.out / "data.safetensors", shape)
    done.write_text(wanted)
    print(f"  made in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
