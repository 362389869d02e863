export { loadProcessor } from './registry.js';
export type {
  ChatMessage,
  ContentPart,
  EncodedSample,
  EncodeOptions,
  GenerationDefaults,
  ImageSource,
  Processor,
  ProcessorInput,
  ProcessorOptions,
  RgbImage,
  StreamDecoder,
} from './types.js';
