/**
 * How much memory a training run takes, by part, from the sizes in config.json. The activations follow from what native code keeps for the backward
 * pass (native/core/nn/checkpoint.h); they are those of the largest micro-batch.
 */
import type { TrainConfig } from '../config/index.js';
import type { ModelDescription, Recompute } from '../native/binding.js';

export interface MemoryEstimate {
  /** Bytes of each part. */
  weights: number;
  /** What is trained, in every copy: float32 master and gradient, and the copies that the network computes with. */
  adapters: number;
  optimizer: number;
  activations: number;
  /** The loss, the layer that is computed, a dequantised matrix, the vision tower at work. */
  workspace: number;
  total: number;
}

export interface MemoryOptions {
  quantization: 'none' | 'int8' | 'nf4';
  doubleQuantization: boolean;
  /** Bytes of a number in the arithmetic: 2 or 4. */
  computeBytes: number;
  recompute: Recompute;
  /** The decoder's layers run without an autograd graph of their own (native/core/language/frozen_layer.h). */
  writtenOut: boolean;
  /** The norms of the decoder's layers are trained. */
  trainedNorms: boolean;
  /** Bytes of a number in the adapters' products: 2 or 4. */
  adapterBytes: number;
  /** Of the largest micro-batch, image tokens counted. */
  tokens: number;
  /** Of these, those with a label. */
  labelled: number;
  /** The CPU has no library workspace, and dequantises in smaller parts. */
  cpu: boolean;
}

/** What a run trains beside the model's weights, by element. */
export interface TrainedElements {
  /** Pairs and magnitudes. */
  adapters: number;
  /** The model's own parameters that are trained. */
  parameters: number;
  /** Of the language model's pairs, added up. */
  ranks: number;
}

type Config = Pick<
  TrainConfig,
  'sft_type' | 'lora_rank' | 'optim' | 'freeze_vit' | 'freeze_aligner' | 'freeze_llm' | 'target_modules'
>;

/** Counts what would be trained, as native code selects it. Regular expressions are taken as JavaScript's. */
export function trainedElements(config: Config, model: ModelDescription): TrainedElements {
  const frozen = { vision: config.freeze_vit, projector: config.freeze_aligner, language: config.freeze_llm };
  const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
  if (config.sft_type === 'full') {
    const trained = model.parameters.filter(({ part }) => !frozen[part]);
    return { adapters: 0, parameters: sum(trained.map(({ numel }) => numel)), ranks: 0 };
  }
  const whole = config.sft_type === 'lora_llm';
  const { target_modules: targets } = config;
  const quantizable = new Set(model.parameters.filter((one) => one.quantizable).map(({ name }) => name));
  const matches = (path: string, part: 'vision' | 'projector' | 'language') => {
    // of the language model only the head is never quantised, and never gets a pair
    const isHead = part === 'language' && !quantizable.has(`${path}.weight`);
    if (isHead || (whole ? part !== 'language' : frozen[part])) return false;
    if (targets === 'all-linear') return true;
    if (typeof targets === 'string') return new RegExp(`^(?:${targets})$`).test(path);
    return targets.some((name) => name === 'all-linear' || path === name || path.endsWith(`.${name}`));
  };
  const chosen = model.linears.filter(({ path, part }) => matches(path, part));
  return {
    adapters: sum(chosen.map((linear) => config.lora_rank * (linear.in + linear.out))),
    parameters: whole ? sum(model.parameters.filter(({ part }) => part !== 'language').map(({ numel }) => numel)) : 0,
    ranks: config.lora_rank * chosen.filter(({ part }) => part === 'language').length,
  };
}

/** Bytes a trained element takes in the optimiser. */
function optimizerBytes(optim: TrainConfig['optim']): number {
  if (optim.startsWith('paged_')) return 0; // in host memory
  if (optim.includes('8bit')) return 2 + 8 / 256;
  return optim === 'sgd' || optim === 'adafactor' ? 0.02 : 8;
}

/** Bytes of a token: what one layer keeps for its backward, and what that takes besides while it runs. */
function layerMemory(decoder: ModelDescription['decoder'], options: MemoryOptions): { kept: number; atWork: number } {
  const { hiddenSize: h, intermediateSize: i, heads, keyValueHeads, headDim, qkNorm, rmsNorm } = decoder;
  const { computeBytes, recompute, cpu } = options;
  const q = heads * headDim;
  const kv = 2 * keyValueHeads * headDim;
  // attention: q, k, v, its output; the projections' outputs too where norms stand between
  const attention = 2 * q + kv + (qkNorm ? q + kv / 2 : 0);
  // An RMS norm whose weight is trained keeps its input divided by its length as well, also where the norm is made
  // again (native/core/nn/norm.cpp).
  const unit = options.trainedNorms && rmsNorm ? h : 0;
  const forms = {
    // native/core/language/frozen_layer.cpp: x, the sum after attention, gate|up
    writtenOut: {
      kept: { none: 2 * h + attention + 2 * i, cheap: 2 * h + attention + 2 * i, mlp: 2 * h + attention, layer: h },
      again: { none: 0, cheap: 0, mlp: 2 * i, layer: h + attention + 2 * i },
      // The gradient of the MLP's product, which the gate takes in place; on the CPU with three temporaries. After
      // that gate|up are gone, and the gradients of the sum, of the normed sum, of attention's output and of q, k, v
      // (there, or a norm's temporaries) are made, besides them FlashAttention's float32 sums for q, and k and v by
      // query heads.
      gradients: cpu
        ? Math.max(4 * i, Math.max(5 * h, 2 * h + 2 * q + kv) - 2 * i)
        : Math.max(i, 2 * h + 2 * q + kv + (q * 4) / computeBytes + (keyValueHeads < heads ? 2 * q : 0) - 2 * i),
    },
    // native/core/language/decoder.cpp: x, its norm, the sum after attention, its norm, gate, up and their product
    autograd: {
      kept: {
        none: 4 * h + attention + 3 * i + 2 * unit,
        cheap: 2 * h + attention + 2 * i + 2 * unit,
        mlp: 2 * h + attention + unit,
        layer: h,
      },
      // with what the part that is run again gives
      again: { none: 0, cheap: 0, mlp: 2 * h + 3 * i + unit, layer: 3 * h + attention + 3 * i + 2 * unit },
      // of gate, up and their product, which is gone by then where it was kept
      gradients: recompute === 'cheap' ? 3 * i : 2 * i,
    },
  };
  const form = forms[options.writtenOut ? 'writtenOut' : 'autograd'];
  // float32: attention's sums, one a head, and the norms'
  const sums = 4 * heads + 8;
  // pairs wider than the arithmetic: the product that is added to the widest gradient
  const widened = options.adapterBytes > computeBytes ? options.adapterBytes * i : 0;
  return {
    kept: form.kept[recompute] * computeBytes + (recompute === 'layer' ? 0 : sums),
    atWork: (form.again[recompute] + form.gradients) * computeBytes + (recompute === 'layer' ? sums : 0) + widened,
  };
}

export function estimateMemory(
  model: ModelDescription,
  trained: TrainedElements,
  optim: TrainConfig['optim'],
  options: MemoryOptions,
): MemoryEstimate {
  const { computeBytes, tokens, labelled } = options;
  const { hiddenSize: h, layers, vocabSize } = model.decoder;
  // 4.127 bits an element with double quantisation, 4.5 without: codes, and a scale for each 64
  const nf4 = 0.5 + (options.doubleQuantization ? (1 + 4 / 256) / 64 : 4 / 64);
  const perWeight = options.quantization === 'nf4' ? nf4 : 1.001;
  let weights = 0;
  let largest = 0;
  for (const { numel, quantizable } of model.parameters) {
    const quantized = quantizable && options.quantization !== 'none';
    weights += numel * (quantized ? perWeight : computeBytes);
    if (quantized) largest = Math.max(largest, numel);
  }
  const copies = computeBytes === 4 ? 8 : 8 + 2 * computeBytes;
  // the model's own weights that are trained are counted among the weights once
  const adapters =
    trained.adapters * copies +
    trained.parameters * (copies - (computeBytes === 4 ? 4 : 0) - (computeBytes === 4 ? 0 : computeBytes));
  const optimizer = (trained.adapters + trained.parameters) * optimizerBytes(optim);

  const layer = layerMemory(model.decoder, options);
  // besides: what the last layer gives and its gradient, and the states that the loss reads
  const activations =
    tokens * (layers * layer.kept + trained.ranks * options.adapterBytes + 2 * h * computeBytes) +
    2 * labelled * h * computeBytes;
  const layerAtWork = tokens * layer.atWork;
  const rows = Math.min(labelled, Math.max(1, Math.floor(2 ** 25 / vocabSize)));
  // float32 logits, and as many for their exponentials (native/core/train/loss.cpp)
  const loss = rows * vocabSize * 8;
  // native/core/quant: three float32 temporaries of a part
  const part = options.cpu ? 2 ** 20 : 2 ** 24;
  const dequantised = largest * computeBytes + 12 * Math.min(part, largest);
  // cuBLAS keeps 32 MiB, cuBLASLt as much
  const libraries = options.cpu ? 0 : 64 * 2 ** 20;
  const workspace = Math.max(loss, layerAtWork + dequantised) + libraries;
  return {
    weights,
    adapters,
    optimizer,
    activations,
    workspace,
    total: weights + adapters + optimizer + activations + workspace,
  };
}
