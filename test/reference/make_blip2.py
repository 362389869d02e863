"""Makes test/fixtures/{blip2_opt,blip2_t5}: tiny random BLIP-2 models with OPT and with flan-T5, and what transformers 5.17 and PEFT 0.21
compute with them.

Run: python3 -m venv v && v/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.17.0 peft==0.21.0 pillow sentencepiece==0.2.3 protobuf
     v/bin/python test/reference/make_blip2.py [opt] [t5]
The rules for prompts and labels that cases.json follows are in test/fixtures/blip2/README.md.
"""

import copy
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from dataclasses import dataclass
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

import sentencepiece
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
IMAGES = FIXTURES / "llava" / "images"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGE_SIZE, PATCH, QUERY_TOKENS = 28, 7, 8
torch.set_num_threads(2)
transformers.logging.set_verbosity_error()

CORPUS = """
Question: What is in the picture? Answer: A red circle and two blue squares. Question: Where is it? Answer: On the left.
You are a helpful assistant. Describe the image in detail, please. How many shapes are there? There are three green triangles at the top.
What colour is the cat? The cat is blue and grey. Tell me a story about the sea. Once upon a time there was a little bird.
这只猫是什么颜色? 这只猫是蓝色的,属于英短蓝猫。 图片里有什么? 图片里有一个红色的圆形和两个蓝色的正方形。 它在左边还是右边? 它在右边。
The quick brown fox jumps over the lazy dog. A café, naïve, fine film: 0 1 2 3 4 5 6 7 8 9 % ! ; ' " ( )
""" * 3


# ---------------------------------------------------------------- the two forms


@dataclass(frozen=True)
class Form:
    name: str
    text: dict  # what text_config of the hub's config.json holds, with tiny sizes and without vocab_size
    seed: int  # the first that leaves no two tokens close together where decoding chooses
    lora_all: tuple  # target modules beside Q-Former, projection and vision
    full_gradients: tuple  # parameters whose whole gradient is kept
    final: tuple  # LoRA modules whose weights after 20 steps are kept
    merged: str

    @property
    def folder(self) -> str:
        return f"blip2_{self.name}"


VISION = dict(hidden_size=24, image_size=IMAGE_SIZE, intermediate_size=40, num_attention_heads=4, num_hidden_layers=2, patch_size=PATCH)
QFORMER = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3)
SHARED_GRADIENTS = (
    "query_tokens", "language_projection.weight", "language_projection.bias", "qformer.layernorm.weight",
    "qformer.encoder.layer.0.crossattention.attention.key.weight", "qformer.encoder.layer.2.crossattention.output.LayerNorm.bias",
    "qformer.encoder.layer.1.attention.attention.query.weight", "qformer.encoder.layer.2.output_query.dense.weight",
    "vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding", "vision_model.embeddings.patch_embedding.bias",
    "vision_model.encoder.layers.0.self_attn.qkv.weight", "vision_model.encoder.layers.1.self_attn.qkv.bias", "vision_model.post_layernorm.weight")
FORMS = {f.name: f for f in (
    Form(
        "opt",
        text={"_name_or_path": "facebook/opt-2.7b", "activation_dropout": 0.0, "architectures": ["OPTForCausalLM"], "ffn_dim": 72, "hidden_size": 40,
              "max_position_embeddings": 96, "model_type": "opt", "num_attention_heads": 4, "num_hidden_layers": 2, "prefix": "</s>",
              "torch_dtype": "float16", "word_embed_proj_dim": 40},
        seed=11, lora_all=("q_proj", "v_proj"),
        full_gradients=SHARED_GRADIENTS + (
            "language_model.model.decoder.embed_positions.weight",
            "language_model.model.decoder.layers.0.self_attn.v_proj.bias", "language_model.model.decoder.layers.1.fc1.weight",
            "language_model.model.decoder.final_layer_norm.weight"),
        final=("decoder.layers.0.self_attn.q_proj", "decoder.layers.1.self_attn.v_proj"),
        merged="language_model.model.decoder.layers.1.self_attn.v_proj",
    ),
    Form(
        "t5",
        text={"architectures": ["T5ForConditionalGeneration"], "bos_token_id": 1, "classifier_dropout": 0.0, "d_ff": 48, "d_kv": 8, "d_model": 40,
              "decoder_start_token_id": 0, "dense_act_fn": "gelu", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
              "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
              "n_positions": 512, "num_decoder_layers": 2, "num_heads": 4, "num_layers": 3, "output_past": True, "pad_token_id": 0,
              # Small, so that short rows reach the logarithmic buckets and the last one.
              "relative_attention_max_distance": 24, "relative_attention_num_buckets": 12,
              "task_specific_params": {"summarization": {"max_length": 200, "num_beams": 4, "prefix": "summarize: "}},
              "tie_word_embeddings": False, "torch_dtype": "float32"},
        seed=11, lora_all=("q", "v"),
        full_gradients=SHARED_GRADIENTS + (
            "language_model.shared.weight", "language_model.lm_head.weight",
            "language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "language_model.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "language_model.encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "language_model.decoder.block.1.layer.1.EncDecAttention.k.weight",
            "language_model.decoder.final_layer_norm.weight"),
        final=("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"),
        merged="language_model.decoder.block.1.layer.1.EncDecAttention.v",
    ),
)}


def write_json(path: Path, value) -> None:
    """Lists of numbers stay on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r"\[\s*(-?\d[^\[\]\"{}]*?)\s*\]", lambda m: "[" + re.sub(r"\s+", "", m[1]) + "]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf8")


# ---------------------------------------------------------------- tokenizers


def make_opt_tokenizer(image_token: bool) -> Tokenizer:
    """GPT-2's byte-level BPE with OPT's first four ids, its unused last words, a leading </s>, and <image> behind the vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS.strip().split("\n"), trainers.BpeTrainer(
        vocab_size=322, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {f"madeupword000{i}": len(model["vocab"]) + i for i in range(3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", vocab["</s>"])])
    special = ["<pad>", "</s>"] + ["<image>"] * image_token
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=t != "<image>") for t in special])
    return tokenizer


def normalisation_rules() -> list[tuple[str, str]]:
    """A part of NFKC with T5's additions (control characters vanish, white space becomes a space): the whole table has 240 kB."""
    rules = {chr(c): " " for c in (0x09, 0x0A, 0x0D, 0xA0, *range(0x2000, 0x200B), 0x3000)} | {chr(c): "" for c in range(1, 9)}
    single = [*range(0xFF01, 0xFF5F), *range(0xFB00, 0xFB07), *range(0x2460, 0x2474), *range(0x2160, 0x216C), 0xBD, 0x2122, 0x212B, 0x3392]
    rules |= {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in single}
    for base in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        for mark in "\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327":
            composed = unicodedata.normalize("NFKC", base + mark)
            if len(composed) == 1:
                rules[base + mark] = composed
    return sorted(rules.items())


def make_spiece() -> bytes:
    """A Unigram spiece.model with T5's ids: <pad> 0, </s> 1, <unk> 2, no bytes."""
    words = CORPUS.split()
    shuffled = np.random.default_rng(2).permutation(words * 20).tolist()  # in one order only, whole sentences would be the likeliest pieces
    sentences = [" ".join(shuffled[i : i + 12]) for i in range(0, len(shuffled), 12)]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rules.tsv"
        code = lambda text: " ".join(f"{ord(c):X}" for c in text)
        table.write_text("".join(f"{code(a)}\t{code(b)}\n" for a, b in normalisation_rules()))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=184, character_coverage=1.0,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, normalization_rule_tsv=str(table), minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.normalization_rule_tsv = ""  # a path
    return proto.SerializeToString(deterministic=True)


def make_t5_tokenizer(spiece: bytes) -> Tokenizer:
    """As T5's tokenizer.json is built from spiece.model: 100 sentinels behind the pieces, last first; then <image>."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    sentinels = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    tokenizer = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces] + [(s, 0.0) for s in sentinels], unk_id=2))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    special = ["<pad>", "</s>", "<unk>"] + sentinels + ["<image>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


# ---------------------------------------------------------------- model folders


@dataclass
class Tokens:
    """A form's tokenizers and the ids that matter."""
    new: Tokenizer
    old: Tokenizer
    spiece: bytes | None
    vocab: int  # rows of the embedding
    old_vocab: int
    image: int
    end: int
    start: int  # OPT: in front of the text; T5: of the decoder


def make_tokens(form: Form) -> Tokens:
    if form.name == "opt":
        new, old = make_opt_tokenizer(True), make_opt_tokenizer(False)
        # The new table has room for <image> and is padded further.
        return Tokens(new, old, None, -(-new.get_vocab_size() // 16) * 16, -(-old.get_vocab_size() // 4) * 4, new.token_to_id("<image>"),
                      old.token_to_id("Ċ"), old.token_to_id("</s>"))
    spiece = make_spiece()
    new = make_t5_tokenizer(spiece)
    vocab = -(-new.get_vocab_size() // 8) * 8  # T5's table has room for <image> from the start
    return Tokens(new, new, spiece, vocab, vocab, new.token_to_id("<image>"), 1, 0)


def sparse_config(form: Form, tokens: Tokens, old: bool) -> dict:
    """As sparse as the hub's: what equals a class default is left out (but for T5, whose defaults the hub spells out)."""
    text = form.text | ({"eos_token_id": tokens.end} if form.name == "opt" else {})
    text["vocab_size"] = tokens.old_vocab if old else tokens.vocab
    config = {
        "architectures": ["Blip2ForConditionalGeneration"], "image_text_hidden_size": 256, "image_token_index": tokens.image, "initializer_factor": 1.0,
        "initializer_range": 0.02, "model_type": "blip-2", "num_query_tokens": QUERY_TOKENS,
        "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer", **QFORMER}, "text_config": text, "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0", "use_decoder_only_language_model": form.name == "opt",
        "vision_config": {"dropout": 0.0, "initializer_factor": 1.0, "model_type": "blip_2_vision_model", "num_channels": 3, "projection_dim": 512,
                          **VISION}}
    if old:
        del config["image_token_index"], config["image_text_hidden_size"]
        config["transformers_version"] = "4.31.0"
    return config


def model_files(form: Form, folder: Path, tokens: Tokens, old: bool) -> None:
    """Every file as the hub has it. T5's old folder has its tokenizer in spiece.model alone."""
    write_json(folder / "config.json", sparse_config(form, tokens, old))
    tokenizer = tokens.old if old else tokens.new
    state = json.loads(tokenizer.to_str())
    if form.name == "opt":
        state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
        write_json(folder / "vocab.json", state["model"]["vocab"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(state["model"]["merges"]) + "\n", encoding="utf8")
        special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
        config = {"add_bos_token": True, "add_prefix_space": False, "errors": "replace", "tokenizer_class": "GPT2Tokenizer"}
        generation = {"bos_token_id": 2, "eos_token_id": tokens.end, "pad_token_id": 1}
    else:
        (folder / "spiece.model").write_bytes(tokens.spiece)
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        config = {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)], "extra_ids": 100, "sp_model_kwargs": {},
                  "tokenizer_class": "T5Tokenizer"}
        generation = {"bos_token_id": 1, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    write_json(folder / "special_tokens_map.json", special)
    config |= special | {"clean_up_tokenization_spaces": True, "model_max_length": 512, "processor_class": "Blip2Processor"}
    if not old:
        config["added_tokens_decoder"] = {str(t["id"]): {k: t[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
                                          for t in state["added_tokens"]}
        write_json(folder / "added_tokens.json", {"<image>": tokens.image})
        write_json(folder / "processor_config.json", {
            "image_token": {"__type": "AddedToken", "content": "<image>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                            "special": True},
            "num_query_tokens": QUERY_TOKENS, "processor_class": "Blip2Processor"})
    write_json(folder / "tokenizer_config.json", config)
    if not (old and form.name == "t5"):
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf8")
    write_json(folder / "preprocessor_config.json", {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
        "image_processor_type": "BlipImageProcessor", "image_std": CLIP_STD, "processor_class": "Blip2Processor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}})
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})


def build_model(form: Form, folder: Path, tokens: Tokens):
    """From the sparse config.json. All weights are exact in bfloat16, the files' type."""
    config = Blip2Config.from_pretrained(folder)
    config._attn_implementation = "eager"
    config.dtype = None
    model = Blip2ForConditionalGeneration(config).float().eval()
    if form.name == "t5":  # transformers 5 ties T5's head whatever the config says, and lets go only of a file's own values
        model.language_model.lm_head.weight = torch.nn.Parameter(model.language_model.lm_head.weight.detach().clone())
    attention = re.compile(r"(SelfAttention|EncDecAttention)\.q\.weight$")
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(form.seed + sum(map(ord, name))))
            if p.ndim == 1 and name.endswith("weight"):
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.1 * noise
                if name.endswith("qkv.bias"):  # EVA's keys have no bias; the fused layer holds zeros for it
                    third = len(value) // 3
                    value[third : 2 * third] = 0
            elif name in ("query_tokens", "language_model.shared.weight"):
                value = noise
            elif "embed" in name and p.ndim != 4 or "lm_head" in name or "relative_attention_bias" in name:
                value = (0.25 if len(p) == tokens.vocab else 0.4) * noise
                if "relative" in name:  # large, so that decoding does not settle on one token
                    value *= 5
            else:
                value = noise * ((0.8 if attention.search(name) else 1.4) / math.sqrt(p[0].numel()))
            if len(p) == tokens.vocab:  # these never win, so that decoding goes on for a while and stays text
                value[[tokens.end, tokens.start, tokens.image]] *= 0.3
                value[tokens.image + 1 :] *= 0.3
            p.copy_(value.to(torch.bfloat16).float())
    return model


def save_folders(form: Form, out: Path, tokens: Tokens):
    """model-new: two shards; model-old: one file; model-5x: what transformers 5.17 saves. → the models of new and old"""
    for folder, old in (("model-new", False), ("model-old", True)):
        model_files(form, out / folder, tokens, old)
    model = build_model(form, out / "model-new", tokens)
    half = lambda state: {k: v.to(torch.bfloat16).clone() for k, v in state.items()}
    state = {k: v for k, v in half(model.state_dict()).items() if not k.endswith("embed_tokens.weight") or form.name == "opt"}
    if form.name == "opt":
        assert torch.equal(state.pop("language_model.lm_head.weight"), state["language_model.model.decoder.embed_tokens.weight"])
    keys = sorted(state)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for i, shard in enumerate(shards):
        save_file({k: state[k] for k in shard}, out / "model-new" / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    write_json(out / "model-new" / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(v.numel() * 2 for v in state.values())},
        "weight_map": {k: f"model-0000{i + 1}-of-00002.safetensors" for i, shard in enumerate(shards) for k in shard}})

    if form.name == "opt":  # what a converter leaves over that keeps the first of shared tensors
        state["language_model.lm_head.weight"] = state.pop("language_model.model.decoder.embed_tokens.weight")[: tokens.old_vocab].clone()
    else:  # what a pytorch_model.bin gives that names shared tensors more than once
        state["language_model.encoder.embed_tokens.weight"] = state["language_model.shared.weight"].clone()
    save_file(state, out / "model-old" / "model.safetensors", {"format": "pt"})

    halved = copy.deepcopy(model).to(torch.bfloat16)
    halved.config.dtype = torch.bfloat16
    halved.save_pretrained(out / "model-5x")
    AutoProcessor.from_pretrained(out / "model-new").save_pretrained(out / "model-5x")

    def load(folder: str):
        loaded, info = Blip2ForConditionalGeneration.from_pretrained(
            out / folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
        return loaded.eval()

    new, newest, older = load("model-new"), load("model-5x"), load("model-old")
    for name, p in model.state_dict().items():
        assert torch.equal(new.state_dict()[name], p) and torch.equal(newest.state_dict()[name], p), name
        rows = tokens.old_vocab if p.ndim == 2 and len(p) == tokens.vocab else len(p)
        assert torch.equal(older.state_dict()[name], p[:rows]), name
    saved = set(load_file(out / "model-5x" / "model.safetensors"))
    assert saved == set(keys), saved ^ set(keys)
    if form.name == "t5":
        for loaded in (model, new, newest, older):
            text = loaded.config.text_config
            assert text.dense_act_fn == "gelu" and text.is_gated_act and not text.scale_decoder_outputs
            assert loaded.language_model.lm_head.weight is not loaded.language_model.shared.weight
            assert loaded.language_model.encoder.embed_tokens.weight is loaded.language_model.decoder.embed_tokens.weight
    return model, older


# ---------------------------------------------------------------- rows → ids and labels (independent of martlet's TypeScript)

ROWS = [
    {"name": "caption", "images": ["landscape.png"], "messages": [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A red circle and two blue squares."}]},
    {"name": "single", "images": ["landscape.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is in the picture?"}, {"role": "assistant", "content": "A red circle and two blue squares."}]},
    {"name": "prompt-form", "images": ["exact.png"], "messages": [
        {"role": "user", "content": "<image>\nQuestion: What colour is the cat? Answer:"}, {"role": "assistant", "content": "The cat is blue."}]},
    {"name": "in-context", "images": ["small.png"], "messages": [
        {"role": "user", "content": "<image>Question: Where is it? Answer: On the left. Question: How many? Answer:"},
        {"role": "assistant", "content": "three"}]},
    {"name": "multi-turn", "images": ["portrait.png"], "messages": [
        {"role": "user", "content": "<image>\nHow many shapes are there?"}, {"role": "assistant", "content": "There are three."},
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the left."}]},
    {"name": "system", "images": ["exact.png"], "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>\nDescribe the image in detail, please."}, {"role": "assistant", "content": "The cat is blue and grey."}]},
    {"name": "caption-system", "images": ["small.png"], "messages": [
        {"role": "system", "content": "Describe the image."}, {"role": "user", "content": "<image>\n"}, {"role": "assistant", "content": "a cat"}]},
    {"name": "two-images", "images": ["portrait.png", "small.png"], "messages": [
        {"role": "user", "content": "<image>\n<image>\nWhat is in the picture?"}, {"role": "assistant", "content": "A red circle."}]},
    {"name": "text-only", "images": [], "messages": [
        {"role": "user", "content": "Tell me a story about the sea."}, {"role": "assistant", "content": "Once upon a time there was a little bird."}]},
    {"name": "chinese", "images": ["palette.png"], "messages": [
        {"role": "user", "content": "<image>\n这只猫是什么颜色?"}, {"role": "assistant", "content": "这只猫是蓝色的,属于英短蓝猫。"}]},
    {"name": "emoji", "images": ["strip.png"], "messages": [
        {"role": "user", "content": "<image>\nWhat is 🐱 doing — 龘?"}, {"role": "assistant", "content": "🐦 sings ♫ žluťoučký."}]},
    {"name": "image-last", "images": ["exact.png"], "messages": [
        {"role": "user", "content": "What colour is the cat?\n<image>"}, {"role": "assistant", "content": "The cat is blue."}]},
    {"name": "image-second-turn", "images": ["portrait.png"], "messages": [
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the left."},
        {"role": "user", "content": "<image>\nWhat colour is the cat?"}, {"role": "assistant", "content": "The cat is blue."}]},
    {"name": "parts", "images": ["picture.webp"], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look at it: "}, {"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red "}, {"type": "text", "text": "circle."}]}]},
    {"name": "spaces", "images": [], "messages": [
        {"role": "user", "content": "  two  spaces\nand a line "}, {"role": "assistant", "content": " leading space, trailing newline\n"}]},
    {"name": "normalised", "images": [], "messages": [
        {"role": "user", "content": "Ｗｈａｔ\u3000is ｔｈｉｓ ﬁlm? ① cafe\u0301\u00a0naïve"}, {"role": "assistant", "content": "Ⅳ ½ ﬂ, Ａ ™ u\u0308"}]},
]
# Strings for the tokenizers alone.
TEXTS = [
    "", " ", "a", " a", "a ", "Hello world", "  many   spaces  ", "tab\tand\nnewline\r\nend", "\n\n", "It's we'll I'd they've", "1234567890 3.14", "ABC-def_ghi",
    "squares.Question:", "这只猫是蓝色的", "一 二", "カタカナ한글", "🐱🐦", "x🐱y", "e\u0301 é", "ﬁne ＡＢＣ ①②", "a\u00a0b\u2003c\u3000d", "a\x01b\x07c",
    "<image>", "a<image>b", " <image> ", "</s>", "Question: </s> Answer:", "<extra_id_0> x <extra_id_99>", "<pad>a<unk>b<s>", "madeupword0001",
    "ÅÅ ㎒ ſ ﷺ", "!!!???...", "\"quoted\" (text) 50 %", "naïve café žluťoučký", "a\u200bb", "the the the the", "Tellmeastory",
]


def text_of(content) -> str:
    """Without the pictures, which stand in front of all text. A newline beside a mark only sets it off: one goes with it."""
    if isinstance(content, str):
        return re.sub(r"<image>\n|\n<image>|<image>", "", content)
    return "".join(p["text"] for p in content if p["type"] == "text")


def question(text: str) -> str:
    """The prompt of BLIP-2's papers, once; nothing for a caption."""
    plain = text.strip()
    if not plain or plain.startswith("Question:") and plain.endswith("Answer:"):
        return text if plain else ""
    return f"Question: {text} Answer:"


def encode_opt(tokens: Tokens, messages: list[dict], pictures: int) -> tuple[list[int], list[int]]:
    """Pictures, </s>, then segments: prompts, and answers with their end token. Each segment is tokenised on its own."""
    ids = [tokens.image] * (QUERY_TOKENS * pictures) + [tokens.start]
    labels = [-100] * len(ids)
    pieces: list[str] = []

    def add(text: str, trained: bool) -> None:
        piece = tokens.new.encode(text, add_special_tokens=False).ids + [tokens.end] * trained
        ids.extend(piece)
        labels.extend(piece if trained else [-100] * len(piece))

    for message in messages:
        text = text_of(message["content"])
        if message["role"] == "assistant":
            prompt = " ".join(pieces)
            add(prompt, False)
            add((" " if prompt else "") + text, True)
            pieces = []
        else:
            piece = text if message["role"] == "system" else question(text)
            pieces += [piece] if piece else []
    add(" ".join(pieces), False)
    return ids, labels


def encode_t5(tokens: Tokens, messages: list[dict], pictures: int) -> tuple[list[int], list[int] | None]:
    """Encoder: pictures, all but the last answer joined by spaces, </s>. Labels: the last answer and </s>, the decoder's."""
    plain = lambda text: tokens.new.encode(text, add_special_tokens=False).ids
    labels = None
    if messages[-1]["role"] == "assistant":
        labels = plain(text_of(messages[-1]["content"])) + [tokens.end]
        messages = messages[:-1]
    pieces = [question(text_of(m["content"])) if m["role"] == "user" else text_of(m["content"]) for m in messages]
    return [tokens.image] * (QUERY_TOKENS * pictures) + plain(" ".join(p for p in pieces if p)) + [tokens.end], labels


def make_cases(form: Form, out: Path, tokens: Tokens) -> list[dict]:
    processor_of = lambda folder: AutoProcessor.from_pretrained(out / folder)
    newer = [processor_of("model-new"), processor_of("model-5x")]
    older = AutoTokenizer.from_pretrained(out / "model-old")
    for processor in newer:
        assert type(processor).__name__ == "Blip2Processor" and processor.num_query_tokens == QUERY_TOKENS
    encode = encode_opt if form.name == "opt" else encode_t5
    cases = []
    for row in ROWS:
        messages, pictures = row["messages"], len(row["images"])
        ids, labels = encode(tokens, messages, pictures)
        prompt_ids, _ = encode(tokens, messages[:-1], pictures)
        image_ids = QUERY_TOKENS * pictures
        assert ids.count(tokens.image) == image_ids and prompt_ids.count(tokens.image) == image_ids
        case = dict(row) | {
            "default": {"inputIds": ids, "labels": labels, "promptIds": prompt_ids},
            # Before image_token_index the features were put in front of ids that know nothing of them.
            "old": {"inputIds": ids[image_ids:], "labels": labels[image_ids:] if form.name == "opt" else labels, "promptIds": prompt_ids[image_ids:]}}
        if form.name == "opt":
            assert len(labels) == len(ids) and all(label in (-100, i) for label, i in zip(labels, ids)) and labels[-1] == tokens.end
        else:
            assert prompt_ids == ids

        # transformers' own processor, prompt in one piece.
        texts = [question(text_of(m["content"])) if m["role"] == "user" else text_of(m["content"]) for m in messages]
        joined = texts[0]
        for message, text in zip(messages[1:-1], texts[1:-1]):
            after_answer = form.name == "opt" and joined.endswith("\n")
            joined += ("" if after_answer or not joined or not text else " ") + text
            joined += "\n" if form.name == "opt" and message["role"] == "assistant" else ""
        if pictures < 2:
            for processor in newer:
                images = [load_picture(n) for n in row["images"]] or None
                got = processor(images=images, text=joined)["input_ids"][0]
                assert list(got) == prompt_ids, (row["name"], processor.tokenizer.decode(got), processor.tokenizer.decode(prompt_ids))
        assert older(joined)["input_ids"] == case["old"]["promptIds"], row["name"]
        if row["name"] != "spaces" and form.name == "opt":  # there the answer's own white space joins its neighbours
            whole = joined + (" " if joined else "") + texts[-1] + "\n"
            assert older(whole)["input_ids"] == case["old"]["inputIds"], row["name"]
        if form.name == "t5":
            assert older(texts[-1])["input_ids"] == labels, row["name"]
        cases.append(case)

    # The tokenizer alone. All of transformers' ways to it agree; sentencepiece itself does not in the strings marked so.
    strings, raw = [], sentencepiece.SentencePieceProcessor(model_proto=tokens.spiece) if tokens.spiece else None
    for text in TEXTS:
        ids = tokens.new.encode(text, add_special_tokens=False).ids
        for tokenizer in (newer[0].tokenizer, newer[1].tokenizer, *([] if "<image>" in text else [older])):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, (text, type(tokenizer))
        entry = {"text": text, "ids": ids, "decoded": tokens.new.decode(ids, skip_special_tokens=False)}
        if raw and raw.encode(text) != ids:
            entry["sentencepiece"] = raw.encode(text)
        strings.append(entry)
    write_json(out / "cases.json", {"imageToken": tokens.image, "imageTokens": QUERY_TOKENS, "endToken": tokens.end, "startToken": tokens.start,
                                    "cases": cases, "tokenizer": strings})
    return cases


# ---------------------------------------------------------------- pictures


def load_picture(name: str) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(IMAGES / name)).convert("RGB")


def make_pixels(out: Path) -> dict[str, torch.Tensor]:
    names = sorted({n for row in ROWS for n in row["images"]} | {"alpha.png"})
    processor = AutoProcessor.from_pretrained(out / "model-new").image_processor
    assert type(processor).__name__ == "BlipImageProcessor"
    pillow = transformers.BlipImageProcessorPil.from_pretrained(out / "model-new")

    def pixels(make, names: list) -> dict:
        return {n: make(images=[load_picture(n)], return_tensors="pt")["pixel_values"][0].contiguous() for n in names}

    result = pixels(processor, names)
    assert all(p.shape == (3, IMAGE_SIZE, IMAGE_SIZE) and p.dtype == torch.float32 for p in result.values())
    for name in names:  # the same operators by hand: uint8 bicubic with antialiasing, then one fused normalisation
        x = torch.from_numpy(np.array(load_picture(name))).permute(2, 0, 1)
        x = F.interpolate(x[None], size=[IMAGE_SIZE, IMAGE_SIZE], mode="bicubic", align_corners=False, antialias=True)[0].float()
        mean, std = (torch.tensor(v)[:, None, None] * (1.0 / 0.00392156862745098) for v in (CLIP_MEAN, CLIP_STD))
        assert torch.equal((x - mean) / std, result[name]), name
    if out.name == FORMS["opt"].folder:  # the other form's are the same
        save_file(result, out / "pixels.safetensors")
        save_file(pixels(pillow, ["landscape.png", "portrait.png", "strip.png"]), out / "pixels-pillow.safetensors")
    return result


# ---------------------------------------------------------------- running a model


class Runner:
    """A form's rows through a model: transformers' Blip2ForConditionalGeneration, or its language model where there is no picture."""

    def __init__(self, form: Form, tokens: Tokens, cases: list[dict], pixels: dict[str, torch.Tensor]):
        self.form, self.tokens, self.pixels = form, tokens, pixels
        self.cases = {c["name"]: c for c in cases}
        self.t5 = form.name == "t5"

    def pictures(self, name: str):
        names = self.cases[name]["images"]
        return torch.stack([self.pixels[n] for n in names]) if names else None

    def labels(self, name: str) -> list[int]:
        return self.cases[name]["default"]["labels"]

    def rows(self, name: str) -> list[int]:
        """Rows of the logits that predict a trained token."""
        if self.t5:
            return list(range(len(self.labels(name))))
        return [i - 1 for i, label in enumerate(self.labels(name)) if i > 0 and label != -100]

    def targets(self, name: str) -> list[int]:
        return [label for label in self.labels(name) if label != -100]

    def decoder(self, name: str) -> dict:
        return {"decoder_input_ids": torch.tensor([[self.tokens.start] + self.labels(name)[:-1]])} if self.t5 else {}

    def run(self, model, name: str, ids: list[int], **kwargs) -> torch.Tensor:
        """Logits [length, vocab]; T5: of the decoder."""
        inputs, pixels = {"input_ids": torch.tensor([ids]), **kwargs}, self.pictures(name)
        if pixels is None:
            core = model.get_base_model() if isinstance(model, PeftModel) else model
            return core.language_model(**inputs).logits[0]
        return model(pixel_values=pixels, **inputs).logits[0]

    def forward(self, model, name: str) -> torch.Tensor:
        return self.run(model, name, self.cases[name]["default"]["inputIds"], **self.decoder(name))

    def labelled(self, model, name: str) -> torch.Tensor:
        return self.forward(model, name)[self.rows(name)]

    def losses(self, model, names: list[str]) -> tuple[torch.Tensor, int]:
        """Sum over trained tokens and their count."""
        total = sum(F.cross_entropy(self.labelled(model, n).float(), torch.tensor(self.targets(n)), reduction="sum") for n in names)
        return total, sum(len(self.targets(n)) for n in names)

    def greedy(self, model, name: str, step=None, count: int = 24) -> list[int]:
        """Without a cache, one forward a token. The end token is left out."""
        prompt, done = self.cases[name]["default"]["promptIds"], []
        step = step or (lambda ids, decoder: self.run(model, name, ids, **({"decoder_input_ids": torch.tensor([decoder])} if self.t5 else {})))
        for _ in range(count):
            logits = step(prompt if self.t5 else prompt + done, [self.tokens.start] + done)[-1]
            best = logits.topk(2)
            assert best.values[0] - best.values[1] > 5e-4, f"{name}: two tokens are too close to tell on another machine"
            token = int(best.indices[0])
            if token == self.tokens.end:
                break
            done.append(token)
        return done

    def generate(self, model, name: str, without_ids: bool = False) -> list[int]:
        """transformers' own generate, with its cache and its own start and end tokens."""
        ids, pixels = self.cases[name]["default"]["promptIds"], self.pictures(name)
        inputs = {} if without_ids else {"input_ids": torch.tensor([ids])}
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        if pixels is None:
            made = core.language_model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
        else:
            made = model.generate(pixel_values=pixels, **inputs, max_new_tokens=24, do_sample=False)[0].tolist()
        start = [self.tokens.start] if self.t5 else ids
        assert made[: len(start)] == start, (name, made)
        made = made[len(start) :]
        return made[:-1] if made[-1:] == [self.tokens.end] else made

    def old_inputs(self, model, name: str, ids: list[int]) -> dict:
        """What transformers did before 4.46: features, then the embedded ids."""
        embedded, pixels = model.get_input_embeddings()(torch.tensor([ids])), self.pictures(name)
        if pixels is not None:
            features = model.get_image_features(pixel_values=pixels).pooler_output
            embedded = torch.cat([features.reshape(1, -1, features.shape[-1]), embedded], 1)
        return {"inputs_embeds": embedded, "attention_mask": torch.ones(embedded.shape[:2], dtype=torch.long)}

    def old_forward(self, model, name: str, ids: list[int], **kwargs) -> torch.Tensor:
        return model.language_model(**self.old_inputs(model, name, ids), **kwargs).logits[0]


def main(form: Form, out: Path) -> None:
    tokens = make_tokens(form)
    print(form.name, "vocab", tokens.new.get_vocab_size(), "padded to", tokens.vocab, "old", tokens.old_vocab, "image", tokens.image, "end", tokens.end)
    model, old_model = save_folders(form, out, tokens)
    run = Runner(form, tokens, make_cases(form, out, tokens), make_pixels(out))
    tensors: dict[str, torch.Tensor] = {}
    results: dict = {"losses": {}}

    with torch.no_grad():
        for name in run.cases:
            total, count = run.losses(model, [name])
            results["losses"][name] = {"loss": float(total / count), "labelled": count}
        for name in ("caption", "single", "multi-turn", "two-images", "text-only"):
            tensors[f"labelled.{name}"] = run.labelled(model, name)
        check_losses(run, model, results)
        check_language_model(run, model)
        features(run, model, tensors)
        old_layout(run, model, old_model, tensors, results)
        results["greedy"] = {n: run.greedy(model, n) for n in ("caption", "single", "multi-turn", "two-images", "text-only", "chinese")}
        for name, made in results["greedy"].items():
            assert run.generate(model, name) == made, name
        assert run.generate(model, "caption", without_ids=True) == results["greedy"]["caption"]
        # The sequence of tokens must depend on the picture and on the prompt.
        assert len({tuple(v) for v in results["greedy"].values()}) == len(results["greedy"])
        results["float16KeepsFloat32"] = kept_in_float32(out)
    if run.t5:
        results["relativeBuckets"] = relative_buckets()

    train(run, out, model, tensors, results)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, out / "expected.safetensors")
    write_json(out / "expected.json", results)
    for path in out.rglob("*"):
        if path.is_file():
            assert str(FIXTURES).encode() not in path.read_bytes(), f"{path} holds a local path"
    print({n: run.tokens.new.decode(t) for n, t in results["greedy"].items()}, [round(s["loss"], 3) for s in results["loraCurve"]["steps"]])
    for path in sorted(out.iterdir()):
        print(f"{sum(p.stat().st_size for p in [path, *path.rglob('*')] if p.is_file()) / 1e3:8.0f} kB  {path.name}")


def check_losses(run: Runner, model, results: dict) -> None:
    """transformers' own loss, and the loss in train() with every dropout at 0."""
    config = copy.deepcopy(model.config)
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.0
    if run.t5:
        config.text_config.dropout_rate = 0.0
    else:
        config.text_config.dropout = 0.0
    config._attn_implementation = "eager"
    training = Blip2ForConditionalGeneration(config).float()  # the sparse text_config says float16, and would be heeded
    if run.t5:
        training.language_model.lm_head.weight = torch.nn.Parameter(training.language_model.lm_head.weight.detach().clone())
    training.load_state_dict(model.state_dict())
    training.train()
    for name in ("caption", "single", "multi-turn", "chinese"):
        inputs = {"pixel_values": run.pictures(name), "input_ids": torch.tensor([run.cases[name]["default"]["inputIds"]]),
                  "labels": torch.tensor([run.labels(name)])}
        want = results["losses"][name]["loss"]
        for m in (model, training):
            assert abs(float(m(**inputs).loss) - want) < 1e-5, name
    model.train()  # the sparse config's own dropouts are live
    torch.manual_seed(0)
    assert abs(float(model(**inputs).loss) - want) > 1e-4
    model.eval()


def check_language_model(run: Runner, model) -> None:
    """The language model inside is the plain OPT or T5 of its sparse text_config."""
    kind = "T5ForConditionalGeneration" if run.t5 else "OPTForCausalLM"
    config = type(model.config.text_config)(**model.config.text_config.to_dict() | {"tie_word_embeddings": not run.t5})
    config._attn_implementation = "eager"
    plain = getattr(transformers, kind)(config).float().eval()
    if run.t5:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.load_state_dict(model.language_model.state_dict())
    ids = torch.tensor([run.cases["text-only"]["default"]["inputIds"]])
    assert torch.equal(plain(input_ids=ids, **run.decoder("text-only")).logits[0], run.forward(model, "text-only"))


def features(run: Runner, model, tensors: dict) -> None:
    """Vision [17, 24], each Q-Former layer and its output [8, 32], projection [8, text hidden]; T5: the encoder's output."""
    for picture in ("landscape.png", "portrait.png"):
        found, layers = model.get_image_features(pixel_values=run.pixels[picture][None]), []
        hooks = [layer.register_forward_hook(lambda m, i, o: layers.append(o[0])) for layer in model.qformer.encoder.layer]
        model.get_image_features(pixel_values=run.pixels[picture][None])
        for hook in hooks:
            hook.remove()
        name = picture.removesuffix(".png")
        tensors[f"vision.{name}"] = found.vision_outputs.last_hidden_state[0]
        for i, layer in enumerate(layers):
            tensors[f"qformer.{i}.{name}"] = layer
        assert torch.equal(layers[-1], found.qformer_outputs.last_hidden_state[0])
        tensors[f"projection.{name}"] = found.pooler_output[0]
    assert [layer.has_cross_attention for layer in model.qformer.encoder.layer] == [True, False, True]
    if run.t5:
        for name in ("single", "text-only"):
            inputs = run.old_inputs(model, name, run.cases[name]["old"]["inputIds"])
            tensors[f"encoder.{name}"] = model.language_model.encoder(**inputs).last_hidden_state[0]


def old_layout(run: Runner, model, old_model, tensors: dict, results: dict) -> None:
    """Features in front of the ids: the new layout's numbers, but that OPT's old table lacks the last rows."""
    results["oldLosses"] = {}
    rows = run.tokens.old_vocab
    for name, case in run.cases.items():
        logits = run.old_forward(old_model, name, case["old"]["inputIds"], **run.decoder(name))
        assert torch.allclose(logits, run.forward(model, name)[:, :rows], atol=1e-5, rtol=0), name
        logits = logits[run.rows(name)]
        results["oldLosses"][name] = float(F.cross_entropy(logits, torch.tensor(run.targets(name))))
        assert run.form.name == "opt" or abs(results["oldLosses"][name] - results["losses"][name]["loss"]) < 1e-5
        if name in ("single", "two-images"):
            tensors[f"old.labelled.{name}"] = logits
    results["oldGreedy"] = {}
    for name in ("caption", "single"):
        image_ids = QUERY_TOKENS * len(run.cases[name]["images"])
        step = lambda ids, decoder: run.old_forward(old_model, name, ids[image_ids:], **({"decoder_input_ids": torch.tensor([decoder])} if run.t5 else {}))
        results["oldGreedy"][name] = run.greedy(old_model, name, step)
        assert results["oldGreedy"][name] == run.greedy(model, name)
        # The language model's own generate, as the old Blip2 called it: with embeddings alone it returns the new tokens only.
        made = old_model.language_model.generate(
            **run.old_inputs(old_model, name, run.cases[name]["old"]["promptIds"]), max_new_tokens=24, do_sample=False)[0].tolist()
        made = made[1:] if run.t5 else made
        assert (made[:-1] if made[-1:] == [run.tokens.end] else made) == results["oldGreedy"][name], name


def kept_in_float32(out: Path) -> list[str]:
    """Parameters that stay float32 when transformers loads the model in float16; in bfloat16 none does."""
    load = lambda dtype: Blip2ForConditionalGeneration.from_pretrained(out / "model-new", dtype=dtype, attn_implementation="eager")
    names = sorted(n for n, p in load(torch.float16).named_parameters() if p.dtype == torch.float32)
    assert all(p.dtype == torch.bfloat16 for p in load(torch.bfloat16).parameters())
    return names


def relative_buckets() -> dict:
    """Bucket of every key position − query position from −200 to 200: T5's own sizes and the model's."""
    positions = torch.arange(-200, 201)
    return {"from": -200} | {
        f"{'encoder' if both else 'decoder'}.{buckets}.{distance}": T5Attention._relative_position_bucket(positions, both, buckets, distance).tolist()
        for buckets, distance in ((32, 128), (12, 24)) for both in (True, False)}


# ---------------------------------------------------------------- adapters and training


def lora_model(model, seed: int, **options):
    """r 4, alpha 8; B is not zero, so that A has gradients. No task_type, as PEFT's own BLIP-2 examples have it."""
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_((0.05 * torch.randn(p.shape, generator=generator)).to(torch.bfloat16))
            elif "lora_A" in name:
                p.copy_((torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1])).to(torch.bfloat16))
    return peft.eval()


def save_adapter(peft, folder: Path, extra: dict | None = None) -> dict:
    """In bfloat16; a set of names is written in order, so that the file is the same in every run."""
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = None
    write_json(folder / "adapter_config.json", config)
    file = folder / "adapter_model.safetensors"
    stored = {k: v.to(torch.bfloat16) for k, v in (load_file(file) | (extra or {})).items()}
    save_file(stored, file, {"format": "pt"})
    return {k: v.float() for k, v in stored.items()}


def groups_of(model) -> tuple[list[dict], list[str]]:
    """As transformers' Trainer groups what is trained: by the class LayerNorm and by name. → groups, names that do not decay"""
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if (n in decayed) == decay], "weight_decay": 0.1 * decay} for decay in (True, False)]
    return [g for g in groups if g["params"]], sorted(n for n, _ in trained if n not in decayed)


def backward(run: Runner, model, names: list[str], divisor: int | None = None) -> float:
    total, count = run.losses(model, names)
    (total / (divisor or count)).backward()
    return float(total.detach() / (divisor or count))


def curve(run: Runner, model, learning_rate: float, batches: list[list[list[str]]], warmup: int | None = None) -> list[dict]:
    """AdamW; a step's batch is a list of micro-batches, its loss the mean over all their trained tokens. `warmup`: with a cosine schedule."""
    groups, _ = groups_of(model)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
    scheduler = get_scheduler("constant" if warmup is None else "cosine", optimizer, num_warmup_steps=warmup or 0, num_training_steps=len(batches))
    params, steps = [p for g in groups for p in g["params"]], []
    for micros in batches:
        rows = [n for micro in micros for n in micro]
        count = sum(len(run.targets(n)) for n in rows)
        loss = sum(backward(run, model, micro, count) for micro in micros)
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        steps.append({"rows": rows, "loss": loss, "gradNorm": norm, "learningRate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert steps[-1]["loss"] < next(s["loss"] for s in steps if s["rows"] == steps[-1]["rows"])
    return steps


ALIGNER = ("qformer.", "language_projection.", "query_tokens")


def train(run: Runner, out: Path, model, tensors: dict, results: dict) -> None:
    form = run.form
    short = lambda name: re.sub(r"\.(default|modules_to_save)(?=\.|$)", "", name.replace("base_model.model.", ""))
    trained = lambda m: [(short(n), p) for n, p in m.named_parameters() if p.requires_grad]
    batch = ["single", "multi-turn", "text-only"]
    results["packed"] = {"rows": ["single", "text-only"]}  # two separate passes: `labelled.<row>`
    shared = {"weightDecay": 0.1, "maxGradNorm": 1.0}

    # ------------------------------------------------------------ LoRA, PEFT's own targets
    peft = lora_model(model, 5)
    stored = save_adapter(peft, out / "adapter-peft")
    suffixes = {k.removesuffix(".weight").rsplit(".", 2)[-2] for k in stored}
    assert suffixes == set(form.lora_all) and all(k.startswith("base_model.model.language_model.") for k in stored), suffixes
    assert form.name == "opt" or {k.split(".")[8] for k in stored} == {"SelfAttention", "EncDecAttention"}
    with torch.no_grad():
        for name in ("single", "text-only"):
            tensors[f"adapter.labelled.{name}"] = run.labelled(peft, name)
        results["adapterGreedy"] = {n: run.greedy(peft, n) for n in ("caption", "single", "text-only", "chinese")}
        for name, made in results["adapterGreedy"].items():
            assert run.generate(peft, name) == made, name
        assert results["adapterGreedy"]["single"] != results["greedy"]["single"]
        reloaded = PeftModel.from_pretrained(copy.deepcopy(model), str(out / "adapter-peft")).eval()
        assert torch.equal(run.forward(reloaded, "single"), run.forward(peft, "single"))
    results["loraGradients"] = {"rows": batch, "loss": backward(run, peft, batch)}
    for name, p in trained(peft):
        tensors["grad." + name] = p.grad.clone()
    peft.zero_grad()

    # 20 steps: micro-batches of two rows, accumulation 2.
    order = ["single", "multi-turn", "text-only", "chinese", "system", "caption", "two-images", "emoji"]
    rows = [[order[(step * 4 + i) % len(order)] for i in range(4)] for step in range(20)]
    steps = curve(run, peft, 1e-3, [[r[:2], r[2:]] for r in rows], warmup=3)
    results["loraCurve"] = {"warmupSteps": 3, "totalSteps": 20, "learningRate": 1e-3, **shared, "steps": steps}
    for name, p in trained(peft):
        if any(f"{module}.lora" in name for module in form.final):
            tensors["final." + name] = p.detach().clone()
    assert sum(k.startswith("final.") for k in tensors) == 4

    # ------------------------------------------------------------ merge, from the stored adapter
    merged = PeftModel.from_pretrained(copy.deepcopy(model), str(out / "adapter-peft")).merge_and_unload()
    changed = {k: v for k, v in merged.state_dict().items() if not torch.equal(v, model.state_dict()[k])}
    assert {f"base_model.model.{k.removesuffix('.weight')}.lora_A.weight" for k in changed} <= set(stored) and len(changed) == len(stored) // 2
    results["mergedNorms"] = {k: float(v.norm()) for k, v in sorted(changed.items())}
    tensors[f"merged.{form.merged}.weight"] = merged.state_dict()[form.merged + ".weight"]
    with torch.no_grad():
        assert torch.allclose(run.labelled(merged, "single"), tensors["adapter.labelled.single"], atol=1e-4, rtol=0)
        assert run.greedy(merged, "single") == results["adapterGreedy"]["single"]
    a, b = (stored[f"base_model.model.{form.merged}.lora_{x}.weight"] for x in "AB")
    tensors[f"merged16.{form.merged}.weight"] = (model.state_dict()[form.merged + ".weight"] + (8 / 4) * (b @ a)).to(torch.bfloat16)

    # ------------------------------------------------------------ LoRA everywhere
    peft = lora_model(model, 4, target_modules=[*form.lora_all, "query", "value", "language_projection", "qkv"])
    stored = save_adapter(peft, out / "adapter-all")
    for part in ("vision_model", "qformer", "language_projection", "language_model"):
        assert any(k.startswith(f"base_model.model.{part}") for k in stored), part
    with torch.no_grad():
        tensors["all.labelled.two-images"] = run.labelled(peft, "two-images")
    results["allGradients"] = {"rows": ["two-images", "caption"], "loss": backward(run, peft, ["two-images", "caption"]), "norms": {}}
    for name, p in trained(peft):
        results["allGradients"]["norms"][name] = float(p.grad.norm())
        if re.search(r"vision_model\.encoder\.layers\.0\.|qformer\.encoder\.layer\.[01]\.|language_projection", name):
            tensors["allGrad." + name] = p.grad.clone()

    # ------------------------------------------------------------ Q-Former, projection and query tokens: BLIP-2's own second stage
    stage = copy.deepcopy(model)
    for name, p in stage.named_parameters():
        p.requires_grad = name.startswith(ALIGNER)
    results["alignerGradients"] = {"rows": batch + ["caption"], "loss": backward(run, stage, batch + ["caption"]), "norms": {}}
    for name, p in trained(stage):
        results["alignerGradients"]["norms"][name] = float(p.grad.norm())
        if name in SHARED_GRADIENTS:
            tensors["alignerGrad." + name] = p.grad.clone()
    stage.zero_grad()
    pairs = [[["single", "caption"]], [["multi-turn", "chinese"]]] * 5
    results["alignerCurve"] = {"learningRate": 1e-3, **shared, "steps": curve(run, stage, 1e-3, pairs), "undecayed": groups_of(stage)[1]}
    tensors["alignerFinal.query_tokens"] = stage.query_tokens.detach().clone()

    # ------------------------------------------------------------ the same beside LoRA (freeze_aligner: false)
    peft = lora_model(model, 5, modules_to_save=["qformer", "language_projection"])
    query_tokens = peft.get_base_model().query_tokens
    query_tokens.requires_grad = True  # a bare parameter: PEFT's modules_to_save cannot name it
    names = [n for n, _ in trained(peft)]
    assert sum(n.startswith(ALIGNER) for n in names) == len(results["alignerGradients"]["norms"]) and any("lora_A" in n for n in names)
    results["jointCurve"] = {"learningRate": 1e-3, **shared, "steps": curve(run, peft, 1e-3, pairs)}
    stored = save_adapter(peft, out / "adapter-aligner", {"base_model.model.query_tokens": query_tokens.detach()})
    reloaded = PeftModel.from_pretrained(copy.deepcopy(model), str(out / "adapter-aligner")).eval()
    assert torch.equal(reloaded.get_base_model().query_tokens, stored["base_model.model.query_tokens"])
    assert not torch.equal(reloaded.get_base_model().query_tokens, model.query_tokens)
    key = "base_model.model.qformer.encoder.layer.0.attention.attention.key.weight"
    assert torch.equal(reloaded.get_base_model().qformer.modules_to_save["default"].encoder.layer[0].attention.attention.key.weight, stored[key])
    with torch.no_grad():
        tensors["aligner.labelled.single"] = run.labelled(reloaded, "single")
        assert torch.allclose(tensors["aligner.labelled.single"], run.labelled(peft, "single"), atol=0.2)
        joined = reloaded.merge_and_unload()
        assert torch.allclose(run.labelled(joined, "single"), tensors["aligner.labelled.single"], atol=1e-4, rtol=0)
        assert torch.equal(joined.query_tokens, stored["base_model.model.query_tokens"])

    # ------------------------------------------------------------ full training
    full = copy.deepcopy(model)
    results["fullGradients"] = {"rows": batch, "loss": backward(run, full, batch), "norms": {}}
    for name, p in full.named_parameters():
        results["fullGradients"]["norms"][name] = float(p.grad.norm())
        if name in form.full_gradients:
            tensors["full." + name] = p.grad.clone()
    missing = set(form.full_gradients) - {k.removeprefix("full.") for k in tensors}
    assert not missing, missing
    full.zero_grad()
    results["fullCurve"] = {"rows": batch, "learningRate": 1e-4, **shared, "steps": curve(run, full, 1e-4, [[batch]] * 5), "undecayed": groups_of(full)[1]}


def replace_folder(new: Path, final: Path) -> None:
    """The old folder stays until the new one is whole."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(FORMS)
    unknown = set(wanted) - set(FORMS)
    if unknown:
        sys.exit(f"no form {', '.join(sorted(unknown))}; there are {', '.join(FORMS)}")
    scratch = FIXTURES / ".new-blip2"
    shutil.rmtree(scratch, ignore_errors=True)
    for name in wanted:
        folder = FORMS[name].folder
        (scratch / folder).mkdir(parents=True)
        main(FORMS[name], scratch / folder)
        replace_folder(scratch / folder, FIXTURES / folder)
    shutil.rmtree(scratch)
