#!/usr/bin/env bash
# What runs on a GPU machine without Node and network; scripts/gpu/pack.sh made .gpu/runtime.tar.xz before.
#
#   bash scripts/gpu/all.sh info                    machine and versions
#   bash scripts/gpu/all.sh test [filter …]         npm run test:gpu
#   bash scripts/gpu/all.sh bench [options]         npm run bench (bench/run.mjs says which options)
#   bash scripts/gpu/all.sh train-base [options]    examples/quickstart/make/train-base.mjs; the model comes back as $OUT/model.tar
#   bash scripts/gpu/all.sh profile [shape] [rows]  time by kernel of a training step of martlet (Nsight Compute)
#
# LIMIT: seconds for the whole call, build included (default 580). Logs and results go to $OUT (default: build/gpu-out).
set -uo pipefail
cd "$(dirname "$0")/../.."
limit=${LIMIT:-580}
export OUT=${OUT:-$PWD/build/gpu-out} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
stage=${1:?info, test, bench, train-base or profile}
shift
log=$OUT/$stage.log
left() { echo $((limit - SECONDS)); }

source scripts/gpu/setup.sh || exit
echo "$stage: built after $SECONDS s, $(left) s left" | tee "$log"

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
    # A few seconds of the limit stay for the last results.
    timeout -k 5 "$(left)" node bench/run.mjs --budget "$(($(left) - 10))" "$@" 2>&1 | tee -a "$log"
    ;;
  train-base)
    timeout -k 5 "$(left)" node examples/quickstart/make/train-base.mjs --out /tmp/martlet-base-model "$@" 2>&1 | tee -a "$log" &&
      tar -C /tmp/martlet-base-model -cf "$OUT/model.tar" .
    ;;
  profile)
    shape=${1:-llava-7b} rows=${2:-8} dir=${BENCH_DIR:-/tmp}/martlet-bench-${1:-llava-7b}
    plan="{\"dir\":\"$dir\",\"device\":\"cuda\",\"tasks\":[{\"kind\":\"load\"},{\"kind\":\"train\",\"batch\":$rows,\"warmup\":1,\"steps\":1}]}"
    python3 bench/make_checkpoint.py --shape "$shape" --out "$dir" --device cuda 2>&1 | tee -a "$log" &&
      timeout -k 5 "$(left)" ncu --target-processes all --clock-control none --cache-control none --metrics gpu__time_duration.sum \
        --print-units base --csv --log-file /tmp/kernels.csv "$(command -v node)" bench/martlet.mjs "$plan" 2>&1 | tail -20 | tee -a "$log"
    node bench/kernels.mjs /tmp/kernels.csv 2 2>&1 | tee "$OUT/kernels.txt"
    gzip -c /tmp/kernels.csv > "$OUT/kernels.csv.gz"
    ;;
  *)
    echo "no stage $stage" >&2
    exit 2
    ;;
esac
status=$?
echo "$stage: ended with $status after $SECONDS s" | tee -a "$log"
exit $status
