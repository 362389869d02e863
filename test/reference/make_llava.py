"""Makes test/fixtures/llava: a tiny random LLaVA-1.5 and what transformers 5.17 and PEFT 0.21 compute with it.

Run: python3 -m venv v && v/bin/pip install torch==2.13.0 transformers==5.17.0 peft==0.21.0 pillow && v/bin/python test/reference/make_llava.py
The rules for labels and templates that cases.json follows are in test/fixtures/llava/README.md.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.optimization import get_scheduler

OUT = Path(__file__).resolve().parents[1] / "fixtures" / "llava"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
IMAGE_SIZE, PATCH = 56, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
torch.set_num_threads(2)

# The chat template of llava-hf/llava-1.5-7b-hf, written from its description: images of a message first, then its texts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CORPUS = """
USER: What is in the picture? ASSISTANT: A red circle and two blue squares. USER: Where is it? ASSISTANT: On the left.
A chat between a curious user and an assistant. You are a helpful assistant. Describe the image in detail, please.
How many shapes are there? There are three green triangles at the top. What colour is the cat? The cat is blue and grey.
这只猫是什么颜色? 这只猫是蓝色的,属于英短蓝猫。 图片里有什么? 图片里有一个红色的圆形和两个蓝色的正方形。 它在左边还是右边? 它在右边。
The quick brown fox jumps over the lazy dog. Tell me a story about the sea. Once upon a time there was a little bird.
""" * 3


def make_tokenizer() -> Tokenizer:
    """SentencePiece-style BPE with byte fallback, as Llama's tokenizer.json is built."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    # Llama has no pre-tokenizer; for training only, words keep merges short.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS.strip().split("\n"), trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False))
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.pre_tokenizer = None
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    # Bytes are ordinary vocabulary, not special tokens.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True, normalized=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def build_model(vocab: int, image_token: int, kv_heads: int) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=IMAGE_TOKENS, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif "embed_tokens" in name or "embedding" in name:
                p.copy_(0.7 * noise)
            elif "lm_head" in name:
                p.copy_(0.4 * noise)
            else:
                p.copy_(noise * (1.4 / math.sqrt(p[0].numel())))
    return model


def old_key(key: str) -> str:
    """The spelling of hub files (transformers 4.x)."""
    key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
    key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
    key = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", key)
    return re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", key)


def new_key(key: str) -> str:
    """What 4.52 to 5.5 write."""
    return re.sub(r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model.", key)


def model_files(folder: Path, tokenizer: Tokenizer, config: dict) -> None:
    pad = config["pad_token_id"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "image_token": "<image>", "legacy": False, "model_max_length": 512, "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False,
    })
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(folder / "preprocessor_config.json", {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_processor_type": "CLIPImageProcessor", "image_std": STD,
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": IMAGE_SIZE},
    })
    write_json(folder / "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH, "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    })
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad})


def sparse_config(vocab: int, image_token: int, pad: int, kv_heads: int) -> dict:
    """As sparse as the hub's: what equals a class default is left out."""
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "torch_dtype": "float32", "vocab_size": vocab}
    if kv_heads != 4:
        text["num_key_value_heads"] = kv_heads
    return {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": image_token, "model_type": "llava",
        "pad_token_id": pad, "projector_hidden_act": "gelu", "text_config": text, "tie_word_embeddings": False, "torch_dtype": "float32",
        "vision_config": {"hidden_size": 64, "image_size": IMAGE_SIZE, "intermediate_size": 128, "model_type": "clip_vision_model",
                          "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": PATCH, "projection_dim": 64, "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }


# ---------------------------------------------------------------- pictures


def make_images(folder: Path) -> list[str]:
    """Pictures of odd sizes and kinds; smooth content with edges, so that resizing matters."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)

    def picture(w: int, h: int) -> np.ndarray:
        y, x = np.mgrid[0:h, 0:w]
        base = np.stack([128 + 100 * np.sin(x / 7 + y / 11), 128 + 100 * np.cos(x / 13 - y / 5), (x * 3 + y * 5) % 256], -1)
        base[h // 3 : h // 2 + 1, w // 4 : w // 2 + 1] = rng.integers(0, 256, 3)
        return np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)

    Image.fromarray(picture(90, 61)).save(folder / "landscape.png")
    Image.fromarray(picture(47, 83)).save(folder / "portrait.png")
    Image.fromarray(picture(56, 56)).save(folder / "exact.png")
    Image.fromarray(picture(200, 130)).save(folder / "large.jpg", quality=85)
    Image.fromarray(picture(40, 1)).save(folder / "strip.png")
    Image.fromarray(picture(20, 33)).save(folder / "small.png")
    Image.fromarray(picture(64, 70)[..., 0]).save(folder / "grey.png")
    rgba = np.dstack([picture(60, 60), np.tile(np.arange(60, dtype=np.uint8) * 4, (60, 1))])
    Image.fromarray(rgba, "RGBA").save(folder / "alpha.png")
    Image.fromarray(picture(70, 58)).convert("P", palette=Image.ADAPTIVE).save(folder / "palette.png")
    Image.fromarray((picture(58, 66)[..., 1].astype(np.uint16) * 257)).save(folder / "grey16.png")
    Image.fromarray(picture(72, 60)).convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(80, 50)).save(folder / "exif6.jpg", quality=90, exif=exif)
    Image.fromarray(picture(61, 59)).save(folder / "picture.webp", lossless=True)
    return sorted(p.name for p in folder.iterdir())


def plan(w: int, h: int):
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = IMAGE_SIZE, int(IMAGE_SIZE * long / short)
    return (new_short, new_long) if w <= h else (new_long, new_short)  # (width, height)


def pixels_torchvision(image: Image.Image) -> torch.Tensor:
    """transformers 5's torchvision backend: bicubic with antialiasing on uint8, centre crop, fused normalisation in float32."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    nw, nh = plan(image.width, image.height)
    x = F.interpolate(x[None], size=[nh, nw], mode="bicubic", align_corners=False, antialias=True)[0] if (nw, nh) != image.size else x
    top, left = int((nh - IMAGE_SIZE) / 2.0), int((nw - IMAGE_SIZE) / 2.0)
    x = x[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].float()
    mean = torch.tensor(MEAN) * (1.0 / 0.00392156862745098)
    std = torch.tensor(STD) * (1.0 / 0.00392156862745098)
    return (x - mean[:, None, None]) / std[:, None, None]


# ---------------------------------------------------------------- rows → ids and labels (independent of martlet's TypeScript)


def default_segments(messages: list[dict]) -> list[tuple[str, bool]]:
    """The hub template rendered by hand: [(text, trained)]; the answer keeps no space before it, its end token follows."""
    segments: list[tuple[str, bool]] = []
    prompt = ""
    for message in messages:
        images = message["content"].count("<image>")
        text = message["content"]
        if images:
            text = re.sub(r"<image>\n|\n<image>|<image>", "", text)
        if message["role"] == "system":
            prompt += "".join("<image>\n" for _ in range(images)) + text + " "
        elif message["role"] == "user":
            prompt += "USER: " + "<image>\n" * images + text + " "
        else:
            prompt += "ASSISTANT:"
            segments.append((prompt, False))
            segments.append((text, True))
            prompt = ""
    if prompt:
        segments.append((prompt + "ASSISTANT:", False))
    return segments


def swift_segments(messages: list[dict]) -> list[tuple[str, bool]]:
    """ms-swift's llava1_5_hf: prefix <s>, `USER: {q}\nASSISTANT:`, image `<image>\n`."""
    segments: list[tuple[str, bool]] = []
    prompt = ""
    for message in messages:
        text = message["content"].replace("<image>", "<image>\n")
        if message["role"] == "system":
            prompt += text + "\n"
        elif message["role"] == "user":
            prompt += f"USER: {text}\nASSISTANT:"
        else:
            segments.append((prompt, False))
            segments.append((text, True))
            prompt = ""
    if prompt:
        segments.append((prompt, False))
    return segments


def encode(tokenizer: Tokenizer, segments: list[tuple[str, bool]], image_token: int) -> tuple[list[int], list[int]]:
    ids, labels = [1], [-100]
    for text, trained in segments:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        if trained:
            piece = piece + [2]
        for token in piece:
            repeat = IMAGE_TOKENS if token == image_token else 1
            ids += [token] * repeat
            labels += [token if trained and token != image_token else -100] * repeat
    return ids, labels


ROWS = [
    {"name": "single", "images": ["landscape.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is in the picture?"}, {"role": "assistant", "content": "A red circle and two blue squares."}]},
    {"name": "multi-turn", "images": ["portrait.png"], "messages": [
        {"role": "user", "content": "<image>\nHow many shapes are there?"}, {"role": "assistant", "content": "There are three."},
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the left."}]},
    {"name": "system", "images": ["exact.png"], "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>\nDescribe the image in detail, please."}, {"role": "assistant", "content": "The cat is blue and grey."}]},
    {"name": "two-images", "images": ["large.jpg", "small.png"], "messages": [
        {"role": "user", "content": "<image>\n<image>\nWhat is in the picture?"}, {"role": "assistant", "content": "A red circle."}]},
    {"name": "text-only", "images": [], "messages": [
        {"role": "user", "content": "Tell me a story about the sea."}, {"role": "assistant", "content": "Once upon a time there was a little bird."}]},
    {"name": "chinese", "images": ["grey.png"], "messages": [
        {"role": "user", "content": "<image>\n这只猫是什么颜色?"}, {"role": "assistant", "content": "这只猫是蓝色的,属于英短蓝猫。"}]},
    {"name": "emoji", "images": ["strip.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is 🐱 doing — 龘?"}, {"role": "assistant", "content": "🐦 sings ♫ žluťoučký."}]},
    {"name": "image-last", "images": ["exact.png"], "messages": [
        {"role": "user", "content": "What colour is the cat?\n<image>"}, {"role": "assistant", "content": "The cat is blue."}]},
    {"name": "spaces", "images": [], "messages": [
        {"role": "user", "content": "  two  spaces\nand a line "}, {"role": "assistant", "content": " leading space, trailing newline\n"}]},
]


def main() -> None:
    for name in ("model-4x", "model-5x", "model-gqa", "model-bf16", "adapter-peft", "adapter-old", "images"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    image_token, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
    vocab = (tokenizer.get_vocab_size() + 15) // 16 * 16
    print("vocab", tokenizer.get_vocab_size(), "padded to", vocab, "image", image_token, "pad", pad)
    model = build_model(vocab, image_token, 4)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}

    # Hub spelling, two shards with an index; 5.x spelling, one file.
    hub = {old_key(k): v for k, v in state.items()}
    keys = sorted(hub)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    model_files(OUT / "model-4x", tokenizer, sparse_config(vocab, image_token, pad, 4))
    for i, shard in enumerate(shards):
        save_file({k: hub[k] for k in shard}, OUT / "model-4x" / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    write_json(OUT / "model-4x" / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(v.numel() * 4 for v in hub.values())},
        "weight_map": {k: f"model-0000{i + 1}-of-00002.safetensors" for i, shard in enumerate(shards) for k in shard}})
    model_files(OUT / "model-5x", tokenizer, sparse_config(vocab, image_token, pad, 4))
    save_file({new_key(k): v.to(torch.bfloat16) for k, v in state.items()}, OUT / "model-5x" / "model.safetensors", {"format": "pt"})
    gqa = build_model(vocab, image_token, 2)
    model_files(OUT / "model-gqa", tokenizer, sparse_config(vocab, image_token, pad, 2))
    # transformers ≥ 5.6 has no `vision_model` in the live path.
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in gqa.state_dict().items()}, OUT / "model-gqa" / "model.safetensors", {"format": "pt"})

    names = make_images(OUT / "images")
    pixels = {n: pixels_torchvision(Image.open(OUT / "images" / n)) for n in
              ("landscape.png", "portrait.png", "exact.png", "strip.png", "small.png", "grey.png", "palette.png", "picture.webp", "large.jpg")}
    pixels["alpha.png"] = pixels_torchvision(Image.open(OUT / "images" / "alpha.png"))
    save_file({k: v.contiguous() for k, v in pixels.items()}, OUT / "pixels.safetensors")

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    cases = []
    for row in ROWS:
        case = dict(row)
        for template, segments in (("default", default_segments), ("ms-swift", swift_segments)):
            ids, labels = encode(tokenizer, segments(row["messages"]), image_token)
            prompt = row["messages"][:-1]
            prompt_ids, _ = encode(tokenizer, segments(prompt), image_token)
            case[template] = {"inputIds": ids, "labels": labels, "promptIds": prompt_ids}
        # The prompt part of a single turn equals what the checkpoint's own template gives.
        parts = [{"role": m["role"], "content": [{"type": "image"}] * m["content"].count("<image>") +
                  [{"type": "text", "text": re.sub(r"<image>\n|\n<image>|<image>", "", m["content"])}]} for m in row["messages"][:1 if row["name"] not in ("system",) else 2]]
        text = fast.apply_chat_template(parts, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
        if row["name"] not in ("multi-turn",):
            expanded = [t for i in fast.encode(text) for t in [i] * (IMAGE_TOKENS if i == image_token else 1)]
            assert expanded == case["default"]["promptIds"], (row["name"], text)
        cases.append(case)
    write_json(OUT / "cases.json", {"imageToken": image_token, "imageTokens": IMAGE_TOKENS, "cases": cases})

    by_name = {c["name"]: c for c in cases}

    def inputs(case, template="default", key="inputIds"):
        ids = torch.tensor([case[template][key]])
        pix = torch.stack([pixels[i] for i in case["images"]]) if case["images"] else None
        return ids, pix

    out: dict[str, torch.Tensor] = {}

    def forward(m, case, **kw):
        ids, pix = inputs(case)
        return m(input_ids=ids, pixel_values=pix, **kw).logits[0]

    def losses(m, rows):
        """Sum over labelled tokens and their count."""
        total, count = torch.zeros(()), 0
        for case in rows:
            logits = forward(m, case)[:-1].float()
            labels = torch.tensor(case["default"]["labels"])[1:]
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        return total, count

    with torch.no_grad():
        for name in ("single", "multi-turn", "two-images", "text-only", "chinese"):
            out[f"logits.{name}"] = forward(model, by_name[name])
        features = model.get_image_features(pixel_values=pixels["landscape.png"][None])
        features = features.pooler_output if hasattr(features, "pooler_output") else features
        out["features.landscape"] = (features[0] if isinstance(features, (list, tuple)) else features).reshape(-1, 64).contiguous()
        # Weights rounded to bfloat16, arithmetic in float32 (a model-wide cast would round the rotary frequencies too).
        for p in gqa.parameters():
            p.copy_(p.to(torch.bfloat16).float())
        out["logits.gqa.single"] = forward(gqa, by_name["single"])
    results: dict = {"losses": {}}
    with torch.no_grad():
        for name in by_name:
            if all(i in pixels for i in by_name[name]["images"]):
                total, count = losses(model, [by_name[name]])
                results["losses"][name] = {"loss": float(total / count), "labelled": count}

    def greedy(m, case, n=24):
        ids, pix = inputs(case, key="promptIds")
        done = []
        for _ in range(n):
            logits = m(input_ids=ids, pixel_values=pix).logits[0, -1]
            token = int(logits.argmax())
            if token == 2:
                break
            done.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        return done

    with torch.no_grad():
        results["greedy"] = {n: greedy(model, by_name[n]) for n in ("single", "two-images", "text-only", "chinese")}

    # ------------------------------------------------------------ LoRA
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
                        task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
            elif "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1]))
    peft.save_pretrained(OUT / "adapter-peft")
    (OUT / "adapter-peft" / "README.md").unlink(missing_ok=True)
    stored = load_file(OUT / "adapter-peft" / "adapter_model.safetensors")
    (OUT / "adapter-old").mkdir()
    shutil.copy(OUT / "adapter-peft" / "adapter_config.json", OUT / "adapter-old")
    save_file({k.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): v for k, v in stored.items()},
              OUT / "adapter-old" / "adapter_model.safetensors", {"format": "pt"})
    peft.eval()
    with torch.no_grad():
        for name in ("single", "two-images", "text-only"):
            out[f"adapter.logits.{name}"] = forward(peft, by_name[name])
        results["adapterGreedy"] = {n: greedy(peft, by_name[n]) for n in ("single", "text-only", "chinese")}

    batch = ["single", "multi-turn", "text-only"]
    total, count = losses(peft, [by_name[n] for n in batch])
    loss = total / count
    loss.backward()
    results["loraGradients"] = {"rows": batch, "loss": float(loss)}
    short = lambda name: name.replace("base_model.model.", "").replace(".default", "")
    for name, p in peft.named_parameters():
        if p.requires_grad:
            out["grad." + short(name)] = p.grad.clone()
            p.grad = None

    # 20 steps: micro-batches of two rows, accumulation 2.
    order = ["single", "multi-turn", "text-only", "chinese", "system", "image-last", "two-images", "emoji"]
    steps, warmup = 20, 3
    params = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    curve = []
    for step in range(steps):
        rows = [order[(step * 4 + i) % len(order)] for i in range(4)]
        micros = [rows[:2], rows[2:]]
        count = sum(sum(l != -100 for l in by_name[n]["default"]["labels"][1:]) for n in rows)
        value = 0.0
        for micro in micros:
            total, _ = losses(peft, [by_name[n] for n in micro])
            (total / count).backward()
            value += float(total / count)
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        curve.append({"rows": rows, "loss": value, "gradNorm": norm, "learningRate": lr})
    results["loraCurve"] = {"warmupSteps": warmup, "totalSteps": steps, "learningRate": 1e-3, "weightDecay": 0.1, "maxGradNorm": 1.0, "steps": curve}
    for name, p in peft.named_parameters():
        if p.requires_grad and ("layers.0.self_attn.q_proj" in name or "layers.2.mlp.down_proj" in name):
            out["final." + short(name)] = p.detach().clone()

    # ------------------------------------------------------------ merge, from the stored adapter
    fresh = build_model(vocab, image_token, 4)
    loaded = PeftModel.from_pretrained(fresh, str(OUT / "adapter-peft"))
    merged = loaded.merge_and_unload()
    for k, v in merged.state_dict().items():
        if "layers.1.self_attn.v_proj" in k or "layers.0.mlp.gate_proj" in k:
            out["merged." + k] = v.clone()
    with torch.no_grad():
        out["merged.logits.single"] = forward(merged, by_name["single"])
    base16 = {k: v.to(torch.bfloat16) for k, v in state.items()}
    for module in ("model.language_model.layers.1.self_attn.v_proj", "model.language_model.layers.0.mlp.gate_proj"):
        a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        out[f"merged16.{module}.weight"] = (base16[module + ".weight"].float() + (8 / 4) * (b @ a)).to(torch.bfloat16)

    # ------------------------------------------------------------ full training
    full = build_model(vocab, image_token, 4)
    total, count = losses(full, [by_name[n] for n in batch])
    (total / count).backward()
    results["fullGradients"] = {"rows": batch, "loss": float(total / count), "norms": {}}
    for name, p in full.named_parameters():
        if p.grad is None:
            continue
        results["fullGradients"]["norms"][name] = float(p.grad.norm())
        if name.endswith(("multi_modal_projector.linear_1.bias", "encoder.layers.0.self_attn.q_proj.weight", "patch_embedding.weight",
                          "class_embedding", "layers.1.mlp.up_proj.weight", "language_model.norm.weight")):
            out["full." + name] = p.grad.clone()
    full.zero_grad()
    decay = [p for n, p in full.named_parameters() if not (n.endswith("bias") or "norm" in n.rsplit(".", 2)[-2])]
    rest = [p for n, p in full.named_parameters() if n.endswith("bias") or "norm" in n.rsplit(".", 2)[-2]]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for step in range(5):
        total, count = losses(full, [by_name[n] for n in batch])
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(full.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": float(total / count), "gradNorm": norm})
    results["fullCurve"] = {"rows": batch, "learningRate": 1e-4, "weightDecay": 0.1, "steps": curve}

    save_file({k: v.contiguous() for k, v in out.items()}, OUT / "expected.safetensors")
    write_json(OUT / "expected.json", results)
    size = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{size / 1e6:.2f} MB;", "losses", [round(s["loss"], 4) for s in results["loraCurve"]["steps"]][:20], results["greedy"])


if __name__ == "__main__":
    sys.exit(main())
