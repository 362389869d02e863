/** The device of test/gpu: `cuda`, or what MARTLET_TEST_DEVICE says while a test is written on a machine without one. */
export const device = process.env.MARTLET_TEST_DEVICE ?? 'cuda';
