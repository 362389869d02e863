"""Names and shapes of the weights of models that transformers does not have, from their config.json: as their published files name them."""

Shapes = dict[str, tuple[int, ...]]


def linear(shapes: Shapes, name: str, out: int, into: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (out, into)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def layer_norm(shapes: Shapes, name: str, size: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)


def attention_pool(shapes: Shapes, name: str, queries: int, size: int, vision: int) -> None:
    """The resampler of both: learnt queries that attend to the tower's output."""
    shapes[f"{name}.query"] = (queries, size)
    if size != vision:
        shapes[f"{name}.kv_proj.weight"] = (size, vision)
    shapes[f"{name}.attn.in_proj_weight"] = (3 * size, size)
    shapes[f"{name}.attn.in_proj_bias"] = (3 * size,)
    linear(shapes, f"{name}.attn.out_proj", size, size)
    layer_norm(shapes, f"{name}.ln_q", size)
    layer_norm(shapes, f"{name}.ln_kv", size)


def qwen_vl(config: dict) -> Shapes:
    """Qwen-VL-Chat (modeling_qwen.py, visual.py)."""
    hidden, half = config["hidden_size"], config["intermediate_size"] // 2
    shapes: Shapes = {"transformer.wte.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        shapes[f"{layer}.ln_1.weight"] = shapes[f"{layer}.ln_2.weight"] = (hidden,)
        linear(shapes, f"{layer}.attn.c_attn", 3 * hidden, hidden)
        linear(shapes, f"{layer}.attn.c_proj", hidden, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.w1", half, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.w2", half, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.c_proj", hidden, half, bias=False)
    shapes["transformer.ln_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)

    visual = config["visual"]
    width, out = visual["width"], visual["output_dim"]
    tower = "transformer.visual"
    shapes[f"{tower}.conv1.weight"] = (width, 3, visual["patch_size"], visual["patch_size"])
    shapes[f"{tower}.positional_embedding"] = (256, width)
    layer_norm(shapes, f"{tower}.ln_pre", width)
    for i in range(visual["layers"]):
        block = f"{tower}.transformer.resblocks.{i}"
        layer_norm(shapes, f"{block}.ln_1", width)
        layer_norm(shapes, f"{block}.ln_2", width)
        linear(shapes, f"{block}.attn.in_proj", 3 * width, width)
        linear(shapes, f"{block}.attn.out_proj", width, width)
        linear(shapes, f"{block}.mlp.c_fc", int(width * visual["mlp_ratio"]), width)
        linear(shapes, f"{block}.mlp.c_proj", width, int(width * visual["mlp_ratio"]))
    attention_pool(shapes, f"{tower}.attn_pool", visual["n_queries"], out, width)
    shapes[f"{tower}.attn_pool.pos_embed"] = (visual["n_queries"], out)
    layer_norm(shapes, f"{tower}.ln_post", out)
    shapes[f"{tower}.proj"] = (out, out)
    return shapes


def minicpm_v(config: dict) -> Shapes:
    """MiniCPM-V 2.6 (modeling_minicpmv.py, modeling_navit_siglip.py, resampler.py; the language model is Qwen2)."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"llm.model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"llm.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(shapes, f"{layer}.self_attn.q_proj", hidden, hidden)
        linear(shapes, f"{layer}.self_attn.k_proj", key_value, hidden)
        linear(shapes, f"{layer}.self_attn.v_proj", key_value, hidden)
        linear(shapes, f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.gate_proj", wide, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.up_proj", wide, hidden, bias=False)
        linear(shapes, f"{layer}.mlp.down_proj", hidden, wide, bias=False)
    shapes["llm.model.norm.weight"] = (hidden,)
    shapes["llm.lm_head.weight"] = (config["vocab_size"], hidden)

    vision = config["vision_config"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    shapes["vpm.embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    shapes["vpm.embeddings.patch_embedding.bias"] = (width,)
    shapes["vpm.embeddings.position_embedding.weight"] = ((vision["image_size"] // patch) ** 2, width)
    for i in range(vision["num_hidden_layers"]):
        layer = f"vpm.encoder.layers.{i}"
        layer_norm(shapes, f"{layer}.layer_norm1", width)
        layer_norm(shapes, f"{layer}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(shapes, f"{layer}.self_attn.{name}", width, width)
        linear(shapes, f"{layer}.mlp.fc1", vision["intermediate_size"], width)
        linear(shapes, f"{layer}.mlp.fc2", width, vision["intermediate_size"])
    layer_norm(shapes, "vpm.post_layernorm", width)
    attention_pool(shapes, "resampler", config["query_num"], hidden, width)
    layer_norm(shapes, "resampler.ln_post", hidden)
    shapes["resampler.proj"] = (hidden, hidden)
    return shapes


# By model_type
ORIGINAL_SHAPES = {"qwen": qwen_vl, "minicpmv": minicpm_v}
