/**
 * How much memory a training run takes, by part, from the sizes in config.json. The activations follow from what native code keeps for the backward
 * pass (native/core/nn/checkpoint.h); they are those of the largest micro-batch.
 */
import type { TrainConfig } from '../config/index.js';
import type { ModelDescription, Quantization, Recompute } from '../native/binding.js';

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
  quantization: Quantization;
  doubleQuantization: boolean;
  /** Bytes of a number in the arithmetic: 2 or 4. */
  computeBytes: number;
  recompute: Recompute;
  /** The decoder's layers run without an autograd graph of their own (native/core/language/frozen_layer.h). */
  writtenOut: boolean;
  /** The norms of the decoder's layers are trained. */
  trainedNorms: boolean;
  /** Dropout of the model's own, as the run has it. */
  drops: boolean;
  /** Dropout of the pairs' input. */
  pairsDrop: boolean;
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
  /** In the decoder's layers, what trained linears read (their gradient needs it). */
  read: Set<Linear['reads']>;
  /** The output layer, and with it the embeddings where they are one. */
  head: boolean;
}

type Linear = ModelDescription['linears'][number];

type Config = Pick<
  TrainConfig,
  | 'sft_type'
  | 'lora_rank'
  | 'optim'
  | 'freeze_vit'
  | 'freeze_aligner'
  | 'freeze_llm'
  | 'target_modules'
  | 'modules_to_save'
>;

/** Counts what would be trained, as native code selects it. Regular expressions are taken as JavaScript's. */
export function trainedElements(config: Config, model: ModelDescription): TrainedElements {
  const frozen = { vision: config.freeze_vit, projector: config.freeze_aligner, language: config.freeze_llm };
  const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
  if (config.sft_type === 'full') {
    const trained = model.parameters.filter(({ part }) => !frozen[part]);
    return {
      adapters: 0,
      parameters: sum(trained.map(({ numel }) => numel)),
      ranks: 0,
      read: readBy(frozen.language ? [] : model.linears),
      head: !frozen.language,
    };
  }
  const whole = config.sft_type === 'lora_llm';
  const { target_modules: targets } = config;
  const quantizable = new Set(model.parameters.filter((one) => one.quantizable).map(({ name }) => name));
  // modules_to_save trains what it names, and all in it, in place of pairs
  const saved = (path: string) => config.modules_to_save.some((name) => `.${path}.`.includes(`.${name}.`));
  const matches = (path: string, part: 'vision' | 'projector' | 'language') => {
    // of the language model only the head is never quantised, and never gets a pair
    const isHead = part === 'language' && !quantizable.has(`${path}.weight`);
    if (isHead || saved(path) || (whole ? part !== 'language' : frozen[part])) return false;
    if (targets === 'all-linear') return true;
    if (typeof targets === 'string') return new RegExp(`^(?:${targets})$`).test(path);
    return targets.some((name) => name === 'all-linear' || path === name || path.endsWith(`.${name}`));
  };
  const chosen = model.linears.filter(({ path, part }) => matches(path, part));
  return {
    adapters: sum(chosen.map((linear) => config.lora_rank * (linear.in + linear.out))),
    parameters: sum(
      model.parameters
        .filter(({ name, part }) => (whole && part !== 'language') || saved(name))
        .map(({ numel }) => numel),
    ),
    ranks: config.lora_rank * chosen.filter(({ part }) => part === 'language').length,
    read: readBy(model.linears.filter((linear) => chosen.includes(linear) || (saved(linear.path) && linear.reads))),
    head: config.modules_to_save.some((name) => /(^|\.)lm_head$/.test(name)),
  };
}

const READS = ['norm1', 'attention', 'norm2', 'product'] as const;
/** Linears that are not told apart may read anything. */
function readBy(linears: Linear[]): TrainedElements['read'] {
  return new Set(linears.filter(({ part }) => part === 'language').flatMap(({ reads }) => reads ?? READS));
}

/** Whether fp8 takes a linear's weight (native/core/quant/fp8.h, Fp8Tensor::fits). */
export const holdsFp8 = (linear: Pick<Linear, 'in' | 'out'>): boolean => linear.in % 16 === 0 && linear.out % 16 === 0;

/** Bytes a trained element takes in the optimiser. */
function optimizerBytes(optim: TrainConfig['optim']): number {
  if (optim.startsWith('paged_')) return 0; // in host memory
  if (optim.includes('8bit')) return 2 + 8 / 256;
  return optim === 'sgd' || optim === 'adafactor' ? 0.02 : 8;
}

/** Bytes of a token: what one layer keeps for its backward, and what that takes besides while it runs. */
export function layerMemory(
  decoder: ModelDescription['decoder'],
  { read }: Pick<TrainedElements, 'read'>,
  options: MemoryOptions,
): { kept: number; atWork: number } {
  const { hiddenSize: h, intermediateSize: i, heads, keyValueHeads, headDim, activation } = decoder;
  const { computeBytes, recompute, cpu } = options;
  const q = heads * headDim;
  const kv = 2 * keyValueHeads * headDim;
  // q, k, v, the output; the projections' outputs too where norms stand between
  const attention = 2 * q + kv + (decoder.qkNorm ? q + kv / 2 : 0);
  // float32: attention's sums, one a head, and the norms'
  const sums = 4 * heads + 8;
  // pairs wider than the arithmetic: the product that is added to the widest gradient
  const widened = options.adapterBytes > computeBytes ? options.adapterBytes * i : 0;
  const bytes = (kept: number, again: number, gradients: number, masks = 0, dropped = 0) => ({
    kept: kept * computeBytes + masks + (recompute === 'layer' ? 0 : sums),
    atWork:
      again * computeBytes + Math.max(gradients * computeBytes, dropped) + (recompute === 'layer' ? sums : 0) + widened,
  });

  if (options.writtenOut) {
    // native/core/language/frozen_layer.cpp: x, attention, the sum after it, gate|up
    const kept = {
      none: 2 * h + attention + 2 * i,
      cheap: 2 * h + attention + 2 * i,
      mlp: 2 * h + attention,
      layer: h,
    };
    // The gradient of the MLP's product, which the gate takes in place; on the CPU with three temporaries. Then gate|up
    // are gone, and there are the gradients of the sum, of the normed sum, of attention's output and of q, k, v; on the
    // CPU those, or the norm's temporaries; on the GPU also FlashAttention's float32 sums for q, and k and v for each
    // query head.
    const gradients = cpu
      ? Math.max(4 * i, Math.max(5 * h, 2 * h + 2 * q + kv) - 2 * i)
      : Math.max(i, 2 * h + 2 * q + kv + (q * 4) / computeBytes + (keyValueHeads < heads ? 2 * q : 0) - 2 * i);
    return bytes(kept[recompute], kept.none - kept[recompute], gradients);
  }

  // native/core/language/decoder.cpp under autograd: x, the sum after attention, attention, what the activation needs;
  // and what trained linears read, which cheap recompute makes again. An RMS norm whose weight is trained keeps its
  // input divided by its length as well (native/core/nn/norm.cpp).
  const unit = options.trainedNorms && decoder.rmsNorm ? h : 0;
  const norm1 = read.has('norm1') ? h : 0;
  const norm2 = read.has('norm2') ? h : 0;
  const product = read.has('product') || activation.keepsResult ? i : 0;
  // The recipe of a product that the activation keeps all the same holds what it was made from.
  const cheapProduct = !activation.keepsResult ? 0 : read.has('product') ? 2 * i : i;
  const states = activation.keeps * i;
  const none = 2 * h + 2 * unit + attention + norm1 + norm2 + states + product;
  const kept = {
    none,
    cheap: 2 * h + 2 * unit + attention + states + cheapProduct,
    mlp: 2 * h + unit + attention,
    layer: h,
  };
  // with its output; x, or the sum, is there
  const again = { none: 0, cheap: 0, mlp: h + unit + norm2 + states + product, layer: none };
  // of the product and of what it is made from; the product is gone by then unless the activation needs it
  const gone = recompute === 'cheap' || activation.keepsResult ? 0 : product;
  const gradients = (activation.gated ? 3 : 2) * i - gone;
  // Dropout of the input of the pair that reads the product (native/core/lora/lora_layer.cpp): the gradient, what the
  // pair adds to it, and the mask, drawn from int32 on the CPU; then the gradient, the product (made again, if cheap) times
  // the mask, that divided, and the mask.
  const made = recompute === 'cheap' ? 1 : 0;
  const dropped =
    options.pairsDrop && read.has('product')
      ? i * Math.max(2 * computeBytes + (cpu ? 5 : 1), (3 + made) * computeBytes + 1)
      : 0;
  // a byte an element, behind attention and behind the MLP
  const masks = options.drops ? { none: 2 * h, cheap: 2 * h, mlp: h, layer: 0 }[recompute] : 0;
  return bytes(kept[recompute], again[recompute], gradients, masks, dropped);
}

export function estimateMemory(
  model: ModelDescription,
  trained: TrainedElements,
  optim: TrainConfig['optim'],
  options: MemoryOptions,
): MemoryEstimate {
  const { computeBytes, tokens, labelled } = options;
  const { hiddenSize: h, layers, vocabSize, learnedPositions } = model.decoder;
  // 4.127 bits an element with double quantisation, 4.5 without: codes, and a scale for each 64
  const nf4 = 0.5 + (options.doubleQuantization ? (1 + 4 / 256) / 64 : 4 / 64);
  const perWeight = options.quantization === 'nf4' ? nf4 : 1.001;
  const isFp8 = options.quantization === 'fp8';
  const linears = new Map(model.linears.map((linear) => [`${linear.path}.weight`, linear]));
  let weights = 0;
  let largest = 0;
  for (const { name, numel, quantizable } of model.parameters) {
    const linear = linears.get(name);
    if (isFp8 && quantizable && linear && holdsFp8(linear)) {
      // float32 scales of the rows, and of the columns
      weights += numel + 4 * (linear.in + linear.out);
      continue;
    }
    const quantized = quantizable && options.quantization !== 'none' && !isFp8;
    weights += numel * (quantized ? perWeight : computeBytes);
    if (quantized) largest = Math.max(largest, numel);
  }
  const largestLinear = model.linears.reduce((most, linear) => Math.max(most, linear.in * linear.out), 0);
  const copies = computeBytes === 4 ? 8 : 8 + 2 * computeBytes;
  // the model's own weights that are trained are counted among the weights once
  const adapters =
    trained.adapters * copies +
    trained.parameters * (copies - (computeBytes === 4 ? 4 : 0) - (computeBytes === 4 ? 0 : computeBytes));
  const optimizer = (trained.adapters + trained.parameters) * optimizerBytes(optim);

  const layer = layerMemory(model.decoder, trained, options);
  // besides: what the last layer gives and its gradient (and that through the dropout behind it), the embeddings where
  // the first layer reads a sum with them, and the states that the loss reads
  const states = 2 + (options.drops ? 1 : 0) + (learnedPositions ? 1 : 0);
  const activations =
    tokens * (layers * layer.kept + trained.ranks * options.adapterBytes + states * h * computeBytes) +
    2 * labelled * h * computeBytes;
  // Of a trained head: the gradient that the loss forms, and once more where the backward scales it; tied to the
  // embeddings, it waits for theirs until the end. (Those of the layers' weights are formed one after the other.)
  const head = trained.head ? vocabSize * h * computeBytes : 0;
  const weightGradient = trained.parameters > 0 ? largestLinear * computeBytes : 0;
  const layerAtWork = tokens * layer.atWork + weightGradient + (model.decoder.tiedHead ? head : 0);
  // A chunk of logits (native/core/train/loss.cpp): in float32, and as many for their exponentials; in 16 bits, which a
  // kernel turns into their gradient.
  const byKernel = !options.cpu && computeBytes === 2;
  const rows = Math.min(labelled, Math.max(1, Math.floor(2 ** (byKernel ? 26 : 25) / vocabSize)));
  const loss = rows * vocabSize * (byKernel ? 2 : 8);
  // native/core/quant: three float32 temporaries of a part
  const part = options.cpu ? 2 ** 20 : 2 ** 24;
  const { intermediateSize: i, heads, keyValueHeads, headDim, activation } = model.decoder;
  const widest = Math.max(i * (activation.gated ? 2 : 1), (heads + 2 * keyValueHeads) * headDim);
  // Linears of one input are dequantised next to each other where layers are written out.
  const together = options.writtenOut && largest > 0 ? Math.max(largest, widest * h) : largest;
  const dequantised = together * computeBytes + 12 * Math.min(part, largest);
  // In the backward of the widest product of fp8: the weight's codes transposed, and the gradient's.
  const turned = isFp8 ? widest * (h + tokens) : 0;
  // cuBLAS keeps 32 MiB, cuBLASLt as much
  const libraries = options.cpu ? 0 : 64 * 2 ** 20;
  const workspace = Math.max(loss + head, 2 * head, layerAtWork + dequantised + turned) + libraries;
  return {
    weights,
    adapters,
    optimizer,
    activations,
    workspace,
    total: weights + adapters + optimizer + activations + workspace,
  };
}
