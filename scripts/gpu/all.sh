#!/usr/bin/env bash
# What runs on a GPU machine without Node and network; scripts/gpu/pack.sh made .gpu/runtime.tar.xz before.
#
#   bash scripts/gpu/all.sh info                    machine and versions
#   bash scripts/gpu/all.sh test [filter …]         npm run test:gpu
#   bash scripts/gpu/all.sh bench [options]         npm run bench (bench/run.mjs says which options)
#   bash scripts/gpu/all.sh everything tests        npm run test:gpu; while the addon is built, the GPU makes the checkpoints of the next command
#   bash scripts/gpu/all.sh everything bench        all shapes in one run of the benchmark, short form: for the same machine, if it is still there
#   bash scripts/gpu/all.sh train-base [options]    examples/quickstart/make/train-base.mjs; the model comes back as $OUT/model.tar
#   bash scripts/gpu/all.sh sanitize [filter …]     the kernels' tests under compute-sanitizer: memcheck, racecheck
#   bash scripts/gpu/all.sh profile [shape] [rows]  time by kernel of a training step, and of a decoding step of a random 7B (Nsight Compute)
#
# LIMIT: seconds for the whole call, build included (default 580). Logs and results go to $OUT (default: build/gpu-out).
set -uo pipefail
cd "$(dirname "$0")/../.."
limit=${LIMIT:-580}
export OUT=${OUT:-$PWD/build/gpu-out} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
stage=${1:?info, test, bench, everything, train-base, sanitize or profile}
shift
log=$OUT/$stage.log
left() { echo $((limit - SECONDS)); }
say() { echo "$stage: $* after $SECONDS s, $(left) s left" | tee -a "$log"; }
: > "$log"

if [ "$stage" = everything ]; then
  part=${1:?tests or bench}
  shift
  stage="everything $part"
  shapes=(llava-7b qwen2.5-vl-7b qwen2-vl-2b)
  # 35 GB of checkpoints and 17 GB of a merged model: in memory if there is room.
  if [ -z "${BENCH_DIR:-}" ]; then
    BENCH_DIR=/tmp
    [ -e "/dev/shm/martlet-bench-${shapes[0]}" ] || [ "$(df --output=avail -B1G /dev/shm | tail -1)" -ge 56 ] && BENCH_DIR=/dev/shm
  fi
  export BENCH_DIR
  say "checkpoints in $BENCH_DIR"
  if [ "$part" = tests ]; then
    timeout 180 python3 bench/make_checkpoint.py --shape "${shapes[@]}" --out "$BENCH_DIR" --device cuda > "$OUT/checkpoints.log" 2>&1 &
    checkpoints=$!
  fi
fi

source scripts/gpu/setup.sh
say built

case $stage in
  info)
    {
      nvidia-smi
      nproc
      free -g
      df -h /tmp
      python3 -c 'import torch, transformers, peft; print(torch.__version__, torch.backends.cudnn.version(), transformers.__version__, peft.__version__)'
      node dist/lib/cli/main.js doctor
    } 2>&1 | tee -a "$log"
    ;;
  test)
    timeout -k 5 "$(left)" node scripts/gpu/test.mjs --built "$@" 2>&1 | tee -a "$log"
    ;;
  bench)
    # Checkpoints in memory where there is room for one and a merged model.
    if [ -z "${BENCH_DIR:-}" ] && [ "$(df --output=avail -B1G /dev/shm | tail -1)" -ge 40 ]; then export BENCH_DIR=/dev/shm; fi
    # A few seconds of the limit stay for the last results.
    timeout -k 5 "$(left)" node bench/run.mjs --budget "$(($(left) - 10))" "$@" 2>&1 | tee -a "$log"
    ;;
  'everything tests')
    # The tests of memory count every byte of the GPU: nothing else may be on it.
    wait "$checkpoints" || say "no checkpoints: $(tail -1 "$OUT/checkpoints.log")"
    tee -a "$log" < "$OUT/checkpoints.log"
    say 'checkpoints made, tests begin'
    timeout -k 5 "$(left)" node scripts/gpu/test.mjs --built "$@" 2>&1 | tee -a "$log"
    ;;
  'everything bench')
    names=${shapes[*]}
    timeout -k 5 "$(left)" node bench/run.mjs --only "${names// /,}" --quick --force --budget "$(($(left) - 10))" "$@" 2>&1 | tee -a "$log"
    ;;
  train-base)
    timeout -k 5 "$(left)" node examples/quickstart/make/train-base.mjs --out /tmp/martlet-base-model "$@" 2>&1 | tee -a "$log" &&
      tar -C /tmp/martlet-base-model -cf "$OUT/model.tar" .
    ;;
  sanitize)
    libtorch=$(python3 -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))')
    failed=0
    [ $# -gt 0 ] || set -- kernels/ fp8/ decode/ frozen_layer/
    for filter in "$@"; do
      for tool in memcheck racecheck; do
        LD_LIBRARY_PATH=$libtorch timeout -k 5 "$(left)" compute-sanitizer --tool "$tool" --print-limit 20 --error-exitcode 9 \
          build/Release/martlet_cuda_tests "$filter" > "$OUT/$tool-${filter%/}.txt" 2>&1
        code=$?
        [ "$code" -eq 0 ] || failed=$code
        say "$tool of $filter: exit $code, $(grep -E 'SUMMARY' "$OUT/$tool-${filter%/}.txt" | tail -1)"
      done
    done
    (exit "$failed")
    ;;
  profile)
    shape=${1:-llava-7b} rows=${2:-8} folder=${BENCH_DIR:-/tmp}
    profiler=(ncu --target-processes all --clock-control none --cache-control none --metrics gpu__time_duration.sum --print-units base --csv)
    [ -e "$folder/martlet-bench-$shape" ] || python3 bench/make_checkpoint.py --shape "$shape" --out "$folder" --device cuda 2>&1 | tee -a "$log"
    # The fourth step and later ones attend by cuDNN's plans.
    printf '%s\n' '{"kind":"load"}' "{\"kind\":\"train\",\"batch\":$rows,\"recompute\":false,\"warmup\":3,\"steps\":2}" |
      timeout -k 5 "$(left)" "${profiler[@]}" --log-file /tmp/kernels.csv "$(command -v node)" bench/martlet.mjs "$folder/martlet-bench-$shape" cuda 2>&1 |
      tail -20 | tee -a "$log"
    # The gradients' norm is formed once a step.
    node bench/kernels.mjs /tmp/kernels.csv NormTwoOps 2>&1 | tee "$OUT/kernels.txt"
    gzip -c /tmp/kernels.csv > "$OUT/kernels.csv.gz"
    LD_LIBRARY_PATH=$(python3 -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') timeout -k 5 "$(left)" \
      "${profiler[@]}" --log-file /tmp/decode-kernels.csv -k 'regex:matvec|attend|place|argmax|embed' -c 400 --kill yes \
      build/Release/martlet_cuda_tests "tokens/s of random" > /dev/null 2>&1
    node bench/kernels.mjs /tmp/decode-kernels.csv argmax 2>&1 | tee "$OUT/decode-kernels.txt"
    ;;
  *)
    echo "no stage $stage" >&2
    exit 2
    ;;
esac
status=$?
say "ended with $status"
exit $status
