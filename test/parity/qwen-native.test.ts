import { qwenFloat32Parity } from '../support/qwen-parity.js';

qwenFloat32Parity('cpu');
