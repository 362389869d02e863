#!/usr/bin/env bash
# A digest of what the native build is made of.
cd "$(dirname "$0")/../.."
find native cmake CMakeLists.txt -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
