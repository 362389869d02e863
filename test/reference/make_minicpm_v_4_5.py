"""Makes test/fixtures/minicpm_v_4_5: a tiny MiniCPM-V 4.5 with random weights and what it computes.

MiniCPM-V 4.5 reads pictures as 2.6 does (its temporal positions are for videos) and has Qwen3 for Qwen2: computed are the tower, the resampler and the
placement of features by 2.6's own remote code, the language model by transformers. `--code` is a folder with the remote code of MiniCPM-V 2.6.

    python test/reference/make_minicpm_v_4_5.py --code DIR
"""

import argparse
import builtins
import importlib
import json
import shutil
import sys
import types
import typing
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
OUT = FIXTURES / "minicpm_v_4_5"
MEDIA = FIXTURES / "minicpm_v"

CONFIG = {
    "model_type": "minicpmv",
    "version": 4.5,
    "architectures": ["MiniCPMV"],
    "attention_bias": False,
    "head_dim": 48,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 534,
    "drop_vision_last_layer": False,
    "query_num": 16,
    "use_image_id": True,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 112, "model_type": "minicpmv"},
    "vision_batch_size": 16,
    "vision_config": {
        "model_type": "siglip",
        "hidden_size": 24,
        "image_size": 98,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
}

# Qwen3's, in its parts that matter here: an empty thought before the answer to the last question.
TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- if ns.last == messages|length - 1 and message.role == 'user' %}"
    "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def remote_code(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Tower and resampler. (`List` once came to the resampler through a star import.)"""
    builtins.List = typing.List
    sys.path.insert(0, str(folder.parent))
    return tuple(importlib.import_module(f"{folder.name}.{name}") for name in ("modeling_navit_siglip", "resampler"))


def build(tower: types.ModuleType, resampler: types.ModuleType) -> torch.nn.Module:
    vision = tower.SiglipVisionConfig(**CONFIG["vision_config"])
    vision._attn_implementation = "eager"
    text = transformers.Qwen3Config(**{k: v for k, v in CONFIG.items() if k not in ("vision_config", "slice_config", "model_type")})
    text._attn_implementation = "eager"

    model = torch.nn.Module()
    model.llm = transformers.Qwen3ForCausalLM(text)
    model.vpm = tower.SiglipVisionTransformer(vision)
    model.resampler = resampler.Resampler(
        num_queries=CONFIG["query_num"], embed_dim=CONFIG["hidden_size"], num_heads=1, kv_dim=vision.hidden_size, adaptive=True
    )
    generator = torch.Generator().manual_seed(45)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = "norm" in name or ".ln_" in name
            p.copy_(1 + 0.1 * noise if norm and name.endswith("weight") else noise * (0.1 if p.dim() < 2 else p.shape[-1] ** -0.5))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, required=True)
    code = parser.parse_args().code.resolve()
    torch.set_num_threads(1)
    model = build(*remote_code(code))

    (OUT / "model").mkdir(parents=True, exist_ok=True)
    for name in ("preprocessor_config.json", "tokenizer.json", "generation_config.json"):
        shutil.copyfile(MEDIA / "model" / name, OUT / "model" / name)
    tokenizer = json.loads((MEDIA / "model" / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = TEMPLATE
    (OUT / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    (OUT / "model" / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, OUT / "model" / "model.safetensors")

    # The reference of 2.6 has ids and pixels of the same processor settings.
    reference = FIXTURES.parents[2] / "shared" / "reference" / "minicpm_v_2_6" / "expected"
    names = {}
    out = {}
    for name in ("small", "wide", "two", "text"):
        with safe_open(reference / f"{name}.safetensors", "pt") as f:
            ids, labels, bound = f.get_tensor("input_ids"), f.get_tensor("labels"), f.get_tensor("image_bound")
            sizes = f.get_tensor("tgt_sizes") if "tgt_sizes" in f.keys() else torch.zeros(0, 2)
            pixels = [f.get_tensor(f"pixel_values.{i}") for i in range(len(sizes))]
        with torch.no_grad():
            embeds = model.llm.model.embed_tokens(ids)[None].clone()
            if pixels:
                flat = [p.flatten(end_dim=1).permute(1, 0) for p in pixels]
                padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
                count, length, _ = padded.shape
                padded = padded.permute(0, 2, 1).reshape(count, 3, -1, length)
                mask = torch.zeros(count, 1, length // CONFIG["vision_config"]["patch_size"], dtype=torch.bool)
                for i, (h, w) in enumerate(sizes):
                    mask[i, 0, : h * w] = True
                sizes = sizes.to(torch.int32)
                seen = model.vpm(padded, patch_attention_mask=mask, tgt_sizes=sizes).last_hidden_state
                features = model.resampler(seen, sizes)
                places = torch.cat([torch.arange(a, b) for a, b in bound.tolist()])
                embeds[0, places] = features.flatten(0, 1)
            logits = model.llm(inputs_embeds=embeds).logits[0]
        kept = labels[1:] != -100
        out[name] = logits[:-1][kept].contiguous()
        loss = torch.nn.functional.cross_entropy(out[name], labels[1:][kept])
        names[name] = {"ids": ids.tolist(), "labels": labels.tolist(), "loss": loss.item()}
    save_file(out, OUT / "logits.safetensors")
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in names.items())
    (OUT / "expected.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
