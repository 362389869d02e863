/** The parity suite of the CPU on the GPU: float32 products are not rounded to TF32, so the same limits hold. */
import { device } from '../support/device.js';
import { float32Parity } from '../support/llava-parity.js';

float32Parity(device);
