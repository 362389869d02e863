import type { SystemInfo } from '../native/binding.js';
import { loadAddon } from '../native/load.js';

export interface MartletSystemInfo extends SystemInfo {
  /** The .node file that is loaded. */
  addonPath: string;
  libtorchPath: string;
  /** Which rule found libtorch. */
  libtorchSource: string;
  nodeVersion: string;
}

/**
 * What martlet runs on: addon, libtorch, devices, memory, threads.
 *
 * @throws ERR_MARTLET_LIBTORCH_NOT_FOUND, ERR_MARTLET_LIBTORCH_MISMATCH
 */
export function getSystemInfo(): MartletSystemInfo {
  const { addon, path, libtorch } = loadAddon();
  const info = JSON.parse(addon.systemInfo()) as SystemInfo;
  return {
    ...info,
    torchVersion: libtorch.version ?? info.torchVersion,
    addonPath: path,
    libtorchPath: libtorch.root,
    libtorchSource: libtorch.source,
    nodeVersion: process.version,
  };
}
