#!/usr/bin/env bash
# Build llama.cpp for CPUs from llama-cpp-python's source package, for `run.py --peer llama.cpp`:
#
#   benchmarks/build_llama_cpp.sh DIRECTORY     # then: export LLAMA_CPP_LIB_PATH=DIRECTORY
#
# DIRECTORY gets libllama and what it needs, compiled for this processor. That takes a few minutes;
# pip would compile its tools too. PYTHON is the interpreter whose pip downloads.
set -euo pipefail

readonly version=0.3.36
: "${1:?usage: build_llama_cpp.sh DIRECTORY}"
mkdir -p "$1"
directory=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "${work}"' EXIT

"${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary :all: --dest "${work}" \
  "llama-cpp-python==${version}"
tar -xzf "${work}"/llama_cpp_python-*.tar.gz -C "${work}"

# GCC before 12.4 and 13.3 takes _tile_loadconfig to read 8 bytes and drops the stores of the other
# 56 (GCC bug 114098), so that llama.cpp's AMX kernels end in an illegal instruction.
cat > "${work}/tiles.h" << 'HEADER'
#ifdef __AMX_TILE__
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
  __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
HEADER

cmake -S "${work}"/llama_cpp_python-*/vendor/llama.cpp -B "${work}/build" \
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
  -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
  -DCMAKE_C_FLAGS="-include ${work}/tiles.h" -DCMAKE_CXX_FLAGS="-include ${work}/tiles.h" \
  -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH="\$ORIGIN"
cmake --build "${work}/build" --target ggml-cpu llama --parallel "${JOBS:-1}"
cp -P "${work}"/build/bin/lib{ggml,llama}*.so* "${directory}"
echo "export LLAMA_CPP_LIB_PATH=${directory}"
