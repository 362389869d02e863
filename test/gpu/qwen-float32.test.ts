/** The parity suite of the CPU on the GPU: float32 products are not rounded to TF32, so the same limits hold. */
import { device } from '../support/device.js';
import { qwenFloat32Parity } from '../support/qwen-parity.js';

qwenFloat32Parity(device);
