#!/usr/bin/env bash
# Packs what a GPU machine without Node and network needs into .gpu/: a stripped Node, the modules used at run time, headers for the addon.
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
tar -C .gpu -c runtime | xz -T2 -6 > .gpu/runtime.tar.xz.tmp
mv .gpu/runtime.tar.xz.tmp .gpu/runtime.tar.xz
rm -rf .gpu/runtime
ls -la .gpu
