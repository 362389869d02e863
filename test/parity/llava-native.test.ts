import { float32Parity } from '../support/llava-parity.js';

float32Parity('cpu');
