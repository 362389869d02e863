/** Writes the embedded model's folder with random weights: a LLaVA-1.5 in small. Run by train-base.mjs. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { random } from './pictures.mjs';
import { corpus } from './questions.mjs';
import { trainTokenizer } from './tokenizer.mjs';

const VISION = { hidden: 128, intermediate: 512, layers: 6, heads: 4, image: 96, patch: 12 };
const TEXT = { hidden: 192, intermediate: 512, layers: 4, heads: 4, positions: 512 };

// llava-hf/llava-1.5-7b-hf's template in meaning: a message's images first, then its texts.
const CHAT_TEMPLATE =
  "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}" +
  "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}" +
  "{% if message['role'] != 'assistant' %}" +
  "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}" +
  "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}" +
  "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

export async function initModel(dir, seed) {
  await mkdir(dir, { recursive: true });
  const tokenizer = trainTokenizer(corpus(), 260);
  const vocabulary = Math.ceil(tokenizer.size / 16) * 16;
  const json = (name, value) => writeFile(join(dir, name), `${JSON.stringify(value, null, 1)}\n`);
  await json('tokenizer.json', tokenizer.json);
  await json('tokenizer_config.json', {
    add_bos_token: true,
    add_eos_token: false,
    bos_token: '<s>',
    eos_token: '</s>',
    unk_token: '<unk>',
    pad_token: '<pad>',
    image_token: '<image>',
    clean_up_tokenization_spaces: false,
    legacy: false,
    model_max_length: TEXT.positions,
    processor_class: 'LlavaProcessor',
    tokenizer_class: 'LlamaTokenizer',
  });
  await json('special_tokens_map.json', {
    bos_token: '<s>',
    eos_token: '</s>',
    unk_token: '<unk>',
    pad_token: '<pad>',
  });
  await json('chat_template.json', { chat_template: CHAT_TEMPLATE });
  await json('generation_config.json', { bos_token_id: 1, eos_token_id: 2, pad_token_id: tokenizer.pad });
  await json('preprocessor_config.json', {
    crop_size: { height: VISION.image, width: VISION.image },
    do_center_crop: true,
    do_convert_rgb: true,
    do_normalize: true,
    do_rescale: true,
    do_resize: true,
    image_mean: [0.48145466, 0.4578275, 0.40821073],
    image_processor_type: 'CLIPImageProcessor',
    image_std: [0.26862954, 0.26130258, 0.27577711],
    processor_class: 'LlavaProcessor',
    resample: 3,
    rescale_factor: 0.00392156862745098,
    size: { shortest_edge: VISION.image },
  });
  await json('processor_config.json', {
    image_token: '<image>',
    num_additional_image_tokens: 1,
    patch_size: VISION.patch,
    processor_class: 'LlavaProcessor',
    vision_feature_select_strategy: 'default',
  });
  await json('config.json', {
    architectures: ['LlavaForConditionalGeneration'],
    ignore_index: -100,
    image_seq_length: (VISION.image / VISION.patch) ** 2,
    image_token_index: tokenizer.image,
    model_type: 'llava',
    pad_token_id: tokenizer.pad,
    projector_hidden_act: 'gelu',
    text_config: {
      architectures: ['LlamaForCausalLM'],
      hidden_size: TEXT.hidden,
      intermediate_size: TEXT.intermediate,
      max_position_embeddings: TEXT.positions,
      model_type: 'llama',
      num_attention_heads: TEXT.heads,
      num_hidden_layers: TEXT.layers,
      rms_norm_eps: 1e-5,
      torch_dtype: 'bfloat16',
      vocab_size: vocabulary,
    },
    tie_word_embeddings: false,
    torch_dtype: 'bfloat16',
    vision_config: {
      hidden_size: VISION.hidden,
      image_size: VISION.image,
      intermediate_size: VISION.intermediate,
      model_type: 'clip_vision_model',
      num_attention_heads: VISION.heads,
      num_hidden_layers: VISION.layers,
      patch_size: VISION.patch,
      projection_dim: VISION.hidden,
    },
    vision_feature_layer: -2,
    vision_feature_select_strategy: 'default',
  });
  await writeFile(join(dir, 'model.safetensors'), safetensors(shapes(vocabulary), random(seed)));
}

/** [name, shape, standard deviation or constant] of every tensor, in the hub's spelling. */
function* shapes(vocabulary) {
  const { hidden: v, intermediate: vi } = VISION;
  const { hidden: t, intermediate: ti } = TEXT;
  const std = 0.04; // wider than the usual 0.02: the model is narrow
  const linear = function* (name, out, inn, bias, scale = 1) {
    yield [`${name}.weight`, [out, inn], std * scale];
    if (bias) yield [`${name}.bias`, [out], 0];
  };
  const norm = function* (name, size, bias) {
    yield [`${name}.weight`, [size], 'one'];
    if (bias) yield [`${name}.bias`, [size], 0];
  };
  const tower = 'vision_tower.vision_model';
  yield [`${tower}.embeddings.class_embedding`, [v], std];
  yield [`${tower}.embeddings.patch_embedding.weight`, [v, 3, VISION.patch, VISION.patch], std];
  yield [`${tower}.embeddings.position_embedding.weight`, [(VISION.image / VISION.patch) ** 2 + 1, v], std];
  yield* norm(`${tower}.pre_layrnorm`, v, true);
  for (let i = 0; i < VISION.layers; i++) {
    const layer = `${tower}.encoder.layers.${i}`;
    yield* norm(`${layer}.layer_norm1`, v, true);
    for (const name of ['q_proj', 'k_proj', 'v_proj']) yield* linear(`${layer}.self_attn.${name}`, v, v, true);
    yield* linear(`${layer}.self_attn.out_proj`, v, v, true, (2 * VISION.layers) ** -0.5);
    yield* norm(`${layer}.layer_norm2`, v, true);
    yield* linear(`${layer}.mlp.fc1`, vi, v, true);
    yield* linear(`${layer}.mlp.fc2`, v, vi, true, (2 * VISION.layers) ** -0.5);
  }
  yield* norm(`${tower}.post_layernorm`, v, true);
  yield* linear('multi_modal_projector.linear_1', t, v, true);
  yield* linear('multi_modal_projector.linear_2', t, t, true);
  yield ['language_model.model.embed_tokens.weight', [vocabulary, t], std];
  for (let i = 0; i < TEXT.layers; i++) {
    const layer = `language_model.model.layers.${i}`;
    yield* norm(`${layer}.input_layernorm`, t, false);
    for (const name of ['q_proj', 'k_proj', 'v_proj']) yield* linear(`${layer}.self_attn.${name}`, t, t, false);
    yield* linear(`${layer}.self_attn.o_proj`, t, t, false, (2 * TEXT.layers) ** -0.5);
    yield* norm(`${layer}.post_attention_layernorm`, t, false);
    yield* linear(`${layer}.mlp.gate_proj`, ti, t, false);
    yield* linear(`${layer}.mlp.up_proj`, ti, t, false);
    yield* linear(`${layer}.mlp.down_proj`, t, ti, false, (2 * TEXT.layers) ** -0.5);
  }
  yield* norm('language_model.model.norm', t, false);
  yield* linear('language_model.lm_head', vocabulary, t, false);
}

/** A bfloat16 safetensors file of normally distributed values. */
function safetensors(tensors, rng) {
  const header = { __metadata__: { format: 'pt' } };
  const parts = [];
  let offset = 0;
  for (const [name, shape, spread] of tensors) {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    if (spread === 'one') values.fill(1);
    else if (spread > 0)
      for (let i = 0; i < values.length; i++)
        values[i] = spread * Math.sqrt(-2 * Math.log(1 - rng())) * Math.cos(2 * Math.PI * rng());
    const bits = new Uint32Array(values.buffer);
    const half = Uint16Array.from(bits, (word) => (word + 0x7fff + ((word >>> 16) & 1)) >>> 16);
    parts.push(Buffer.from(half.buffer));
    header[name] = { dtype: 'BF16', shape, data_offsets: [offset, offset + half.byteLength] };
    offset += half.byteLength;
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Buffer.concat([text, Buffer.alloc((8 - (text.length % 8)) % 8, ' ')]);
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(padded.length));
  return Buffer.concat([size, padded, ...parts]);
}
