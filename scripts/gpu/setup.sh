# Sourced on the GPU machine, in the project's folder: unpacks .gpu/runtime.tar.xz, builds the addon against python3's torch, puts node on the PATH.
set -e
if [ ! -d /tmp/runtime ]; then tar -C /tmp -xf .gpu/runtime.tar.xz; fi
export PATH=/tmp/runtime/bin:$PATH LIBTORCH_USE_PYTORCH=1
rm -rf node_modules dist
ln -sfn /tmp/runtime/node_modules node_modules
cp -r /tmp/runtime/dist dist
modules=$PWD/node_modules
cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/Release" \
  -DCMAKE_JS_INC="$modules/node-api-headers/include;$modules/node-addon-api" > /tmp/configure.log || { cat /tmp/configure.log; exit 1; }
cmake --build build/cmake --parallel 16 > /tmp/build.log 2>&1 || { grep -E "error|Error" /tmp/build.log | head -30; exit 1; }
set +e
