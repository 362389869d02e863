import { createReadStream } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { adapterBaseModel } from '../api/adapter-args.js';
import { userMessage } from '../api/infer.js';
import { loadModel } from '../api/model.js';
import type {
  ChatMessage,
  GenerateOptions,
  GenerateResult,
  ImageSource,
  LoadModelOptions,
  Model,
  PromptOptions,
  VideoSource,
} from '../api/types.js';
import { trainConfigSchema } from '../config/schema.js';
import {
  parseImages,
  parseMessage,
  parseObjects,
  parseVideos,
  parseVision,
  placeUnmarked,
  RowError,
} from '../data/rows.js';
import { MartletError } from '../errors.js';
import { exists, ioError, isDirectory, listDir } from '../files.js';
import {
  checkVisionOptions,
  VISION_OPTION_NAMES,
  VISION_OPTIONS,
  type VisionOptionName,
  type VisionOptions,
  visionOptionsFromKeys,
} from '../processing/vision-options.js';
import { nearest } from '../suggest.js';
import { type OptionSpecs, type Options, usageError } from './args.js';
import { type CliIo, type Command, type Invocation, printJson } from './command.js';
import { interruptible, resolveWithNotice } from './jobs.js';

/** `--max_pixels` and the like: the keys of a training config. */
const VISION_SPECS: OptionSpecs = Object.fromEntries(
  VISION_OPTION_NAMES.map((name) => {
    const { key, kind } = VISION_OPTIONS[name];
    const help = trainConfigSchema.shape[key as 'max_pixels'].description?.replace(/ null = .*/, '');
    return [
      key,
      {
        kind: 'value',
        placeholder: kind === 'flag' ? 'true|false' : typeof kind === 'string' ? 'N' : kind.join('|'),
        help,
      },
    ];
  }),
);

const OPTIONS: OptionSpecs = {
  model: {
    kind: 'value',
    aliases: ['model_id', 'model_id_or_path'],
    placeholder: 'DIR|ID',
    help: "the base model; the adapter's own by default",
  },
  adapters: {
    kind: 'value',
    aliases: ['adapter_name_or_path', 'adapter', 'ckpt_dir'],
    placeholder: 'DIR',
    help: 'an adapter folder: the output_dir of a training run, or one of its checkpoints',
  },
  text: {
    kind: 'value',
    aliases: ['query', 'prompt'],
    placeholder: 'TEXT',
    help: 'the question; <image> marks where an image goes, in front of the text by default',
  },
  image: {
    kind: 'value',
    aliases: ['images'],
    multiple: true,
    placeholder: 'PATH|URL',
    help: 'an image; may be repeated',
  },
  video: {
    kind: 'value',
    aliases: ['videos'],
    multiple: true,
    placeholder: 'DIR|FRAME,FRAME…',
    help: 'a video: a folder with its frames (in order of their names), or their paths;\nmay be repeated',
  },
  multi_modal_inputs: {
    kind: 'value',
    placeholder: 'JSON',
    help: `all as JSON: '{"image": "cat.jpg", "text": "What is this?"}'`,
  },
  input: {
    kind: 'value',
    aliases: ['val_dataset'],
    placeholder: 'FILE',
    help: 'a JSONL file, one item a line: {"image", "text"} or {"messages", "images", "videos"};\nprints one line of JSON an item; an item that fails gives a line with "error",\none whose messages end with an answer has it as "reference"',
  },
  max_batch_size: {
    kind: 'value',
    aliases: ['batch_size'],
    placeholder: 'N',
    help: 'items of --input that are answered at once, 1 by default; faster on a GPU',
  },
  system: { kind: 'value', placeholder: 'TEXT', help: 'system prompt' },
  template: { kind: 'value', placeholder: 'default|ms-swift', help: "chat template; the adapter's own by default" },
  max_new_tokens: { kind: 'value', placeholder: 'N', help: 'longest answer, in tokens' },
  temperature: { kind: 'value', placeholder: 'T', help: '0 = greedy; default from generation_config.json' },
  top_p: { kind: 'value', placeholder: 'P', help: 'nucleus sampling' },
  top_k: { kind: 'value', placeholder: 'K', help: 'sample among the K likeliest tokens' },
  repetition_penalty: { kind: 'value', placeholder: 'X', help: '1 = off' },
  seed: { kind: 'value', placeholder: 'N', help: 'makes sampling repeatable' },
  stop: {
    kind: 'value',
    aliases: ['stop_words'],
    multiple: true,
    placeholder: 'TEXT',
    help: 'the answer ends before this text; may be repeated',
  },
  keep_special_tokens: { kind: 'flag', help: 'leave tokens such as <|box_start|> in the answer' },
  ...VISION_SPECS,
  stream: { kind: 'flag', help: 'print the answer as it comes' },
  device: { kind: 'value', aliases: ['device_map'], placeholder: 'auto|cpu|cuda|cuda:N', help: 'default auto' },
  torch_dtype: {
    kind: 'value',
    aliases: ['dtype'],
    placeholder: 'auto|float32|bfloat16|float16',
    help: 'default auto: as stored',
  },
  quant_bits: { kind: 'value', placeholder: '4|8', help: 'load the language model in 4 bits (NF4) or 8' },
  quant_method: { kind: 'value', placeholder: 'bnb' },
  vllm: { kind: 'flag' },
};

export const command: Command = {
  usage: 'infer [--model DIR|ID] [--adapters DIR] [--image PATH --text TEXT | --input FILE]',
  description: `Answers one question, every item of a file, or (without --text and --input) the lines typed: a conversation.
In a conversation each <image> in a line asks for a path; "clear" forgets what was said, "exit" ends it.`,
  options: () => OPTIONS,
  footer: `Examples:
  martlet infer --adapters out --image cat.jpg --text "What colour is the cat?"
  martlet infer --model_id llava-hf/llava-1.5-7b-hf --multi_modal_inputs '{"image": "cat.jpg", "text": "Describe."}' --json
  martlet infer --adapters out --input questions.jsonl > answers.jsonl`,
  run,
};

/** With what a row may say of its own: boxes, pixel limits. */
interface Question extends Pick<PromptOptions, 'objects' | (keyof VisionOptions & keyof PromptOptions)> {
  messages: ChatMessage[];
  images: ImageSource[];
  videos: VideoSource[];
  /** The answer that a row of training data ends with: printed beside the model's, not asked about. */
  reference?: ChatMessage['content'];
}

async function run({ options, positionals, io }: Invocation): Promise<number> {
  if (positionals.length > 0) throw usageError(`unexpected argument ${positionals[0]}.`);
  if (options.flag('vllm')) {
    throw usageError(
      'martlet does not drive vLLM yet. Leave --vllm out, or merge the adapter (martlet export) and serve that folder with vLLM.',
      { option: 'vllm' },
    );
  }
  const question = await oneQuestion(options);
  const input = options.string('input');
  if (question && input !== undefined) throw usageError('--input and --text exclude each other.');
  if (options.flag('json') && options.flag('stream')) throw usageError('--stream and --json exclude each other.');
  const adapter = options.string('adapters');
  const modelId = options.string('model') ?? (adapter === undefined ? undefined : await adapterBaseModel(adapter));
  if (modelId === undefined) throw usageError('infer needs --model or --adapters. --help shows more.');

  const batchSize = options.number('max_batch_size') ?? 1;
  if (!Number.isInteger(batchSize) || batchSize < 1) {
    throw usageError(`--max_batch_size must be a whole number of at least 1, not ${batchSize}.`, {
      option: 'max_batch_size',
    });
  }
  const loading = loadOptions(options);
  return interruptible(async (signal) => {
    const settings = { ...generationSettings(options), signal };
    const model = await loadModel(await resolveWithNotice(modelId, io, signal), {
      ...loading,
      ...(adapter !== undefined && { adapters: { default: adapter } }),
      signal,
    });
    try {
      if (input !== undefined) return await batch(model, input, settings, batchSize, io);
      if (question) return await answer(model, question, settings, options, io);
      return await converse(model, settings, io);
    } finally {
      await model.dispose();
    }
  });
}

function loadOptions(options: Options): LoadModelOptions {
  const named = options.string('torch_dtype');
  const quantized = named === 'int8' || named === 'nf4';
  const bits = options.choice('quant_bits', ['4', '8']);
  const method = options.choice('quant_method', ['bnb']);
  return {
    device: options.device('device'),
    ...(quantized
      ? { quantization: named }
      : {
          dtype: options.dtype('torch_dtype'),
          ...((bits !== undefined || method !== undefined) && { quantization: bits === '8' ? 'int8' : 'nf4' }),
        }),
    template: options.choice('template', ['default', 'ms-swift']),
    system: options.string('system'),
    ...visionOptions(options),
  };
}

function visionOptions(options: Options): VisionOptions {
  const value = (key: string, kind: (typeof VISION_OPTIONS)[VisionOptionName]['kind']) => {
    if (kind === 'flag') {
      const text = options.choice(key, ['true', 'false']);
      return text === undefined ? undefined : text === 'true';
    }
    return typeof kind === 'string' ? options.number(key) : options.choice(key, kind);
  };
  const given = VISION_OPTION_NAMES.map((name) => VISION_OPTIONS[name]).map(({ key, kind }) => [key, value(key, kind)]);
  return checkVisionOptions(visionOptionsFromKeys(Object.fromEntries(given)), 'snake_case');
}

function generationSettings(options: Options): Omit<GenerateOptions, 'messages' | 'images' | 'videos'> {
  const stop = options.strings('stop');
  return {
    maxNewTokens: options.number('max_new_tokens'),
    temperature: options.number('temperature'),
    topP: options.number('top_p'),
    topK: options.number('top_k'),
    repetitionPenalty: options.number('repetition_penalty'),
    seed: options.number('seed'),
    ...(stop.length > 0 && { stop }),
    ...(options.flag('keep_special_tokens') && { skipSpecialTokens: false }),
  };
}

/** The question on the command line, if there is one. */
async function oneQuestion(options: Options): Promise<Question | undefined> {
  const json = options.string('multi_modal_inputs');
  const text = options.string('text');
  const images = options.strings('image');
  const videos = await Promise.all(options.strings('video').map(frames));
  if (json !== undefined) {
    if (text !== undefined || images.length > 0 || videos.length > 0)
      throw usageError('--multi_modal_inputs and --image/--video/--text exclude each other.');
    let item: unknown;
    try {
      item = JSON.parse(json);
    } catch (cause) {
      throw usageError(`--multi_modal_inputs is not JSON: ${(cause as Error).message}`, {
        option: 'multi_modal_inputs',
      });
    }
    return toQuestion(item, '--multi_modal_inputs');
  }
  if (text === undefined && images.length + videos.length > 0) {
    const option = images.length > 0 ? '--image' : '--video';
    throw usageError(`${option} needs --text: what should be answered about it?`);
  }
  return text === undefined
    ? undefined
    : { messages: [userMessage(text, images.length, videos.length)], images, videos };
}

/** A folder's pictures in the order of their names, or the paths of a list. */
async function frames(video: string): Promise<string[]> {
  if (!(await isDirectory(video))) return video.split(',');
  const names = (await listDir(video)).filter((name) => /\.(png|jpe?g|webp|gif|tiff?|avif)$/i.test(name));
  if (names.length === 0) throw usageError(`--video ${video}: the folder holds no pictures.`, { option: 'video' });
  const inOrder = new Intl.Collator('en', { numeric: true }).compare; // 2.png before 10.png
  return names.sort(inOrder).map((name) => join(video, name));
}

/** Of an item; others, such as an id or the right answer, are left alone. */
const ITEM_KEYS = [
  'text',
  'messages',
  'system',
  'image',
  'images',
  'video',
  'videos',
  'objects',
  'chat_template_kwargs',
] as const;

/** `{image, video, text}` or `{messages, images, videos}` as a question, with what else a row of data may say. A last answer of `messages` is left out. */
function toQuestion(item: unknown, where: string): Question {
  if (typeof item !== 'object' || item === null || Array.isArray(item)) {
    throw usageError(`${where}: expected an object with "text" or "messages".`);
  }
  const row = item as Record<(typeof ITEM_KEYS)[number], unknown>;
  for (const key of Object.keys(item)) {
    if ((ITEM_KEYS as readonly string[]).includes(key)) continue;
    const meant = nearest(key, ITEM_KEYS, 2);
    if (meant !== undefined)
      throw usageError(`${where}: "${key}" is not known: did you mean "${meant}"?`, { field: key });
  }
  try {
    const [images, videos] = [
      parseImages(item as Record<string, unknown>),
      parseVideos(item as Record<string, unknown>),
    ];
    const [objects, vision] = [parseObjects(row.objects), parseVision(row.chat_template_kwargs)];
    const beside = { images, videos, ...(objects && { objects }), ...vision };
    const system: ChatMessage[] =
      typeof row.system === 'string' && row.system !== '' ? [{ role: 'system', content: row.system }] : [];
    if (Array.isArray(row.messages)) {
      const written = row.messages.flatMap((message, i) => parseMessage(message, `messages.${i}`));
      const messages = placeUnmarked(placeUnmarked(written, 'image', images.length), 'video', videos.length);
      // The right answer, which the model is not to see.
      const reference = messages.at(-1)?.role === 'assistant' ? messages.pop()?.content : undefined;
      return {
        messages: messages[0]?.role === 'system' ? messages : [...system, ...messages],
        ...beside,
        ...(reference !== undefined && { reference }),
      };
    }
    if (typeof row.text !== 'string') throw usageError(`${where}: "text" is missing.`, { field: 'text' });
    return { messages: [...system, userMessage(row.text, images.length, videos.length)], ...beside };
  } catch (error) {
    if (!(error instanceof RowError)) throw error;
    throw usageError(`${where}: ${error.message}.`, { field: error.field });
  }
}

/** Without the right answer. */
function asked({ reference: _, ...question }: Question): Omit<Question, 'reference'> {
  return question;
}

function outcome({ text, tokenIds, finishReason, usage }: GenerateResult) {
  return { text, tokenIds: Array.from(tokenIds), finishReason, usage };
}

type Settings = ReturnType<typeof generationSettings> & { signal?: AbortSignal };

async function answer(
  model: Model,
  question: Question,
  settings: Settings,
  options: Options,
  io: CliIo,
): Promise<number> {
  if (options.flag('stream')) {
    for await (const { text } of model.stream({ ...settings, ...asked(question) })) io.stdout.write(text);
    io.stdout.write('\n');
    return 0;
  }
  const result = await model.generate({ ...settings, ...asked(question) });
  if (options.flag('json')) printJson(io, outcome(result));
  else io.stdout.write(`${result.text}\n`);
  return 0;
}

interface Item {
  line: number;
  question: Question | MartletError;
}

/** One line of JSON for each line of the file, in order; a failing item does not stop the others. */
async function batch(model: Model, file: string, settings: Settings, atOnce: number, io: CliIo): Promise<number> {
  let failed = 0;
  const print = ({ line, question }: Item, result: GenerateResult | MartletError) => {
    if (!(result instanceof MartletError)) {
      const reference = question instanceof MartletError ? undefined : question.reference;
      return printJson(io, { ...outcome(result), ...(reference !== undefined && { reference }) });
    }
    failed++;
    const { code, message, details } = result;
    printJson(io, { error: { code, message, details: { ...details, file, line } } });
  };
  const answerAll = async (items: Item[]) => {
    const results = await answers(model, items, settings);
    for (const [i, item] of items.entries()) print(item, results[i] as (typeof results)[0]);
  };
  let line = 0;
  let waiting: Item[] = [];
  const lines = createInterface({ input: createReadStream(file), crlfDelay: Number.POSITIVE_INFINITY });
  try {
    for await (const content of lines) {
      line++;
      if (content.trim() === '') continue;
      waiting.push({ line, question: await orError(readItem(content, file, line)) });
      if (waiting.length < atOnce) continue;
      await answerAll(waiting);
      waiting = [];
    }
    await answerAll(waiting);
  } catch (error) {
    throw (error as NodeJS.ErrnoException).syscall === undefined ? error : ioError(error, 'read', file);
  }
  if (failed > 0) io.stderr.write(`${failed} items failed: see the lines with "error"\n`);
  return failed > 0 ? 1 : 0;
}

async function readItem(content: string, file: string, line: number): Promise<Question> {
  const question = toQuestion(parseLine(content, file, line), `${file} line ${line}`);
  const beside = (paths: ImageSource[]) => Promise.all(paths.map((path) => besideFile(path as string, file)));
  const images = await beside(question.images);
  const videos = await Promise.all(
    question.videos.map(async (clip) =>
      Array.isArray(clip) ? beside(clip) : { ...clip, frames: await beside(clip.frames) },
    ),
  );
  return { ...question, images, videos };
}

/** All at once; where one of them fails, one by one, so that the others are answered. */
async function answers(model: Model, items: Item[], settings: Settings): Promise<(GenerateResult | MartletError)[]> {
  const { signal, ...generation } = settings;
  const good = items.flatMap(({ question }) => (question instanceof MartletError ? [] : [question]));
  if (good.length > 1) {
    const all = await orError(
      model.generateBatch(
        good.map((question) => ({ ...generation, ...asked(question) })),
        { signal },
      ),
    );
    if (!(all instanceof MartletError)) {
      return items.map(({ question }) =>
        question instanceof MartletError ? question : (all.shift() as GenerateResult),
      );
    }
  }
  const results: (GenerateResult | MartletError)[] = [];
  for (const { question } of items) {
    results.push(
      question instanceof MartletError ? question : await orError(model.generate({ ...settings, ...asked(question) })),
    );
  }
  return results;
}

/** What is wrong with an item is its answer; an abort and other programs' errors are not. */
async function orError<T>(work: Promise<T>): Promise<T | MartletError> {
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof MartletError) || error.code === 'ERR_MARTLET_ABORTED') throw error;
    return error;
  }
}

function parseLine(content: string, file: string, line: number): unknown {
  try {
    return JSON.parse(content);
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `${file} line ${line} is not JSON: ${(cause as Error).message}`,
      { file, line },
      { cause },
    );
  }
}

/** A relative path is meant from the file's folder if the image lies there, else from the working directory. */
async function besideFile(image: string, file: string): Promise<string> {
  if (/^(https?|data|file):/i.test(image)) return image;
  const beside = resolve(dirname(file), image);
  return (await exists(beside)) ? beside : image;
}

/** A conversation on standard input. */
async function converse(model: Model, settings: Settings, io: CliIo): Promise<number> {
  const terminal = io.stdin.isTTY === true;
  const lines = createInterface({ input: io.stdin, output: terminal ? io.stderr : undefined, terminal });
  const ask = (prompt: string) => {
    if (terminal) lines.setPrompt(prompt);
    if (terminal) lines.prompt();
  };
  let history: Question = { messages: [], images: [], videos: [] };
  /** The line whose <image> marks still wait for their paths. */
  let open: { text: string; images: string[]; wanted: number } | undefined;
  ask('<<< ');
  for await (const raw of lines) {
    const line = raw.trim();
    if (open) {
      if (line !== '') open.images.push(line);
    } else {
      if (line === 'exit' || line === 'quit') break;
      if (line === 'clear') history = { messages: [], images: [], videos: [] };
      else if (line !== '') open = { text: raw, images: [], wanted: raw.split('<image>').length - 1 };
    }
    if (open && open.images.length < open.wanted) {
      ask(`image ${open.images.length + 1} of ${open.wanted}: `);
      continue;
    }
    if (open) {
      const question: Question = {
        messages: [...history.messages, { role: 'user', content: open.text }],
        images: [...history.images, ...open.images],
        videos: [],
      };
      open = undefined;
      const said = await say(model, question, settings, io);
      if (said !== undefined) {
        history = { ...question, messages: [...question.messages, { role: 'assistant', content: said }] };
      }
    }
    ask('<<< ');
  }
  lines.close();
  return 0;
}

/** Streams one answer; a bad image path ends this turn, not the conversation. */
async function say(model: Model, question: Question, settings: Settings, io: CliIo): Promise<string | undefined> {
  let said = '';
  try {
    for await (const { text } of model.stream({ ...settings, ...question })) {
      io.stdout.write(text);
      said += text;
    }
    io.stdout.write('\n');
    return said;
  } catch (error) {
    if (!(error instanceof MartletError) || error.code === 'ERR_MARTLET_ABORTED') throw error;
    io.stderr.write(`error: ${error.message}\n`);
    return undefined;
  }
}
