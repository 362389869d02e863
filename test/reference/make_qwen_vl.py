"""Makes test/fixtures/{qwen_vl/images,qwen2_vl,qwen2_5_vl,qwen3_vl}: tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, and what
transformers 5.17 and PEFT 0.21 compute with them.

Run: python3 -m venv v && v/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.17.0 peft==0.21.0 pillow
     v/bin/python test/reference/make_qwen_vl.py [family ...]
The rules for labels and templates that cases.json follows are in test/fixtures/qwen_vl/README.md.
"""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torch.nn.functional as F

try:
    import torchvision
except RuntimeError:
    # PyPI's wheel has kernels for CUDA, which the CPU build of torch cannot load. Only its resize is used here, which calls torch's own operator;
    # the two operators that its import wants registered get a schema and no kernel.
    for _name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[_name]
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
IMAGES = FIXTURES / "qwen_vl" / "images"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCH, MERGE, TEMPORAL = 4, 2, 2
MIN_PIXELS, MAX_PIXELS = 4 * 64, 32 * 64  # 4 to 32 merged tokens of 8 × 8 pixels
ROPE_THETA = 100.0  # small, so that every rotary dimension matters within a short row
torch.set_num_threads(2)
transformers.logging.set_verbosity_error()

CORPUS = """
user What is in the picture? assistant A red circle and two blue squares. user Where is it? On the left. system You are a helpful assistant.
Describe the image in detail, please. How many shapes are there? There are three green triangles at the top. The cat is blue and grey.
这只猫是什么颜色? 这只猫是蓝色的,属于英短蓝猫。 图片里有什么? 图片里有一个红色的圆形和两个蓝色的正方形。 它在左边还是右边? 它在右边。
Tell me a story about the sea. Once upon a time there was a little bird. 🐱🐦 The video shows a square that moves. <0.2 seconds> <1.2 seconds>
""" * 3

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
                  "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# In Qwen3's tokenizer these are added tokens that are not special: decoding keeps them.
QWEN3_ADDED_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# The chat templates of the hub's checkpoints, written from their description.
QWEN2_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CHAT_TEMPLATE = """\
{%- macro plain(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- plain(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + plain(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif part.type == 'video' or 'video' in part %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in part %}
                    {{- part.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + plain(message.content) + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# ---------------------------------------------------------------- the three families


@dataclass(frozen=True)
class Family:
    name: str  # folder and model_type
    class_prefix: str
    text: dict
    vision: dict
    vision_4x: dict  # as the hub's config.json has it
    main_tied: bool  # model-4x; model-5x is the other
    default_system: str | None
    bbox: str  # ms-swift's norm_bbox
    image_mean: list = field(default_factory=lambda: CLIP_MEAN)
    image_std: list = field(default_factory=lambda: CLIP_STD)
    vision_lora: str = ""  # the part of the target regex below `visual.`
    full_gradients: tuple = ()  # parameters whose whole gradient is kept

    def make(self, kind: str):
        return getattr(transformers, self.class_prefix + kind)


TEXT = dict(hidden_size=64, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rms_norm_eps=1e-6)
SHARED_GRADIENTS = ("visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.blocks.3.norm1.weight",
                    "language_model.layers.1.mlp.up_proj.weight", "language_model.layers.0.self_attn.k_proj.weight", "language_model.norm.weight")
FAMILIES = {f.name: f for f in (
    Family(
        "qwen2_vl", "Qwen2VL",
        text=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 3, 3]}},
        vision=dict(depth=4, embed_dim=24, hidden_size=64, num_heads=2, patch_size=PATCH),
        vision_4x=dict(depth=4, embed_dim=24, hidden_size=64, in_chans=3, num_heads=2, patch_size=PATCH, spatial_patch_size=PATCH),
        main_tied=True, default_system="You are a helpful assistant.", bbox="norm1000",
        vision_lora=r"(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))|merger\.mlp\.(0|2))",
        full_gradients=SHARED_GRADIENTS + ("visual.blocks.2.attn.qkv.bias", "visual.blocks.1.mlp.fc1.bias", "visual.merger.ln_q.weight",
                                           "visual.merger.mlp.0.bias", "language_model.layers.2.self_attn.q_proj.bias"),
    ),
    Family(
        "qwen2_5_vl", "Qwen2_5_VL",
        text=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 3, 3]}},
        vision=dict(depth=4, hidden_size=24, intermediate_size=44, num_heads=2, out_hidden_size=64, patch_size=PATCH, window_size=4 * PATCH * MERGE,
                    fullatt_block_indexes=[1, 3], tokens_per_second=2),
        vision_4x=dict(depth=4, hidden_act="silu", hidden_size=24, intermediate_size=44, num_heads=2, in_chans=3, out_hidden_size=64, patch_size=PATCH,
                       spatial_merge_size=MERGE, spatial_patch_size=PATCH, window_size=4 * PATCH * MERGE, fullatt_block_indexes=[1, 3],
                       tokens_per_second=2, temporal_patch_size=TEMPORAL),
        main_tied=False, default_system="You are a helpful assistant.", bbox="none",
        vision_lora=r"(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))|merger\.mlp\.(0|2))",
        full_gradients=SHARED_GRADIENTS + ("visual.blocks.2.attn.qkv.bias", "visual.blocks.1.mlp.gate_proj.bias", "visual.merger.ln_q.weight",
                                           "visual.merger.mlp.0.bias"),
    ),
    Family(
        "qwen3_vl", "Qwen3VL",
        text=TEXT | {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [6, 3, 3],
                                                         "mrope_interleaved": True}},
        vision=dict(depth=4, hidden_size=24, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=PATCH, num_position_embeddings=36,
                    deepstack_visual_indexes=[0, 2]),
        vision_4x=dict(deepstack_visual_indexes=[0, 2], depth=4, hidden_act="gelu_pytorch_tanh", hidden_size=24, in_channels=3, initializer_range=0.02,
                       intermediate_size=48, model_type="qwen3_vl", num_heads=2, num_position_embeddings=36, out_hidden_size=64, patch_size=PATCH,
                       spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL),
        main_tied=True, default_system=None, bbox="norm1000", image_mean=[0.5] * 3, image_std=[0.5] * 3,
        vision_lora=r"(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])|(merger|deepstack_merger_list\.\d+)\.linear_fc[12])",
        full_gradients=SHARED_GRADIENTS + ("visual.patch_embed.proj.bias", "visual.pos_embed.weight", "visual.deepstack_merger_list.1.norm.weight",
                                           "visual.merger.norm.weight", "visual.merger.linear_fc1.bias", "language_model.layers.1.self_attn.q_norm.weight"),
    ),
)}


def make_tokenizer(family: Family) -> Tokenizer:
    """Byte-level BPE as in Qwen's tokenizer.json; the special tokens come after the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False, ignore_merges=False))
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(CORPUS.strip().split("\n"), trainers.BpeTrainer(
        vocab_size=352, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    if family.name == "qwen3_vl":
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in QWEN3_ADDED_TOKENS])
    return tokenizer


def write_json(path: Path, value) -> None:
    """Lists of numbers stay on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r"\[\s*(-?\d[^\[\]\"{}]*?)\s*\]", lambda m: "[" + re.sub(r"\s+", "", m[1]) + "]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf8")


def build_model(family: Family, vocab: int, tokenizer: Tokenizer, tied: bool):
    """All weights are exact in bfloat16, so that files of either width hold the same model."""
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL_TOKENS}
    text = family.text | {"vocab_size": vocab, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
                          "pad_token_id": ids["<|endoftext|>"], "rope_parameters": dict(family.text["rope_parameters"])}
    config = family.make("Config")(
        text_config=text, vision_config=dict(family.vision), image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = family.make("ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # One generator a parameter: the tied and the untied model share all they both have.
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(11 + sum(map(ord, name))))
            if p.ndim == 1 and name.endswith("weight"):
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.1 * noise
            elif "embed" in name and p.ndim == 2 or "lm_head" in name:
                value = (0.4 if "lm_head" in name else 0.3) * noise
                if len(p) == vocab:  # these never win, so that decoding goes on for a while and stays text
                    value[[ids[t] for t in ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>")]] *= 0.3
            else:
                value = noise * (1.4 / math.sqrt(p[0].numel()))
            p.copy_(value.to(torch.bfloat16).float())
    return model


def old_key(family: Family, key: str) -> str:
    """The spelling of hub files; Qwen3-VL has only one."""
    if family.name == "qwen3_vl":
        return key
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", key))


def config_4x(family: Family, model, tokenizer: Tokenizer) -> dict:
    """As transformers 4.x wrote it: flat for Qwen2-VL and Qwen2.5-VL."""
    config, text = model.config, family.text
    rope = text["rope_parameters"]
    shared = {
        "attention_dropout": 0.0, "bos_token_id": tokenizer.token_to_id("<|endoftext|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu", "hidden_size": text["hidden_size"], "initializer_range": 0.02, "intermediate_size": text["intermediate_size"],
        "max_position_embeddings": text["max_position_embeddings"], "num_attention_heads": text["num_attention_heads"],
        "num_hidden_layers": text["num_hidden_layers"], "num_key_value_heads": text["num_key_value_heads"], "rms_norm_eps": text["rms_norm_eps"],
        "rope_theta": rope["rope_theta"], "use_cache": True, "vocab_size": config.text_config.vocab_size,
    }
    outer = {
        "architectures": [type(model).__name__], "model_type": family.name, "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id, "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id, "tie_word_embeddings": family.main_tied, "vision_config": family.vision_4x,
    }
    if family.name == "qwen3_vl":
        return outer | {"transformers_version": "4.57.0", "text_config": shared | {
            "attention_bias": False, "dtype": "bfloat16", "head_dim": text["head_dim"], "model_type": "qwen3_vl_text", "tie_word_embeddings": family.main_tied,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"}}}
    return outer | shared | {
        "max_window_layers": text["num_hidden_layers"], "sliding_window": 512, "use_sliding_window": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}


def files_4x(family: Family, folder: Path, model, tokenizer: Tokenizer) -> None:
    """Every file as the hub has it (merges as strings, the template in a JSON file)."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_4x(family, model, tokenizer))
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf8")
    template = QWEN3_CHAT_TEMPLATE if family.name == "qwen3_vl" else QWEN2_CHAT_TEMPLATE
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL_TOKENS}
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS[1:], "chat_template": template, "clean_up_tokenization_spaces": False, "errors": "replace",
        "model_max_length": 512, "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
                                 for t in state["added_tokens"]}})
    write_json(folder / "chat_template.json", {"chat_template": template})
    pixels = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE, "image_mean": family.image_mean, "image_std": family.image_std,
              "processor_class": family.class_prefix + "Processor"}
    if family.name == "qwen3_vl":
        write_json(folder / "preprocessor_config.json", {
            "size": {"longest_edge": MAX_PIXELS, "shortest_edge": MIN_PIXELS}, **pixels, "image_processor_type": "Qwen2VLImageProcessorFast"})
        write_json(folder / "video_preprocessor_config.json", {
            "size": {"longest_edge": 4 * MAX_PIXELS, "shortest_edge": 4 * MIN_PIXELS}, **pixels, "video_processor_type": "Qwen3VLVideoProcessor"})
    else:
        write_json(folder / "preprocessor_config.json", {
            "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, **pixels, "image_processor_type": "Qwen2VLImageProcessor"})
    write_json(folder / "generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1})


def files_5x(folder: Path, model, processor) -> None:
    """Every file as transformers 5.17 writes it: processor_config.json holds both processors, the template is a .jinja file."""
    folder.mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.config.dtype = None
    processor.save_pretrained(folder)
    shutil.copy(folder.parent / "model-4x" / "generation_config.json", folder)


# ---------------------------------------------------------------- pictures


def make_images(folder: Path) -> None:
    """Smooth content with edges, so that resizing matters. Sizes: README.md."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)

    def picture(w: int, h: int, shift: int = 0) -> Image.Image:
        y, x = np.mgrid[0:h, 0:w]
        base = np.stack([128 + 100 * np.sin(x / 7 + y / 11), 128 + 100 * np.cos(x / 13 - y / 5), (x * 3 + y * 5) % 256], -1)
        base[h // 3 : h // 2 + 1, w // 4 + shift : w // 2 + 1 + shift] = rng.integers(0, 256, 3)
        return Image.fromarray(np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8))

    for name, w, h in (("landscape", 61, 37), ("portrait", 23, 46), ("square", 32, 32), ("wide", 64, 32), ("tiny", 4, 12), ("half", 20, 28),
                       ("strip", 1, 150), ("extreme", 180, 3), ("odd", 43, 38)):
        picture(w, h).save(folder / f"{name}.png")
    picture(200, 130).save(folder / "large.jpg", quality=85)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(50, 30).save(folder / "exif6.jpg", quality=90, exif=exif)
    for i in range(4):
        picture(26, 17, 2 * i).save(folder / f"frame{i}.png")


def load_picture(name: str) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(IMAGES / name)).convert("RGB")


# ---------------------------------------------------------------- rows → ids and labels (independent of martlet's TypeScript)

FRAMES = [f"frame{i}.png" for i in range(4)]
ROWS = [
    {"name": "single", "images": ["landscape.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is in the picture?"}, {"role": "assistant", "content": "A red circle and two blue squares."}]},
    {"name": "multi-turn", "images": ["portrait.png"], "messages": [
        {"role": "user", "content": "<image>\nHow many shapes are there?"}, {"role": "assistant", "content": "There are three."},
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the left."}]},
    {"name": "system", "images": ["square.png"], "messages": [
        {"role": "system", "content": "You see pictures."},
        {"role": "user", "content": "<image>Describe the image in detail, please."}, {"role": "assistant", "content": "The cat is blue and grey."}]},
    {"name": "empty-system", "images": [], "messages": [
        {"role": "system", "content": ""}, {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "It is there."}]},
    {"name": "two-images", "images": ["half.png", "odd.png"], "messages": [
        {"role": "user", "content": "<image><image>What is in the picture?"}, {"role": "assistant", "content": "A red circle."}]},
    {"name": "text-only", "images": [], "messages": [
        {"role": "user", "content": "Tell me a story about the sea."}, {"role": "assistant", "content": "Once upon a time there was a bird."}]},
    {"name": "chinese", "images": ["tiny.png"], "messages": [
        {"role": "user", "content": "<image>\n这只猫是什么颜色?"}, {"role": "assistant", "content": "这只猫是蓝色的,属于英短蓝猫。"}]},
    {"name": "emoji", "images": ["strip.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is 🐱 doing — 龘?"}, {"role": "assistant", "content": "🐦 sings ♫ žluťoučký."}]},
    {"name": "image-second-turn", "images": ["extreme.png"], "messages": [
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the left."},
        {"role": "user", "content": "What colour is the cat?\n<image>"}, {"role": "assistant", "content": "The cat is blue."}]},
    {"name": "inline", "images": ["tiny.png", "square.png"], "messages": [
        {"role": "user", "content": "Is <image> like <image>?"}, {"role": "assistant", "content": "No."}]},
    {"name": "parts", "images": ["wide.png"], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look at it: "}, {"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red "}, {"type": "text", "text": "circle."}]}]},
    {"name": "spaces", "images": [], "messages": [
        {"role": "user", "content": "  two  spaces\nand a line "}, {"role": "assistant", "content": " leading space, trailing newline\n"}]},
    {"name": "jpeg", "images": ["large.jpg", "exif6.jpg"], "messages": [
        {"role": "user", "content": "<image>\n<image>\nWhich is red?"}, {"role": "assistant", "content": "The second."}]},
    {"name": "video", "images": [], "videos": [FRAMES], "messages": [
        {"role": "user", "content": "<video>\nWhat is in the picture?"}, {"role": "assistant", "content": "A square that moves."}]},
    {"name": "video-slow", "images": [], "videos": [FRAMES[:3]], "videoFps": [1], "messages": [
        {"role": "user", "content": "Look at <video> it."}, {"role": "assistant", "content": "It moves."}]},
    {"name": "image-video", "images": ["tiny.png"], "videos": [FRAMES], "messages": [
        {"role": "user", "content": "<video><image>\nIs it there?"}, {"role": "assistant", "content": "Yes."}]},
    {"name": "grounding", "images": ["landscape.png"],
     "objects": {"ref": ["red circle", "cat"], "bbox": [[45.5, 30, 10.2, 3], [0, 0, 60.5, 37]]}, "messages": [
        {"role": "user", "content": "<image>\nFind the <ref-object>."}, {"role": "assistant", "content": "<ref-object><bbox> and <bbox>"}]},
    {"name": "grounding-norm1", "images": ["portrait.png", "half.png"],
     "objects": {"ref": [], "bbox": [[0.25, 0.5, 0.7505, 1.0], [0.5, 0.125]], "bbox_type": "norm1", "image_id": [1, 0]}, "messages": [
        {"role": "user", "content": "<image><image>What is at <bbox> and <bbox>?"}, {"role": "assistant", "content": "A cat."}]},
]


@dataclass
class Media:
    """A row's pictures and videos after the family's processor."""
    image_grids: list  # [1, h, w] in patches
    video_grids: list
    video_texts: dict  # by template: what stands for each `<|video_pad|>` (Qwen3-VL only)
    resized: list  # width, height of each picture
    sizes: list


def substitute_objects(family: Family, row: dict, media: Media) -> list[dict]:
    """`<ref-object>` and `<bbox>` in order over all messages, as ms-swift writes them (QWENVL_BBOX_FORMAT=legacy)."""
    objects = row.get("objects")
    if not objects:
        return row["messages"]
    refs = iter(f"<|object_ref_start|>{ref}<|object_ref_end|>" for ref in objects["ref"])
    images = objects.get("image_id", []) + [0] * len(objects["bbox"])
    boxes = []
    for box, image in zip(objects["bbox"], images):
        if len(box) == 4:
            box = [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]
        from_size = (1, 1) if objects.get("bbox_type") == "norm1" else media.sizes[image]
        to_size = (1000, 1000) if family.bbox == "norm1000" else media.resized[image]
        points = [(round(x / from_size[0] * to_size[0]), round(y / from_size[1] * to_size[1])) for x, y in zip(box[::2], box[1::2])]
        boxes.append("<|box_start|>" + ",".join(f"({x},{y})" for x, y in points) + "<|box_end|>")
    boxes = iter(boxes)
    fill = lambda text: re.sub("<ref-object>|<bbox>", lambda m: next(refs if m[0] == "<ref-object>" else boxes), text)
    return [m | {"content": fill(m["content"])} for m in row["messages"]]


def text_of(content) -> str:
    return content if isinstance(content, str) else "".join(p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in content)


def vision_text(text: str) -> str:
    return re.sub("<(image|video)>", r"<|vision_start|><|\1_pad|><|vision_end|>", text)


def default_segments(family: Family, messages: list[dict]) -> list[tuple[str, bool]]:
    """The hub's template by hand: [(text, trained)]. The newline behind an answer's <|im_end|> opens the next prompt piece."""
    segments, prompt = [], ""
    if family.default_system is not None and messages[0]["role"] != "system":
        prompt = f"<|im_start|>system\n{family.default_system}<|im_end|>\n"
    for message in messages:
        text = vision_text(text_of(message["content"]))
        prompt += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            segments += [(prompt, False), (text + "<|im_end|>", True)]
            prompt = "\n"
        else:
            prompt += text + "<|im_end|>\n"
    if messages[-1]["role"] != "assistant":
        segments.append((prompt + "<|im_start|>assistant\n", False))
    return segments


def swift_segments(family: Family, messages: list[dict]) -> list[tuple[str, bool]]:
    """ms-swift's ChatML: `<|im_end|>\\n` is trained behind every answer, behind the earlier ones through its _add_dynamic_eos."""
    segments, prompt = [], ""
    system = family.default_system
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if system:
        prompt = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, message in enumerate(messages):
        text = vision_text(text_of(message["content"]))
        if message["role"] == "user":
            prompt += f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        else:
            last = i == len(messages) - 1
            segments += [(prompt, False), (text + ("<|im_end|>\n" if last else ""), True)]
            prompt = "" if last else "<|im_end|>\n"
    if messages[-1]["role"] != "assistant":
        segments.append((prompt, False))
    return segments


def encode(family: Family, tokenizer: Tokenizer, template: str, messages: list[dict], media: Media) -> tuple[list[int], list[int]]:
    segments = (default_segments if template == "default" else swift_segments)(family, messages)
    image_token, video_token = tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id("<|video_pad|>")
    if media.video_texts:  # replaced before it is tokenised
        texts = iter(media.video_texts[template])
        segments = [(re.sub(re.escape("<|video_pad|>"), lambda m: next(texts), text), trained) for text, trained in segments]
    lengths = {image_token: iter([math.prod(g) // MERGE**2 for g in media.image_grids]),
               video_token: iter([] if media.video_texts else [math.prod(g) // MERGE**2 for g in media.video_grids])}
    ids, labels = [], []
    for text, trained in segments:
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            vision = token in lengths
            new = [token] * (next(lengths[token], 1) if vision else 1)
            ids += new
            labels += [t if trained and not vision else -100 for t in new]
    if template == "ms-swift":
        dynamic_eos(ids, labels, tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids)
    labels[0] = -100
    return ids, labels


def dynamic_eos(ids: list[int], labels: list[int], suffix: list[int]) -> None:
    """The turn end behind an earlier answer is trained too: where an untrained run between trained ones starts with the suffix."""
    runs = [i for i in range(1, len(ids)) if labels[i - 1] >= 0 and labels[i] == -100]
    for start in runs:
        if ids[start : start + len(suffix)] == suffix and any(label >= 0 for label in labels[start:]):
            labels[start : start + len(suffix)] = suffix


# ---------------------------------------------------------------- the reference's own processors


def video_metadata(row: dict, i: int) -> dict:
    """A list of frames: all are used; 2 frames a second unless the row says otherwise (qwen_vl_utils' and ms-swift's default)."""
    frames, fps = row["videos"][i], row.get("videoFps", [2] * len(row["videos"]))[i]
    return {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames))), "duration": len(frames) / fps}


def video_text(template: str, grid: list[int], metadata: dict) -> str:
    """What stands for a Qwen3-VL video: each temporal patch by itself, behind the mean time of its first and last frame."""
    frames = list(metadata["frames_indices"])
    if len(frames) % TEMPORAL:  # the last frame again; qwen_vl_utils, which ms-swift calls, takes it for a frame that comes later
        frames.append(frames[-1] + (template == "ms-swift"))
    times = [(first + last) / 2 / metadata["fps"] for first, last in zip(frames[::TEMPORAL], frames[1::TEMPORAL])]
    return "".join(f"<{t:.1f} seconds><|vision_start|>{'<|video_pad|>' * (grid[1] * grid[2] // MERGE**2)}<|vision_end|>" for t in times)


def process_media(family: Family, processor, row: dict) -> tuple[dict, Media]:
    """Model inputs besides the ids, and what the ids need to know."""
    pictures = [load_picture(n) for n in row["images"]]
    inputs: dict = {}
    if pictures:
        out = processor.image_processor(images=pictures, return_tensors="pt")
        inputs |= {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}
    texts = {}
    if row.get("videos"):
        videos = [torch.stack([torch.from_numpy(np.array(load_picture(n))).permute(2, 0, 1) for n in frames]) for frames in row["videos"]]
        metadata = [video_metadata(row, i) for i in range(len(videos))]
        out = processor(text=["<|vision_start|><|video_pad|><|vision_end|>" * len(videos)], videos=videos, video_metadata=metadata, do_sample_frames=False,
                        return_tensors="pt", return_metadata=True)
        inputs |= {"pixel_values_videos": out["pixel_values_videos"], "video_grid_thw": out["video_grid_thw"]}
        if "second_per_grid_ts" in out:
            inputs["second_per_grid_ts"] = torch.as_tensor(out["second_per_grid_ts"], dtype=torch.float32)
        if family.name == "qwen3_vl":
            texts = {template: [video_text(template, grid, metadata[i]) for i, grid in enumerate(inputs["video_grid_thw"].tolist())]
                     for template in ("default", "ms-swift")}
            assert "".join(f"<|vision_start|>{t}<|vision_end|>" for t in texts["default"]) == processor.tokenizer.decode(out["input_ids"][0])
    grids = inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist()
    return inputs, Media(grids, inputs.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist(), texts,
                         [(w * PATCH, h * PATCH) for _, h, w in grids], [p.size for p in pictures])


def check_prompt(processor, row: dict, messages: list[dict], want: list[int], whole: bool) -> None:
    """The checkpoint's own template, rendered and tokenised by transformers in one piece."""
    parts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            pieces = [p for p in re.split("(<image>|<video>)", content) if p]
            content = [{"type": p[1:-1]} if p in ("<image>", "<video>") else {"type": "text", "text": p} for p in pieces]
        parts.append({"role": message["role"], "content": content})
    text = processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=not whole)
    if whole:
        assert text.endswith("<|im_end|>\n")
        text = text[:-1]
    videos = [torch.stack([torch.from_numpy(np.array(load_picture(n))).permute(2, 0, 1) for n in frames]) for frames in row.get("videos", [])]
    used = text.count("<|image_pad|>"), text.count("<|video_pad|>")
    out = processor(text=[text], images=[load_picture(n) for n in row["images"]][: used[0]] or None, videos=videos[: used[1]] or None,
                    **({"video_metadata": [video_metadata(row, i) for i in range(used[1])], "do_sample_frames": False} if used[1] else {}))
    ids = list(out["input_ids"][0])
    assert ids == want, (row["name"], processor.tokenizer.decode(ids), processor.tokenizer.decode(want))


# ---------------------------------------------------------------- one family


def main(family: Family, out: Path) -> None:
    tokenizer = make_tokenizer(family)
    vocab = (tokenizer.get_vocab_size() + 7) // 8 * 8
    image_token, video_token = tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id("<|video_pad|>")
    end_ids = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    print(family.name, "vocab", tokenizer.get_vocab_size(), "padded to", vocab)
    model = build_model(family, vocab, tokenizer, family.main_tied)
    other = build_model(family, vocab, tokenizer, not family.main_tied)

    # The hub's spelling, two shards with an index; transformers 5's, one file. A tied head is in no file.
    def stored(m) -> dict:
        return {k: v.to(torch.bfloat16).contiguous() for k, v in m.state_dict().items() if not (k == "lm_head.weight" and m.config.tie_word_embeddings)}

    files_4x(family, out / "model-4x", model, tokenizer)
    hub = {old_key(family, k): v for k, v in stored(model).items()}
    keys = sorted(hub)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for i, shard in enumerate(shards):
        save_file({k: hub[k] for k in shard}, out / "model-4x" / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    write_json(out / "model-4x" / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(v.numel() * 2 for v in hub.values())},
        "weight_map": {k: f"model-0000{i + 1}-of-00002.safetensors" for i, shard in enumerate(shards) for k in shard}})
    processor = AutoProcessor.from_pretrained(out / "model-4x")
    files_5x(out / "model-5x", other, processor)
    save_file(stored(other), out / "model-5x" / "model.safetensors", {"format": "pt"})

    processor_5x = AutoProcessor.from_pretrained(out / "model-5x")
    assert processor.chat_template == processor_5x.chat_template
    assert type(processor).__name__ == type(processor_5x).__name__ == family.class_prefix + "Processor"

    # ------------------------------------------------------------ rows
    cases, prepared = [], {}
    for row in ROWS:
        inputs, media = process_media(family, processor, row)
        messages = substitute_objects(family, row, media)
        case = dict(row)
        for template in ("default", "ms-swift"):
            ids, labels = encode(family, tokenizer, template, messages, media)
            prompt_ids, _ = encode(family, tokenizer, template, messages[:-1], media)
            case[template] = {"inputIds": ids, "labels": labels, "promptIds": prompt_ids}
        if messages is not row["messages"]:
            case["objectText"] = [m["content"] for m in messages]
        case["imageGrids"], case["videoGrids"] = media.image_grids, media.video_grids
        if "second_per_grid_ts" in inputs:
            case["secondPerGrid"] = inputs["second_per_grid_ts"].tolist()
        for p in (processor, processor_5x):
            check_prompt(p, row, messages[:-1], case["default"]["promptIds"], False)
            if row["name"] != "spaces":  # there the answer's own white space joins the template's in one piece of text
                check_prompt(p, row, messages, case["default"]["inputIds"], True)
        cases.append(case)
        prepared[row["name"]] = inputs
    grids = {n: processor.image_processor(images=[load_picture(n)], return_tensors="pt")["image_grid_thw"].tolist()[0]
             for n in sorted(p.name for p in IMAGES.iterdir())}
    write_json(out / "cases.json", {"imageToken": image_token, "videoToken": video_token, "grids": grids, "cases": cases})
    by_name = {c["name"]: c for c in cases}

    # ------------------------------------------------------------ pixels
    write_pixels(family, out, processor, prepared)

    # ------------------------------------------------------------ forward
    tensors: dict[str, torch.Tensor] = {}

    def inputs_of(name: str, key: str = "inputIds") -> dict:
        ids = torch.tensor([by_name[name]["default"][key]])
        kinds = (ids == image_token).int() + 2 * (ids == video_token).int()
        return {"input_ids": ids, **({"mm_token_type_ids": kinds} | prepared[name] if prepared[name] else {})}

    def forward(m, name: str) -> torch.Tensor:
        return m(**inputs_of(name)).logits[0]

    def labelled(name: str) -> list[int]:
        """Rows of the logits that predict a trained token."""
        return [i - 1 for i, label in enumerate(by_name[name]["default"]["labels"]) if i > 0 and label != -100]

    def losses(m, names: list[str]) -> tuple[torch.Tensor, int]:
        """Sum over labelled tokens and their count."""
        total, count = torch.zeros(()), 0
        for name in names:
            labels = torch.tensor(by_name[name]["default"]["labels"])[1:]
            total = total + F.cross_entropy(forward(m, name)[:-1].float(), labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        return total, count

    def greedy(m, name: str, n: int = 24) -> list[int]:
        inputs, done = inputs_of(name, "promptIds"), []
        for _ in range(n):
            logits = m(**inputs).logits[0, -1]
            best = logits.topk(2)
            assert best.values[0] - best.values[1] > 5e-4, f"{name}: two tokens are too close to tell on another machine"
            token = int(best.indices[0])
            if token in end_ids:
                break
            done.append(token)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, 1))
        return done

    results: dict = {"losses": {}, "ropeDeltas": {}}
    with torch.no_grad():
        for folder, reference in (("model-4x", model), ("model-5x", other)):
            loaded, info = family.make("ForConditionalGeneration").from_pretrained(
                out / folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            loaded.eval()
            for name in ("two-images", "video", "text-only"):
                assert torch.equal(forward(loaded, name), forward(reference, name)), (folder, name)
        for name in by_name:
            inputs = inputs_of(name)
            if prepared[name]:
                kwargs = {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
                positions, delta = model.model.get_rope_index(**kwargs)
            else:
                positions, delta = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1), torch.zeros(1, 1)
            tensors[f"positions.{name}"] = positions[:, 0].float()
            results["ropeDeltas"][name] = int(delta)
            total, count = losses(model, [name])
            results["losses"][name] = {"loss": float(total.detach() / count), "labelled": count}
        for name in ("single", "text-only", "two-images", "video", "image-video"):
            tensors[f"labelled.{name}"] = forward(model, name)[labelled(name)]
        tensors["logits.empty-system"] = forward(model, "empty-system")
        tensors["labelled.5x.two-images"] = forward(other, "two-images")[labelled("two-images")]
        check_plain_language_model(family, model, tensors["logits.empty-system"], inputs_of("empty-system")["input_ids"])
        vision_features(family, model, prepared, tensors)
        results["greedy"] = {n: greedy(model, n) for n in ("single", "two-images", "text-only", "chinese", "video", "image-second-turn")}
        for name in ("two-images", "video"):  # with transformers' own cache and its rope delta
            inputs = inputs_of(name, "promptIds")
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=sorted(end_ids))
            made = made[0, inputs["input_ids"].shape[1] :].tolist()
            assert [t for t in made if t not in end_ids] == results["greedy"][name], name

    train(family, out, vocab, tokenizer, model, by_name, losses, forward, labelled, greedy, tensors, results)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, out / "expected.safetensors")
    write_json(out / "expected.json", results)
    for path in out.rglob("*.json"):
        assert str(FIXTURES) not in path.read_text(encoding="utf8"), f"{path} holds a local path"
    print({n: len(t) for n, t in results["greedy"].items()}, [round(s["loss"], 3) for s in results["loraCurve"]["steps"]])
    for path in sorted(out.iterdir()):
        print(f"{sum(p.stat().st_size for p in [path, *path.rglob('*')] if p.is_file()) / 1e3:8.0f} kB  {path.name}")


def write_pixels(family: Family, out: Path, processor, prepared: dict) -> None:
    """Qwen2-VL has more pictures and Pillow's; the others' processors differ from its in mean and std at most. Grids are floats: the test reader knows no others."""
    def save(file: str, pixels: dict) -> None:
        save_file({k: v.float().contiguous() for k, v in pixels.items()}, out / f"{file}.safetensors")

    def pictures(make, names: tuple) -> dict:
        results = {n: make(images=[load_picture(n)], return_tensors="pt") for n in names}
        return {n: r["pixel_values"] for n, r in results.items()} | {f"grid.{n}": r["image_grid_thw"] for n, r in results.items()}

    names = ("tiny.png", "half.png", "portrait.png") if family.name == "qwen2_vl" else ("tiny.png", "half.png")
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessor"
    videos = {}
    for name in ("video", "video-slow"):
        videos |= {name: prepared[name]["pixel_values_videos"], f"grid.{name}": prepared[name]["video_grid_thw"]}
    save("pixels", pictures(processor.image_processor, names) | videos)
    if family.name == "qwen2_vl":
        save("pixels-pillow", pictures(transformers.Qwen2VLImageProcessorPil.from_pretrained(out / "model-4x"), names[:2]))


def check_plain_language_model(family: Family, model, logits: torch.Tensor, ids: torch.Tensor) -> None:
    """A row without pictures is the plain Qwen2 or Qwen3 language model."""
    kind = "Qwen3" if family.name == "qwen3_vl" else "Qwen2"
    text = {k: v for k, v in family.text.items() if k != "rope_parameters"}
    config = getattr(transformers, kind + "Config")(**text, vocab_size=model.config.text_config.vocab_size, tie_word_embeddings=False,
                                                   rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    config._attn_implementation = "eager"
    plain = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    state = {k.replace("model.language_model.", "model."): v for k, v in model.state_dict().items() if "visual" not in k}
    plain.load_state_dict(state)
    assert torch.allclose(plain(input_ids=ids).logits[0], logits, atol=1e-5, rtol=0), "text-only is not the plain language model"


def vision_features(family: Family, model, prepared: dict, tensors: dict) -> None:
    """After the merger; deepstack features where the family has them."""
    for case in ("single", "two-images", "parts", "emoji", "video"):
        inputs = prepared[case]
        pixels, grid = (inputs["pixel_values"], inputs["image_grid_thw"]) if "pixel_values" in inputs else (
            inputs["pixel_values_videos"], inputs["video_grid_thw"])
        result = model.model.visual(pixels, grid_thw=grid)
        tensors[f"features.{case}"] = result.pooler_output
        for i, deep in enumerate(getattr(result, "deepstack_features", None) or []):
            if case in ("single", "video"):
                tensors[f"deepstack.{i}.{case}"] = deep


# ---------------------------------------------------------------- adapters and training

LANGUAGE_LORA = r"language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"


def lora_model(model, regex: str, seed: int):
    """r 4, alpha 8; B is not zero, so that A has gradients."""
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=regex, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_((0.05 * torch.randn(p.shape, generator=generator)).to(torch.bfloat16))
            elif "lora_A" in name:
                p.copy_((torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1])).to(torch.bfloat16))
    return peft.eval()


def save_adapter(peft, folder: Path) -> dict:
    """The weights are exact in bfloat16, and stored so."""
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({k: v.to(torch.bfloat16) for k, v in stored.items()}, file, {"format": "pt"})
    return stored


def train(family: Family, out: Path, vocab: int, tokenizer: Tokenizer, model, by_name: dict, losses, forward, labelled, greedy, tensors: dict, results: dict) -> None:
    fresh = lambda: build_model(family, vocab, tokenizer, family.main_tied)
    short = lambda name: name.replace("base_model.model.", "").replace(".default", "")

    # ------------------------------------------------------------ LoRA on the language model
    peft = lora_model(fresh(), rf"model\.{LANGUAGE_LORA}", 3)
    stored = save_adapter(peft, out / "adapter-peft")
    if family.name != "qwen3_vl":
        (out / "adapter-old").mkdir()
        config = json.loads((out / "adapter-peft" / "adapter_config.json").read_text())
        config["target_modules"] = r"model\." + LANGUAGE_LORA.removeprefix(r"language_model\.")
        write_json(out / "adapter-old" / "adapter_config.json", config)
        save_file({k.replace("base_model.model.model.language_model.", "base_model.model.model."): v.to(torch.bfloat16) for k, v in stored.items()},
                  out / "adapter-old" / "adapter_model.safetensors", {"format": "pt"})
    with torch.no_grad():
        tensors["adapter.labelled.single"] = forward(peft, "single")[labelled("single")]
        results["adapterGreedy"] = {n: greedy(peft, n) for n in ("single", "text-only", "chinese")}
        reloaded = PeftModel.from_pretrained(fresh(), str(out / "adapter-peft")).eval()
        assert torch.equal(forward(reloaded, "single"), forward(peft, "single"))

    batch = ["single", "multi-turn", "text-only"]
    results["packed"] = {"rows": ["single", "text-only"]}  # two separate passes: `labelled.<row>`
    total, count = losses(peft, batch)
    (total / count).backward()
    results["loraGradients"] = {"rows": batch, "loss": float(total.detach() / count)}
    for name, p in peft.named_parameters():
        if p.requires_grad:
            tensors["grad." + short(name)] = p.grad.clone()
            p.grad = None

    # 20 steps: micro-batches of two rows, accumulation 2.
    order = ["single", "multi-turn", "text-only", "chinese", "system", "image-second-turn", "two-images", "emoji"]
    steps, warmup = 20, 3
    params = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    curve = []
    for step in range(steps):
        rows = [order[(step * 4 + i) % len(order)] for i in range(4)]
        count = sum(len(labelled(n)) for n in rows)
        value = 0.0
        for micro in (rows[:2], rows[2:]):
            total, _ = losses(peft, micro)
            (total / count).backward()
            value += float(total.detach() / count)
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        curve.append({"rows": rows, "loss": value, "gradNorm": norm, "learningRate": lr})
    assert curve[-1]["loss"] < curve[0]["loss"]
    results["loraCurve"] = {"warmupSteps": warmup, "totalSteps": steps, "learningRate": 1e-3, "weightDecay": 0.1, "maxGradNorm": 1.0, "steps": curve}
    for name, p in peft.named_parameters():
        if p.requires_grad and ("layers.0.self_attn.q_proj" in name or "layers.2.mlp.down_proj" in name):
            tensors["final." + short(name)] = p.detach().clone()

    # ------------------------------------------------------------ merge, from the stored adapter
    merged = PeftModel.from_pretrained(fresh(), str(out / "adapter-peft")).merge_and_unload()
    results["mergedNorms"] = {}
    for k, v in merged.state_dict().items():
        if k.endswith("_proj.weight") and "language_model" in k:
            results["mergedNorms"][k] = float(v.norm())
        if "layers.1.self_attn.v_proj.weight" in k:
            tensors["merged." + k] = v.clone()
    with torch.no_grad():
        assert torch.allclose(forward(merged, "single")[labelled("single")], tensors["adapter.labelled.single"], atol=1e-4, rtol=0)
    base = model.state_dict()
    module = "model.language_model.layers.1.self_attn.v_proj"
    a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    tensors[f"merged16.{module}.weight"] = (base[module + ".weight"] + (8 / 4) * (b @ a)).to(torch.bfloat16)

    # ------------------------------------------------------------ LoRA on vision and merger too
    peft = lora_model(fresh(), rf"model\.(visual\.{family.vision_lora}|{LANGUAGE_LORA})", 4)
    stored = save_adapter(peft, out / "adapter-vision")
    assert any("visual.merger" in k for k in stored) and not any("patch_embed" in k for k in stored)
    rows = ["two-images"]
    total, count = losses(peft, rows)
    (total / count).backward()
    results["visionLoraGradients"] = {"rows": rows, "loss": float(total.detach() / count), "norms": {}}
    for name, p in peft.named_parameters():
        if p.requires_grad:
            results["visionLoraGradients"]["norms"][short(name)] = float(p.grad.norm())
            if re.search(r"\.visual\.(blocks\.[03]|merger|deepstack_merger_list)\.", name):
                tensors["visionGrad." + short(name)] = p.grad.clone()

    # ------------------------------------------------------------ full training
    full = fresh()
    total, count = losses(full, batch)
    (total / count).backward()
    results["fullGradients"] = {"rows": batch, "loss": float(total.detach() / count), "norms": {}}
    for name, p in full.named_parameters():
        results["fullGradients"]["norms"][name] = float(p.grad.norm())
        if name.removeprefix("model.") in family.full_gradients:
            tensors["full." + name] = p.grad.clone()
    assert len([k for k in tensors if k.startswith("full.")]) == len(family.full_gradients)
    full.zero_grad()
    # As transformers' Trainer groups them: by the class LayerNorm and by name, so the RMS norms `norm1`, `norm2` and `ln_q` of Qwen2.5-VL decay.
    decayed = set(get_parameter_names(full, [torch.nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]))
    groups = [{"params": [p for n, p in full.named_parameters() if (n in decayed) == decay], "weight_decay": 0.1 * decay} for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for _ in range(5):
        total, count = losses(full, batch)
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(full.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": float(total.detach() / count), "gradNorm": norm})
    results["fullCurve"] = {"rows": batch, "learningRate": 1e-4, "weightDecay": 0.1, "steps": curve,
                            "decayedVectors": sorted(n for n, p in full.named_parameters() if p.ndim == 1 and n in decayed)}


def replace_folder(new: Path, final: Path) -> None:
    """The old folder stays until the new one is whole."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(FAMILIES)
    unknown = set(wanted) - set(FAMILIES)
    if unknown:
        sys.exit(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    scratch = FIXTURES / ".new"
    shutil.rmtree(scratch, ignore_errors=True)
    make_images(scratch / "images")
    replace_folder(scratch / "images", IMAGES)
    for name in wanted:
        main(FAMILIES[name], scratch / name)
        replace_folder(scratch / name, FIXTURES / name)
    shutil.rmtree(scratch)
