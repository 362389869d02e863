# Sourced on the GPU machine, in the project's folder: unpacks .gpu/runtime.tar.xz, builds the addon against python3's torch, puts node on the PATH.
# RUNTIME (default /tmp/runtime) is where it unpacks.
set -e
RUNTIME=${RUNTIME:-/tmp/runtime}
packed=$(sha256sum < .gpu/runtime.tar.xz)
if [ "$(cat "$RUNTIME/packed" 2>/dev/null)" != "$packed" ]; then
  rm -rf "$RUNTIME" "$RUNTIME.tmp" && mkdir -p "$RUNTIME.tmp"
  tar -C "$RUNTIME.tmp" --strip-components=1 -xf .gpu/runtime.tar.xz
  echo "$packed" > "$RUNTIME.tmp/packed"
  mv "$RUNTIME.tmp" "$RUNTIME"
fi
export PATH=$RUNTIME/bin:$PATH LIBTORCH_USE_PYTORCH=1
export COMMIT=${COMMIT:-$(cat .gpu/commit)}
rm -rf node_modules dist
ln -sfn "$RUNTIME/node_modules" node_modules
cp -r "$RUNTIME/dist" dist
modules=$PWD/node_modules
# Files that were sent again may be older than what was built from their predecessors: their contents decide, not their times.
sources=$(bash scripts/gpu/sources.sh)
if [ -f .gpu/release.tar.xz ]; then rm -rf .gpu/Release && tar -C .gpu -xf .gpu/release.tar.xz; fi
if [ "$(cat .gpu/Release/sources 2>/dev/null)" = "$sources" ]; then
  mkdir -p build
  rm -rf build/Release
  cp -r .gpu/Release build/Release
elif [ "$(cat build/sources 2>/dev/null)" != "$sources" ]; then
  find native -type f -exec touch {} +
  cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/Release" \
    -DCMAKE_JS_INC="$modules/node-api-headers/include;$modules/node-addon-api" -DMARTLET_TESTS=ON -DMARTLET_CUDA_ARCHITECTURES=native > /tmp/configure.log || { cat /tmp/configure.log; exit 1; }
  cmake --build build/cmake --parallel "$(nproc)" --target martlet martlet_preload martlet_cuda martlet_cuda_tests > /tmp/build.log 2>&1 || { grep -E "error|Error" /tmp/build.log | head -30; exit 1; }
  echo "$sources" > build/sources
fi
set +e
