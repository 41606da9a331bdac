#!/usr/bin/env bash
# Run a piece of a study on a machine with a CUDA GPU, several cells at once, and bring back what is finished.
#
#     bench/study_on_gpu.sh OUT
#
# Called again with the archive of the piece before, it goes on with the cells that are left. A piece begins no cell after LIMIT seconds and ends
# those in flight; at 9 minutes a piece fits machines that are lent for 10. OUT gets cells.tgz (results of finished cells and regions, no weights and no images),
# cells.zip (`mwm study --pack`: what tables need, without names; small enough to keep beside them), study.log, workers.log, gpu.csv (load and memory over time)
# and environment.txt. The tables are made from either: `tar -xzf` or `mwm study --unpack`, then `mwm study --report`.
#
# CONFIG: the study (default studies/main.yaml). DATA: folder of the data sets. STUDY: where it runs (default: a new temporary folder).
# EARLIER: cells.tgz of earlier pieces, or their cells.zip where the other is lost: regions are then made anew, and tables say so where they came out otherwise. WORKERS: cells at a time (default 10). LIMIT: seconds (default 500). PYTHON: the interpreter.
# MPS: 0 leaves out NVIDIA's multi-process service, a daemon of this script's own that ends with it. Without it processes take turns on the GPU, and
# each of them spends its turn launching; that twelve cells at a time gained little by it is a guess (bench/NOTES.md), and MPS here is untried.
# No encoder comes back: fifteen of ResNet-50 are 1.4 GB in float32, and a smaller export would be other weights. What pre-training made is there for
# all tasks of a cell that end in the same piece, and lost to those of a later piece, which pre-train again (the log says which, and how long that took).
# So a study whose last blocks add tasks to earlier cells (detect in main.yaml) is best run cell by cell: ONLY=brain_mri/region/0 (or /0, or
# brain_mri/region) runs all blocks of the cells that it names in one piece, in the order of the file; take as few cells as end within LIMIT.
# ONLY: cells whose name contains this. SITE: where mwm is installed; left out: the interpreter has it.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -eq 1 ] || { sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
PYTHON=${PYTHON:-python3} CONFIG=${CONFIG:-studies/main.yaml} WORKERS=${WORKERS:-10} LIMIT=${LIMIT:-500}
[ -n "${DATA:-}" ] || { echo "study_on_gpu: DATA must name the folder of the data sets." >&2; exit 2; }
STUDY=${STUDY:-$(mktemp -d)}
mkdir -p "$STUDY"
[ -n "${SITE:-}" ] && export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/gpu/triton}
case "${EARLIER:-}" in
  "") ;;
  *.zip) "$PYTHON" -m mwm study "$CONFIG" --root "$DATA" --out "$STUDY" --unpack "$EARLIER" || exit 2 ;;
  *) tar -C "$STUDY" -xzf "$EARLIER" || exit 2 ;;
esac

{ date -u +'date %Y-%m-%dT%H:%M:%SZ'; git rev-parse HEAD 2>/dev/null; "$PYTHON" -m mwm info; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; } >"$OUT/environment.txt" 2>&1
echo "seconds,gpu_percent,memory_mib" >"$OUT/gpu.csv"
( start=$(date +%s); while sleep 2; do echo "$(($(date +%s) - start)),$(nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader,nounits 2>/dev/null | tr -d ' ')" >>"$OUT/gpu.csv"; done ) &
WATCH=$!
if [ "${MPS:-1}" = 1 ] && command -v nvidia-cuda-mps-control >/dev/null; then
  export CUDA_MPS_PIPE_DIRECTORY=$STUDY/.mps CUDA_MPS_LOG_DIRECTORY=$STUDY/.mps-log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
fi
trap 'kill $WATCH 2>/dev/null; [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | nvidia-cuda-mps-control' EXIT
"$PYTHON" -m mwm study "$CONFIG" --root "$DATA" --out "$STUDY" --workers "$WORKERS" --threads 1 --budget "$LIMIT" --only "${ONLY:-}" >"$OUT/study.log" 2>&1
CODE=$?
cp "$STUDY/workers.log" "$OUT/workers.log" 2>/dev/null
# Whole cells alone: what a cut left half done is made anew. Folds come along as text. Regions come along whole: trained anew on a GPU they need not be the same.
( cd "$STUDY" && find cells -name cell.json -printf '%h\n' | sort >.finished
  tar -czf "$OUT/cells.tgz" --exclude='*.safetensors' --exclude='*.pt' --exclude='tensorboard' --exclude='*.png' -T .finished study.yaml folds/*/*.csv folds/*/folds.json \
    $([ -d regions ] && echo regions) )
[ -s "$STUDY/.finished" ] && "$PYTHON" -m mwm study --pack "$OUT/cells.zip" --out "$STUDY" >>"$OUT/study.log" 2>&1
tail -n 40 "$OUT/study.log"
exit $CODE
