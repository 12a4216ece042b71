#!/bin/sh
# What a machine with a GPU has to show: does it build, is it right, is it clean, how fast is it.
#
#   sh benchmarks/gpu_check.sh build       # compile for this generation of GPU and install
#   sh benchmarks/gpu_check.sh test        # tests/gpu, file by file; what passed is not run again
#   sh benchmarks/gpu_check.sh sanitize    # the smaller tests under compute-sanitizer, where there is one
#   sh benchmarks/gpu_check.sh bench       # every script of benchmarks/gpu; what has a report is not run again
#   sh benchmarks/gpu_check.sh bench NAME  # one of them: sae, pursuit, decoder_7b
#   sh benchmarks/gpu_check.sh clean       # forget what passed
#
# Each step takes less than eight minutes; a command that was cut short goes on where it stopped. Logs and reports
# go to ${OUT:-build/gpu}. ARCHS (90a) is what is compiled for, PYTHON (python3) the interpreter. Needs nvcc, CMake,
# ninja, torch, scikit-build-core and nanobind, no network.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/gpu}
state=build/gpu-state
python=${PYTHON:-python3}
mkdir -p "$out" "$state"
failed=0

# step NAME SECONDS COMMAND...: runs a command unless it has succeeded before, and keeps its output.
step() {
  name=$1 seconds=$2
  shift 2
  if [ -e "$state/$name" ]; then
    echo "== $name: done before"
    return
  fi
  begun=$(date +%s)
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    touch "$state/$name"
    verdict=ok
  else
    verdict="FAILED ($?)"
    failed=1
  fi
  echo "== $name: $verdict, $(($(date +%s) - begun)) s"
  tail -n "${LINES_SHOWN:-25}" "$out/$name.log"
}

case "${1:-}" in
  build)
    rm -f "$state/build"
    step build 460 "$python" -m pip install --no-build-isolation --no-deps --no-index -v \
      -C cmake.define.DACO_RT_CUDA=ON -C cmake.define.DACO_RT_TORCH=ON -C "cmake.define.DACO_RT_CUDA_ARCHS=${ARCHS:-90a}" .
    ;;
  test)
    for file in tests/gpu/test_*.py; do
      step "$(basename "$file" .py)" 440 "$python" -m pytest -q -x --durations=5 -p no:cacheprovider "$file"
    done
    ;;
  sanitize)
    if ! command -v compute-sanitizer >/dev/null; then
      echo "no compute-sanitizer on PATH" >&2
      exit 1
    fi
    for tool in memcheck racecheck synccheck initcheck; do
      step "sanitize-$tool" 115 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -x -p no:cacheprovider tests/gpu/test_sae_gpu.py tests/gpu/test_pursuit_gpu.py \
        -k "rows_without or (equals_reference and rows1 and topk and bf16) or (affine and 48-1 and fp16) or broken_rows or (odd_sizes and shape1 and positive)"
    done
    ;;
  bench)
    for script in benchmarks/gpu/*.py; do
      grep -q __main__ "$script" || continue
      name=$(basename "$script" .py)
      [ "${2:-$name}" = "$name" ] || continue
      LINES_SHOWN=60 step "bench-$name" 460 "$python" "$script" --output "$out/gpu_$name.json"
    done
    ;;
  clean) rm -rf "$state" ;;
  *)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
exit $failed
