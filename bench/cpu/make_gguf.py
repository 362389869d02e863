"""A GGUF file of Qwen2-1.5B's shape with random weights, for bench/cpu/llama_cpp.mjs.

    pip install gguf numpy; python3 bench/cpu/make_gguf.py bf16|q8_0|q4_0 model.gguf
"""

import sys

import gguf
import numpy as np

KIND, PATH = sys.argv[1:]
TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
TYPE, FILE_TYPE = TYPES[KIND]
VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD = 151936, 1536, 8960, 28, 12, 2, 128

writer = gguf.GGUFWriter(PATH, "qwen2")
writer.add_name("random Qwen2-1.5B")
writer.add_context_length(32768)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(LAYERS)
writer.add_feed_forward_length(MLP)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KV_HEADS)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(1e6)
writer.add_file_type(FILE_TYPE)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list([f"t{i}" for i in range(VOCAB)])
writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
writer.add_token_merges(["t 1", "t 2"])
writer.add_eos_token_id(VOCAB - 1)
writer.add_bos_token_id(VOCAB - 2)

random = np.random.default_rng(0)


def matrix(name, rows, columns):
    values = (0.02 * random.standard_normal((rows, columns), dtype=np.float32)).astype(np.float32)
    writer.add_tensor(name, gguf.quants.quantize(values, TYPE), raw_dtype=TYPE)


def vector(name, size, mean):
    writer.add_tensor(name, (mean + 0.02 * random.standard_normal(size)).astype(np.float32))


# The head is the table of embeddings.
matrix("token_embd.weight", VOCAB, HIDDEN)
vector("output_norm.weight", HIDDEN, 1)
for layer in range(LAYERS):
    block = f"blk.{layer}."
    for norm in ("attn_norm", "ffn_norm"):
        vector(f"{block}{norm}.weight", HIDDEN, 1)
    for name, rows in (("attn_q", HEADS * HEAD), ("attn_k", KV_HEADS * HEAD), ("attn_v", KV_HEADS * HEAD)):
        matrix(f"{block}{name}.weight", rows, HIDDEN)
        vector(f"{block}{name}.bias", rows, 0)
    matrix(f"{block}attn_output.weight", HIDDEN, HEADS * HEAD)
    matrix(f"{block}ffn_gate.weight", MLP, HIDDEN)
    matrix(f"{block}ffn_up.weight", MLP, HIDDEN)
    matrix(f"{block}ffn_down.weight", HIDDEN, MLP)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
