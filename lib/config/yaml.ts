/** YAML (and so JSON) with the place of every key, for messages. */
import {
  EVENT_ALIAS,
  EVENT_MAPPING,
  EVENT_POP,
  EVENT_SCALAR,
  EVENT_SEQUENCE,
  getScalarValue,
  load,
  parseEvents,
  YAMLException,
} from 'js-yaml';

export interface Position {
  /** From 1. */
  line: number;
  column: number;
}

export interface YamlDocument {
  value: unknown;
  /** By path: `train_args.learning_rate`, `dataset.train.0.file_name`. */
  positions: Map<string, Position>;
}

export class YamlSyntaxError extends Error {
  constructor(
    message: string,
    readonly position: Position | undefined,
  ) {
    super(message);
  }
}

/** YAML 1.2 core types: `no` is a string, `1e-4` a number. A text without a document (comments at most) is undefined. */
export function parseYaml(text: string): YamlDocument {
  try {
    const positions = keyPositions(text);
    return positions ? { value: load(text), positions } : { value: undefined, positions: new Map() };
  } catch (error) {
    if (!(error instanceof YAMLException)) throw error;
    const mark = error.mark as { line: number; column: number } | undefined;
    throw new YamlSyntaxError(error.reason, mark && { line: mark.line + 1, column: mark.column + 1 });
  }
}

interface Frame {
  path: string;
  /** undefined = a sequence, whose next index is `index`. */
  mapping: boolean;
  index: number;
  key: string | undefined;
}

function keyPositions(text: string): Map<string, Position> | undefined {
  const lineStarts = [0];
  for (let i = text.indexOf('\n'); i >= 0; i = text.indexOf('\n', i + 1)) lineStarts.push(i + 1);
  const place = (offset: number): Position => {
    let line = lineStarts.length;
    while (line > 1 && (lineStarts[line - 1] as number) > offset) line--;
    return { line, column: offset - (lineStarts[line - 1] as number) + 1 };
  };
  const positions = new Map<string, Position>();
  const stack: Frame[] = [];
  /** The path of the value that comes now; undefined = it is a mapping's key. */
  const valuePath = (): string | undefined => {
    const frame = stack.at(-1);
    if (!frame) return '';
    const join = (name: string) => (frame.path === '' ? name : `${frame.path}.${name}`);
    if (!frame.mapping) return join(String(frame.index++));
    if (frame.key === undefined) return undefined;
    const path = join(frame.key);
    frame.key = undefined;
    return path;
  };
  let inDocument = false;
  for (const event of parseEvents(text, {})) {
    if (event.type === EVENT_SCALAR) {
      const path = valuePath();
      const frame = stack.at(-1);
      if (path === undefined && frame) {
        frame.key = getScalarValue(text, event);
        positions.set(frame.path === '' ? frame.key : `${frame.path}.${frame.key}`, place(event.valueStart));
      } else if (path && !positions.has(path)) {
        positions.set(path, place(event.valueStart));
      }
    } else if (event.type === EVENT_MAPPING || event.type === EVENT_SEQUENCE) {
      const path = valuePath() ?? '';
      if (path !== '' && !positions.has(path)) positions.set(path, place(event.start));
      stack.push({ path, mapping: event.type === EVENT_MAPPING, index: 0, key: undefined });
    } else if (event.type === EVENT_ALIAS) {
      valuePath();
    } else if (event.type === EVENT_POP) {
      stack.pop();
    } else {
      inDocument = true;
    }
  }
  return inDocument ? positions : undefined;
}
