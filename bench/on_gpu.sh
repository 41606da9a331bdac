#!/usr/bin/env bash
# Build, test, check with compute-sanitizer and measure on a machine with a CUDA GPU.
#
#     bench/on_gpu.sh OUT [build test sanitize bench tune]
#
# Each stage has its own time limit; the first four, which run where none is named, end within 9 minutes. `tune` looks for better block
# sizes and leaves them in OUT/tuned.json. Tables are written row by row, so that a run that is cut leaves valid ones. OUT gets at most
# 8 files: environment.txt, stages.csv, a log per stage (that of tune goes to bench.log), gpu.csv with the measured rows, tuned.json. The
# exit code is 0 where every stage that ran is good. Without a GPU the stages run as far as they can and say what they skip.
#
# PYTHON: the interpreter that has torch (default python3); nothing is downloaded and nothing is installed into it.
# CUDACXX, CXX: compilers. SITE: where the package goes (kept, so that a later stage can run alone). LIMIT_<STAGE>: seconds.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || STAGES=(build test sanitize bench)
PYTHON=${PYTHON:-python3}
SITE=${SITE:-$PWD/build/gpu/site}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
LIMIT_BUILD=${LIMIT_BUILD:-120} LIMIT_TEST=${LIMIT_TEST:-150} LIMIT_SANITIZE=${LIMIT_SANITIZE:-100} LIMIT_BENCH=${LIMIT_BENCH:-160} LIMIT_TUNE=${LIMIT_TUNE:-300}
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# What Triton compiles once serves every stage.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/gpu/triton}
for stage in "${STAGES[@]}"; do
  case $stage in build | test | sanitize | bench | tune) ;; *) echo "on_gpu: stages are build, test, sanitize, bench and tune, got $stage." >&2; exit 2 ;; esac
done

environment() {
  date -u +'date %Y-%m-%dT%H:%M:%SZ'
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git status --porcelain --untracked-files=no 2>/dev/null | grep -q . && echo +)"
  "$PYTHON" - <<'EOF'
import importlib.metadata, platform
for name in ("torch", "triton", "numpy", "timm", "torchvision", "pybind11", "scikit-build-core", "cmake"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
print("python", platform.python_version())
try:
    import torch
    print("torch's cuda", torch.version.cuda)
    for k in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(k)
        print(f"device {k}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 20} MiB")
except ImportError as error:
    print("torch does not load:", error)
EOF
  command -v nvcc >/dev/null && nvcc --version | tail -n 2 || echo "nvcc not found"
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem --format=csv || echo "nvidia-smi not found"
  command -v compute-sanitizer >/dev/null && compute-sanitizer --version | head -n 3 || echo "compute-sanitizer not found"
}

stage_build() {
  local cuda=ON
  command -v nvcc >/dev/null || [ -n "${CUDACXX:-}" ] || { cuda=AUTO; echo "build: nvcc is not found; the cuda backend will be missing."; }
  rm -rf "$SITE"
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$PYTHON" -m pip install --no-deps --no-build-isolation --no-index --no-cache-dir --disable-pip-version-check \
    --no-compile --quiet --upgrade --target "$SITE" -C build-dir=build/gpu/cmake -C cmake.define.MWM_CUDA="$cuda" . || return 1
  "$PYTHON" -m mwm info
}

built() {
  [ -d "$SITE/mwm" ] && return 0
  echo "$1: the package is not built; run the stage build first."
  return 1
}

run_pytest() {
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist worksteal)
  OMP_NUM_THREADS=2 "$PYTHON" -m pytest -p no:cacheprovider -W default -q -m gpu "${parallel[@]}" "$@"
  local code=$?
  [ $code -eq 5 ] && { echo "test: no test was selected."; return 1; }
  return $code
}

stage_test() {
  built test || return 1
  [ "$GPU" = 1 ] || echo "test: no CUDA device; the tests below skip."
  local bad=0 files
  # Only files that have something for a GPU: others may import what this machine lacks.
  mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests | sed 's|/conftest\.py$||' | sort -u |
    awk '{ for (folder in seen) if (index($0, folder "/") == 1) next; seen[$0]; print }')
  echo "== masks of the golden file: cuda and triton (cpu and reference are held to it by tests/ops)"
  run_pytest tests/cuda tests/kernels -k golden || bad=1
  "$PYTHON" -m pytest -p no:cacheprovider -W default -q tests/ops/test_sample_active.py -k golden || bad=1
  echo "== everything else that needs a GPU"
  run_pytest "${files[@]}" -k 'not golden' || bad=1
  return $bad
}

# A tool counts only after it has flagged a kernel that is wrong on purpose, and passed one that is right.
sanitize_one() {
  local tool=$1 log=$SCRATCH/$1.log
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$SCRATCH/known_bad" "$tool" >"$log" 2>&1
  local code=$?
  if [ $code -ne 9 ]; then
    echo "$tool: did not flag the known-bad kernel (exit code $code); its other results could not be trusted."
    tail -n 5 "$log"
    return 1
  fi
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$SCRATCH/known_bad" right >"$log" 2>&1 || { echo "$tool: flagged a kernel that is right."; tail -n 5 "$log"; return 1; }
  local bad=0 backend
  for backend in cuda triton; do
    # Without torch's cache every tensor is an allocation of its own, with bounds that the tool knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all "$PYTHON" tests/sanitize/gpu_set.py $backend >"$log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then
      echo "$tool, $backend: flagged the known-bad kernel, nothing in ours"
    else
      echo "$tool, $backend: findings or failures (exit code $code)"
      grep -v '^=========     Host Frame' "$log" | head -n 60
      bad=1
    fi
  done
  return $bad
}

stage_sanitize() {
  built sanitize || return 1
  [ "$GPU" = 1 ] || { echo "sanitize: skipped, no CUDA device."; return 0; }
  command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not installed."; return 1; }
  nvcc -arch=native -lineinfo -o "$SCRATCH/known_bad" tests/sanitize/known_bad.cu || return 1
  # Once without a tool: compiles what Triton needs, and shows an error that is not the sanitizer's.
  "$PYTHON" tests/sanitize/gpu_set.py || return 1
  local pids=() bad=0 tool
  for tool in memcheck racecheck initcheck; do
    sanitize_one "$tool" >"$SCRATCH/$tool.words" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || bad=1; done
  cat "$SCRATCH"/*.words
  return $bad
}

stage_bench() {
  built bench || return 1
  local smoke=() bad=0 name code left end names
  [ "$GPU" = 1 ] || { echo "bench: skipped, no CUDA device."; return 0; }
  [ -n "${SMOKE:-}" ] && smoke=(--smoke)
  # The figures that the issue's bars need come first; what the time limit cuts is the tail.
  read -ra names <<<"${BENCHES:-masks layers depthwise encoder memory step}"
  end=$(($(date +%s) + LIMIT_BENCH - 5)) left=${#names[@]}
  for name in "${names[@]}"; do
    # Each has its share of the time that is left; what one does not need goes to the others.
    local share=$(((end - $(date +%s)) / left))
    left=$((left - 1))
    echo "== $name, at most $share s"
    [ $share -ge 5 ] || { echo "$name: no time is left."; bad=1; continue; }
    timeout --kill-after=5 $share "$PYTHON" -m mwm.bench.gpu_suite "$name" --csv "$OUT/gpu.csv" "${smoke[@]}"
    code=$?
    [ $code -eq 0 ] || { echo "$name: exit code $code$([ $code -ge 124 ] && echo ', cut at its limit')"; bad=1; }
  done
  return $bad
}

stage_tune() {
  built tune || return 1
  [ "$GPU" = 1 ] || { echo "tune: skipped, no CUDA device."; return 0; }
  "$PYTHON" -m mwm tune --quick --out "$OUT/tuned.json"
}

environment >"$OUT/environment.txt" 2>&1
GPU=0
grep -q '^device 0:' "$OUT/environment.txt" && GPU=1
[ -s "$OUT/stages.csv" ] || echo "stage,seconds,limit,exit code,last words" >"$OUT/stages.csv"
FAILED=0
export -f stage_build stage_test stage_sanitize stage_bench stage_tune sanitize_one run_pytest built
export OUT PYTHON SITE SCRATCH GPU LIMIT_BENCH
for stage in "${STAGES[@]}"; do
  limit=LIMIT_${stage^^} log=$OUT/$stage.log
  [ "$stage" = tune ] && log=$OUT/bench.log || : >"$log"
  start=$(date +%s)
  timeout --kill-after=5 "${!limit}" bash -c "set -uo pipefail; stage_$stage" >>"$log" 2>&1
  code=$?
  seconds=$(($(date +%s) - start))
  words=$(grep -v '^$' "$log" | tail -n 1 | tr -d '",' | cut -c 1-160)
  [ $code -eq 124 ] || [ $code -eq 137 ] && words="cut at its limit; $words"
  echo "$stage,$seconds,${!limit},$code,$words" >>"$OUT/stages.csv"
  echo "on_gpu: $stage took $seconds of ${!limit} s, exit code $code: $words"
  [ $code -eq 0 ] || { FAILED=1; tail -n 25 "$log"; }
  # Without the package there is nothing to test.
  [ "$stage" = build ] && [ $code -ne 0 ] && break
done
exit $FAILED
