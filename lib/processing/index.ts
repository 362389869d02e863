export { loadProcessor } from './registry.js';
export type {
  ChatMessage,
  ContentPart,
  EncodedSample,
  EncodeOptions,
  GenerationDefaults,
  GroundingObjects,
  ImageSource,
  ParsedBox,
  Processor,
  ProcessorInput,
  ProcessorOptions,
  RgbImage,
  StreamDecoder,
  VideoSource,
  VisionOptions,
} from './types.js';
