#!/usr/bin/env bash
# Packs what a GPU machine without Node and network needs into .gpu/: a stripped Node, the modules used at run time, headers for the addon.
# With an argument, the unpacked torch wheel of that machine's version, the addon and its kernels are built here and packed too (needs nvcc; two
# minutes here for one there): setup.sh takes them if they are of the same sources.
set -euo pipefail
cd "$(dirname "$0")/../.."
node node_modules/typescript/bin/tsc -p .
rm -rf .gpu/runtime && mkdir -p .gpu/runtime/bin .gpu/runtime/node_modules
cp "$(command -v node)" .gpu/runtime/bin/node
strip .gpu/runtime/bin/node
for module in sharp @img js-yaml argparse zod @huggingface node-gyp-build detect-libc semver node-addon-api node-api-headers; do
  mkdir -p ".gpu/runtime/node_modules/$(dirname "$module")"
  cp -r "node_modules/$module" ".gpu/runtime/node_modules/$module"
done
find .gpu/runtime/node_modules -name '*.map' -delete
find .gpu/runtime/node_modules/@img -maxdepth 1 -name '*musl*' -exec rm -rf {} +
cp -r dist .gpu/runtime/dist
find .gpu/runtime/dist -name '*.map' -delete
tar -C .gpu -c runtime | xz -T2 -9e > .gpu/runtime.tar.xz.tmp
mv .gpu/runtime.tar.xz.tmp .gpu/runtime.tar.xz
rm -rf .gpu/runtime .gpu/Release .gpu/release.tar.xz
# That machine's copy has no history of its own; results name the commit that was packed.
echo "$(git rev-parse HEAD)$(git diff --quiet HEAD || echo -dirty)" > .gpu/commit
if [ -n "${1:-}" ]; then
  # Only linked here, never run: libraries of CUDA that libtorch itself needs are not looked for.
  LIBTORCH=$(realpath "$1") cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/gpu/Release" \
    -DCMAKE_JS_INC="$PWD/node_modules/node-api-headers/include;$PWD/node_modules/node-addon-api" -DMARTLET_TESTS=ON -DMARTLET_CUDA=ON \
    -DMARTLET_CUDA_ARCHITECTURES=90a -DCMAKE_EXE_LINKER_FLAGS=-Wl,--unresolved-symbols=ignore-in-shared-libs
  cmake --build build/gpu --target martlet martlet_preload martlet_cuda martlet_cuda_tests
  cp -r build/gpu/Release .gpu/Release
  strip --strip-unneeded .gpu/Release/*
  bash scripts/gpu/sources.sh > .gpu/Release/sources
  # Packed: all that travels may have 64 MiB.
  tar -C .gpu -c Release | xz -T2 -6 > .gpu/release.tar.xz
  rm -rf .gpu/Release
fi
ls -la .gpu
