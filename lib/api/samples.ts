/** Turns encoded rows into the arguments and buffers of a native job. */
import type { ImageArg, SampleArg } from '../native/binding.js';
import type { EncodedSample, RgbImage } from '../processing/types.js';

/** Collects the buffers of one job; arguments refer to them by index. */
export class JobBuffers {
  readonly buffers: ArrayBufferView[] = [];

  add(buffer: ArrayBufferView): number {
    return this.buffers.push(buffer) - 1;
  }

  image(image: RgbImage): ImageArg {
    const { data, ...rest } = image;
    return { buffer: this.add(data), ...rest };
  }

  sample(sample: EncodedSample, id?: string): SampleArg {
    return {
      inputIds: this.add(sample.inputIds),
      ...(sample.labels && { labels: this.add(sample.labels) }),
      images: sample.images.map((image) => this.image(image)),
      ...(id !== undefined && { id }),
    };
  }
}
