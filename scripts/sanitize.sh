#!/usr/bin/env bash
# The op tests on a core built with AddressSanitizer + UndefinedBehaviorSanitizer, and on one built with ThreadSanitizer; and the CUDA
# sources' tests on their emulation with the first two. Each build must first flag the kernels of tests/sanitize/known_bad.cpp (the
# emulation: a write past the end that it is made to do), or its clean run would mean nothing.
#
#     scripts/sanitize.sh [address thread cuda]
#
# PYTHON: an interpreter with mwm's test dependencies. SCRATCH: where the builds go (kept, so that a second run is short).
# Linux, g++. Only this machine's best instruction set is built, and only the core is instrumented, not Python or torch.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SCRATCH=$(realpath -m "${SCRATCH:-build/sanitize}")
CXX=${CXX:-g++}
ISA=${MWM_CPU_ISA:-$("$PYTHON" -c 'from mwm import _core; print(_core.isas()[0])')}
export MWM_CPU_ISA=$ISA PATH="$(dirname "$PYTHON"):$PATH"
# Left out: torch's own checks of registration, loops on the OpenMP runtime (not instrumented), other processes, and the one timing.
SELECTED='not opcheck and not cost_far_less and not instruction_set_that_is_not_there and not (threads and (openmp or fork or spawn or torchs_own))'

library() { # path of a runtime that the compiler links
  local path
  path=$(realpath "$("$CXX" -print-file-name="$1")")
  [ -f "$path" ] || { echo "sanitize: $CXX has no $1. Set CXX to a g++ with its sanitizer runtimes." >&2; exit 1; }
  echo "$path"
}

build() { # kind, sanitizers
  local out=$SCRATCH/$1
  cmake -S . -B "$out" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER="$CXX" -DMWM_SANITIZE="$2" -DMWM_ONLY_ISA="$ISA" \
    -DPython_EXECUTABLE="$(realpath -s "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$out.log" 2>&1 || { cat "$out.log" >&2; exit 1; }
  cmake --build "$out" || exit 1
  rm -rf "$out/site"
  mkdir -p "$out/site/mwm"
  ln -s "$PWD"/python/mwm/* "$out/site/mwm/"
  ln -s "$PWD/bench" "$PWD/kernels" "$out/site/mwm/"
  ln -s "$out"/_core.*so "$out/site/mwm/"
}

run() { # kind, arguments of tests/sanitize/run.py
  local kind=$1 preload
  shift
  case $kind in
    address) preload="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)" ;;
    thread) preload="$(library libtsan.so) $(library libstdc++.so)" ;;
  esac
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1" \
    "$PYTHON" tests/sanitize/run.py "$SCRATCH/$kind/site" "$@"
}

must_flag() { # kind, kernel, text of the report
  local log=$SCRATCH/$1-$2.log
  if run "$1" known-bad "$2" >"$log" 2>&1 || ! grep -q "$3" "$log"; then
    cat "$log" >&2
    echo "sanitize: the $1 build did not flag the known-bad kernel $2; its other results cannot be trusted." >&2
    exit 1
  fi
  echo "sanitize: $2 was flagged ($(grep -o "$3" "$log" | head -n 1))"
}

tests() { # kind, pytest arguments
  echo "sanitize: op tests, $1, $ISA"
  run "$1" tests -q -p no:cacheprovider "${@:2}" || { echo "sanitize: findings or failures under $1." >&2; exit 1; }
}

emulated() { # command and arguments of the interpreter
  MWM_EMULATE_SANITIZE=1 LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 "$PYTHON" "$@"
}

# A view that says more than its tensor has makes a right kernel write past the end.
emulation_must_flag() {
  local log=$SCRATCH/cuda-write_past_the_end.log
  PYTHONPATH=tests/cuda "$PYTHON" -c 'import os; os.environ["MWM_EMULATE_SANITIZE"] = "1"; import emulator; emulator.build()' || exit 1
  if PYTHONPATH=tests/cuda emulated -c 'import emulator, torch; ids = torch.zeros(1, dtype=torch.int64); out = torch.zeros(1, dtype=torch.int64)
emulator.load().random_words((ids.data_ptr(), (1,), (1,), 4), 0, 0, 0, 0, (out.data_ptr(), (1, 64), (64, 1), 4), 0, 0)' >"$log" 2>&1 ||
    ! grep -q 'ERROR: AddressSanitizer' "$log"; then
    cat "$log" >&2
    echo "sanitize: the emulation did not flag a write past the end; its other results cannot be trusted." >&2
    exit 1
  fi
  echo "sanitize: a write past the end was flagged"
}

mkdir -p "$SCRATCH"
for kind in "${@:-address thread cuda}"; do
  for one in $kind; do
    case $one in
      address)
        build address address,undefined
        must_flag address read_past_the_end 'ERROR: AddressSanitizer: [a-z-]*'
        must_flag address overflow_signed 'signed integer overflow'
        must_flag address load_misaligned 'load of misaligned address'
        tests address tests/ops -m 'not slow' -k "$SELECTED"
        ;;
      thread)
        build thread thread
        must_flag thread write_one_element_from_two_threads 'WARNING: ThreadSanitizer: data race'
        tests thread tests/ops -m 'not slow' -k "$SELECTED"
        ;;
      cuda)
        emulation_must_flag
        emulated -m pytest -q -p no:cacheprovider tests/cuda -k 'not beyond_two_to_the_31 and not test_cuda_build' ||
          { echo "sanitize: findings or failures in the emulation." >&2; exit 1; }
        ;;
      *) echo "sanitize: kinds are address, thread and cuda, got $one." >&2; exit 1 ;;
    esac
  done
done
echo "sanitize: no findings."
