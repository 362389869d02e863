/**
 * The types of the public API: tsc, which compiles this file with every build, is the test. Nothing of `uses` runs. A `@ts-expect-error` over a line
 * that is right is an error too.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type {
  ChatMessage,
  ErrorCode,
  ErrorDetails,
  GenerateOptions,
  GenerateResult,
  ImageSource,
  InferOptions,
  LoadModelOptions,
  MemoryStats,
  MergeOptions,
  MergeReport,
  Model,
  ParsedBox,
  PrepareResult,
  ProgressRenderer,
  ProgressStream,
  PromptOptions,
  ScoreResult,
  StreamChunk,
  TrainConfig,
  TrainConfigInput,
  TrainEvent,
  TrainOptions,
  TrainResult,
  TrainRun,
} from 'martlet';
import * as martlet from 'martlet';
import sharp from 'sharp';

/** True only if the two are the same type; `any` is the same as nothing else. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
declare function same<A, B>(..._: Same<A, B> extends true ? [] : [never]): void;

const {
  createProgressRenderer,
  getSystemInfo,
  infer,
  loadModel,
  mergeAdapter,
  MartletError,
  parseBoxes,
  train,
  trainLoRA,
} = martlet;
declare const signal: AbortSignal;
declare const event: TrainEvent;

test('the package exports these names and no others', () => {
  assert.deepEqual(Object.keys(martlet).sort(), [
    'ERROR_CODES',
    'MartletError',
    'convertCheckpoint',
    'createProgressRenderer',
    'drawBoxes',
    'getSystemInfo',
    'infer',
    'loadModel',
    'mergeAdapter',
    'parseBoxes',
    'planTraining',
    'quantizeModel',
    'train',
    'trainLoRA',
  ]);
});

test('every error code is one of ERROR_CODES and of the type', () => {
  for (const code of martlet.ERROR_CODES) assert.match(code, /^ERR_MARTLET_[A-Z_]+$/);
  assert.equal(new Set(martlet.ERROR_CODES).size, martlet.ERROR_CODES.length);
});

/** Compiled, never called. */
export const uses = {
  async loadModel() {
    const model = await loadModel('dir');
    same<typeof model, Model>();
    await loadModel('dir', {
      device: 'cuda:1',
      dtype: 'bfloat16',
      quantization: 'none',
      adapters: { tuned: 'adapter' },
      template: 'ms-swift',
      system: 'Be brief.',
      exifOrientation: false,
      signal,
      onProgress: ({ done, total, bytes }) =>
        same<[typeof done, typeof total, typeof bytes], [number, number, number]>(),
    });
    same<Parameters<typeof loadModel>, [model: string, options?: LoadModelOptions]>();
    // @ts-expect-error the model is needed
    await loadModel();
    // @ts-expect-error no such device
    await loadModel('dir', { device: 'gpu' });
    // @ts-expect-error no such dtype
    await loadModel('dir', { dtype: 'fp16' });
    // @ts-expect-error options are camelCase
    await loadModel('dir', { exif_orientation: false });
    // @ts-expect-error adapters have names
    await loadModel('dir', { adapters: ['adapter'] });
  },

  async model(model: Model) {
    same<typeof model.modelType, string>();
    same<typeof model.device, string>();
    same<typeof model.dtype, 'float32' | 'bfloat16' | 'float16'>();
    same<typeof model.parameters, number>();
    same<typeof model.adapters, string[]>();
    same<typeof model.disposed, boolean>();
    // @ts-expect-error a fact, not a setting
    model.dtype = 'float32';
    same<ReturnType<Model['memory']>, Promise<MemoryStats>>();
    const { allocated, peakAllocated, reserved, peakReserved } = await model.memory();
    same<(typeof allocated | typeof peakAllocated | typeof reserved | typeof peakReserved)[], number[]>();
    same<ReturnType<Model['loadAdapter']>, Promise<void>>();
    same<ReturnType<Model['unloadAdapter']>, Promise<void>>();
    await model.loadAdapter('tuned', 'dir');
    // @ts-expect-error an adapter has a name
    await model.loadAdapter('dir');
    await model.unloadAdapter('tuned');
    same<ReturnType<Model['dispose']>, Promise<void>>();
    const disposable: AsyncDisposable = model;
    await disposable[Symbol.asyncDispose]();
  },

  async generate(model: Model) {
    const messages: ChatMessage[] = [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: '<image>\nWhat is this?' },
      { role: 'assistant', content: [{ type: 'text', text: 'A heron.' }], loss: false },
      { role: 'user', content: [{ type: 'image' }, { type: 'image_url', image_url: { url: 'b.png' } }] },
    ];
    const images: ImageSource[] = ['a.png', new URL('file:///b.png'), Buffer.of(), new Uint8Array(), sharp('c.png')];
    const options: GenerateOptions = { messages, images, adapter: null, temperature: 0, stop: ['\n'], signal };
    same<GenerateOptions['adapter'], string | null | undefined>();
    const prompt: PromptOptions = options;
    const result = await model.generate({
      ...prompt,
      maxNewTokens: 8,
      topP: 0.9,
      topK: 40,
      repetitionPenalty: 1.1,
      seed: 1,
    });
    same<typeof result, GenerateResult>();
    same<typeof result.text, string>();
    same<typeof result.tokenIds, Int32Array>();
    same<typeof result.promptTokens, number>();
    same<typeof result.finishReason, 'stop' | 'length' | 'abort'>();
    same<typeof result.usage, { promptTokens: number; completionTokens: number; totalTokens: number }>();
    same<
      typeof result.timings,
      { preprocess: number; vision: number; prefill: number; decode: number; total: number }
    >();
    for await (const chunk of model.stream(options)) {
      same<typeof chunk, StreamChunk>();
      same<[typeof chunk.text, typeof chunk.tokenId], [string, number]>();
    }
    // @ts-expect-error messages are needed
    await model.generate({ maxNewTokens: 8 });
    // @ts-expect-error no such role
    await model.generate({ messages: [{ role: 'human', content: 'Hello' }] });
    // @ts-expect-error options are camelCase
    await model.generate({ messages, max_new_tokens: 8 });
    // @ts-expect-error a picture is no number
    await model.generate({ messages, images: [1] });
    // @ts-expect-error a stream has no result to wait for
    (await model.stream(options)).text;
  },

  async score(model: Model) {
    const result = await model.score({ messages: [], logits: true });
    same<typeof result, ScoreResult>();
    same<[typeof result.inputIds, typeof result.labels], [Int32Array, Int32Array]>();
    same<[typeof result.logprobs, typeof result.loss], [Float32Array, number]>();
    same<typeof result.logits, { data: Float32Array; shape: number[] } | undefined>();
    // @ts-expect-error only with logits: true
    result.logits.shape;
    // @ts-expect-error nothing is sampled
    await model.score({ messages: [], temperature: 0 });

    const prepared = await model.prepare({ messages: [], images: [], for: 'train' });
    same<typeof prepared, PrepareResult>();
    same<typeof prepared.inputIds, Int32Array>();
    same<typeof prepared.labels, Int32Array | undefined>();
    same<typeof prepared.pixels, Record<string, { data: Float32Array; shape: number[] }>>();
    await model.prepare({ messages: [], adapter: 'tuned' }); // asked as it was trained: its template, its pixel limits
    // @ts-expect-error no such purpose
    await model.prepare({ messages: [], for: 'eval' });
  },

  async trainLoRA() {
    same<typeof train, typeof trainLoRA>();
    const options: TrainOptions = { signal, overrides: { lora_rank: 16 } };
    const run = trainLoRA('config.yaml', options);
    same<typeof run, TrainRun>();
    for await (const one of run) same<typeof one, TrainEvent>();
    const result = await run;
    same<typeof result, TrainResult>();
    same<TrainRun['result'], Promise<TrainResult>>();
    same<ReturnType<TrainRun['stop']>, void>();
    same<[typeof result.outputDir, typeof result.adapterDir], [string, string]>();
    same<[typeof result.steps, typeof result.finalLoss], [number, number]>();
    same<typeof result.bestCheckpoint, string | undefined>();
    same<[typeof result.trainableParams, typeof result.totalParams], [number, number]>();
    same<typeof result.skipped, { file: string; row: number; code: string; message: string }[]>();
    same<typeof result.stopped, boolean>();

    const config: TrainConfigInput = { model: 'dir', dataset: 'train.json', lora_rank: 8 };
    train(config, { overrides: ['lora_rank=16'] });
    // @ts-expect-error a run is started from a path or an object
    trainLoRA();
    // @ts-expect-error pairs or strings
    trainLoRA(config, { overrides: [16] });
    // @ts-expect-error a run is no promise: catch belongs to its result
    run.catch(() => {});
  },

  events(config: TrainConfig) {
    same<TrainEvent['type'], 'start' | 'step' | 'eval' | 'checkpoint' | 'warning' | 'done'>();
    switch (event.type) {
      case 'start':
        same<typeof event.config, TrainConfig>();
        same<typeof event.parts, { vision: number; projector: number; language: number }>();
        break;
      case 'step':
        same<[typeof event.step, typeof event.loss, typeof event.gradNorm], [number, number, number]>();
        same<[typeof event.learningRate, typeof event.tokensPerSecond], [number, number]>();
        // @ts-expect-error a step has no folder
        event.dir;
        break;
      case 'eval':
        same<[typeof event.loss, typeof event.tokenAccuracy], [number, number]>();
        break;
      case 'checkpoint':
        same<[typeof event.step, typeof event.dir], [number, string]>();
        break;
      case 'warning':
        same<typeof event.details, Record<string, unknown> | undefined>();
        break;
      case 'done':
        same<typeof event.adapterDir, string>();
        break;
      default:
        same<typeof event, never>();
    }
    same<typeof config.sft_type, 'lora' | 'qlora' | 'full' | 'lora_llm'>();
    same<typeof config.lora_rank, number>();
    same<
      typeof config.dataset,
      {
        path: string;
        dataset_root?: string | undefined;
        image_folder?: string | undefined;
        sample?: number | undefined;
      }[]
    >();
    // @ts-expect-error no such key
    config.lora_ranks;
  },

  async merge() {
    const options: MergeOptions = {
      model: 'dir',
      adapter: 'adapter',
      outputDir: 'merged',
      dtype: 'float16',
      maxShardSize: '2GB',
    };
    const report = await mergeAdapter({
      ...options,
      overwrite: true,
      signal,
      onProgress: ({ done, total }) => done / total,
    });
    same<typeof report, MergeReport>();
    same<[typeof report.outputDir, typeof report.shards], [string, string[]]>();
    same<[typeof report.mergedTensors, typeof report.maxAbsError, typeof report.seconds], [number, number, number]>();
    await mergeAdapter({ adapter: 'adapter', outputDir: 'merged' });
    // @ts-expect-error where to?
    await mergeAdapter({ adapter: 'adapter' });
  },

  async infer() {
    const options: InferOptions = {
      model: 'dir',
      adapter: 'adapter',
      image: ['a.png', Buffer.of()],
      text: 'What is this?',
    };
    const result = await infer({ ...options, device: 'cpu', maxNewTokens: 8, temperature: 0.7 });
    same<typeof result, GenerateResult>();
    const results = await infer({
      model: 'dir',
      questions: [{ text: 'a' }, { image: 'a.png', text: 'b' }],
      batchSize: 2,
    });
    same<typeof results, GenerateResult[]>();
    // @ts-expect-error the question is needed
    await infer({ model: 'dir' });
    // @ts-expect-error one adapter, by its folder
    await infer({ ...options, adapters: { tuned: 'adapter' } });
  },

  errors(error: unknown) {
    if (error instanceof MartletError) {
      same<typeof error.code, ErrorCode>();
      same<typeof error.details, ErrorDetails>();
      same<ReturnType<typeof error.toJSON>, { code: ErrorCode; message: string; details: ErrorDetails }>();
      // @ts-expect-error no such code
      error.code === 'ERR_MARTLET_NOTHING';
    }
    same<(typeof martlet.ERROR_CODES)[number], ErrorCode>();
    // @ts-expect-error the list is fixed
    martlet.ERROR_CODES.push('ERR_MARTLET_CONFIG');
  },

  progress() {
    const stream: ProgressStream = { write: (text: string) => text.length, isTTY: false, columns: 80 };
    const renderer: ProgressRenderer = createProgressRenderer(stream);
    createProgressRenderer(process.stderr);
    renderer.handle(event);
    renderer.line('text');
    renderer.close();
    // @ts-expect-error a renderer writes to a stream
    createProgressRenderer('stderr');
  },

  boxes() {
    const boxes = parseBoxes('(1,2),(3,4)', { family: 'qwen2_5_vl', width: 640, height: 480 });
    same<typeof boxes, ParsedBox[]>();
    same<ParsedBox['bbox'], number[]>();
    // @ts-expect-error the size of the picture is needed
    parseBoxes('(1,2),(3,4)', { family: 'qwen2_5_vl' });
    // @ts-expect-error no such family
    parseBoxes('(1,2),(3,4)', { family: 'llava', width: 640, height: 480 });
  },

  system() {
    const info = getSystemInfo();
    same<[typeof info.addonPath, typeof info.libtorchPath, typeof info.libtorchSource], [string, string, string]>();
    same<[typeof info.torchVersion, typeof info.compiledTorchVersion], [string, string]>();
    same<typeof info.cudaAvailable, boolean>();
    same<typeof info.threads, number>();
  },
};
