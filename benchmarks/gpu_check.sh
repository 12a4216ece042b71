#!/bin/sh
# What a machine with a GPU has to show: does it build, is it right, is it clean, how fast is it.
#
#   sh benchmarks/gpu_check.sh all         # the most in twelve minutes, the most valuable first; see below
#   sh benchmarks/gpu_check.sh build       # compile for this generation of GPU             (about 1 minute)
#   sh benchmarks/gpu_check.sh test        # tests/gpu, file by file                        (about 3 minutes)
#   sh benchmarks/gpu_check.sh sanitize    # small calls under compute-sanitizer            (about 5 minutes)
#   sh benchmarks/gpu_check.sh bench       # every script of benchmarks/gpu                 (about 7 minutes)
#   sh benchmarks/gpu_check.sh bench NAME  # one of sae, pursuit, decoder_7b_b1, decoder_7b_b16
#   sh benchmarks/gpu_check.sh summary     # what has been found so far, as a table and as JSON
#   sh benchmarks/gpu_check.sh clean       # forget what passed
#
# `all` runs, in this order and within BUDGET (720) seconds; the times are estimates for an H200 with 16 cores,
# made from what each step compiles, starts and reads, and the second number is where a step is cut off:
#
#   build                         75 s  300   nvcc takes 40 s for its longest file
#   test_sae_gpu                  50 s  180   300 small problems and their float64 references
#   test_pursuit_gpu              50 s  180
#   test_tensorrt_plugin_gpu      60 s  180   100 nodes, a process each, and a compiler for the host
#   test_onnxruntime_gpu          10 s   60   skipped without the CUDA provider
#   sanitize-memcheck             40 s   90   six nodes of the plugin's host; without torch it starts quickly
#   sanitize-racecheck            60 s  120
#   bench-sae (compact)           45 s  150   20 cases of 15,000 x 4,096
#   bench-decoder_7b_b1 (compact) 80 s  180   half of it for the compiler of the blocks
#   bench-pursuit (compact)       60 s  180
#   bench-decoder_7b_b16 (compact) 80 s 180
#
# A step whose time is up is stopped, one that has no time left is not begun; both are done by the next call, and
# what passed is not run again. After each step its log, the reports and the summary are there: in build/gpu, and
# copied to $OUT if that names a folder. Reports grow case by case, so one that was cut short has its first cases.
#
# ARCHS (90a) is what is compiled for, PYTHON (python3) the interpreter, WHEELS (build/wheels) a folder of wheels
# to bring along, such as orthogonal_matching_pursuit_gpu, DACO_RT_COMMIT the commit where there is no repository.
# Needs nvcc, CMake, a C++ compiler, torch, NumPy, ml_dtypes, pytest and nanobind; no network. The adapters of
# ONNX Runtime and TensorRT want their headers in build/deps (cmake/fetch_*_headers.*).
set -u
cd "$(dirname "$0")/.." || exit 1
work=$PWD/build/gpu
state=$work/state
logs=$work/logs
site=$work/site
python=${PYTHON:-python3}
wheels=${WHEELS:-$PWD/build/wheels}
compact=
deadline=
failed=0
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin
PATH=$PATH:$(dirname "$(command -v "$python" || echo "$python")")
export PATH
# The build is found before whatever is installed; a compiler's results survive a call that was cut short.
export PYTHONPATH="$site:$work/wheels${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$work/cache/inductor" TRITON_CACHE_DIR="$work/cache/triton"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

refuse() {
  echo "gpu_check: $1" >&2
  exit 1
}

require() {
  command -v "$python" >/dev/null || refuse "there is no $python; name an interpreter that has torch in PYTHON"
  "$python" -c '
import sys
try:
    import torch
except ImportError:
    sys.exit(2)
sys.exit(0 if torch.cuda.is_available() else 3)' 2>/dev/null
  torch_says=$?
  case $torch_says in
    0 | 3) ;;
    *) refuse "$python cannot import torch; name an interpreter that can in PYTHON" ;;
  esac
  for what in "$@"; do
    case $what in
      build)
        for tool in nvcc cmake; do
          command -v $tool >/dev/null || refuse "$tool is not on PATH; the build needs nvcc 12.4 or later and CMake 3.25 or later"
        done
        ;;
      gpu)
        [ $torch_says -eq 0 ] ||
          refuse "torch finds no GPU here (torch.cuda.is_available() is false); run this on a machine with an NVIDIA GPU and its driver"
        ;;
      built)
        [ -e "$site/daco_rt/lib/libdaco_torch.so" ] ||
          refuse "nothing is built in build/gpu/site; run sh benchmarks/gpu_check.sh build first"
        ;;
      sanitizer)
        command -v compute-sanitizer >/dev/null || refuse "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        ;;
    esac
  done
}

# Everything found so far, where whoever started this looks for it.
publish() {
  "$python" benchmarks/gpu/summary.py "$work" >"$work/summary.txt" 2>&1
  if [ -n "${OUT:-}" ] && [ -d "$OUT" ]; then
    cp "$work"/*.json "$work"/summary.txt "$OUT"/
    tar -czf "$OUT/logs.tar.gz" -C "$work" logs
  fi
}

# step NAME SECONDS COMMAND...: runs a command unless it has succeeded before, keeps its output and its verdict.
step() {
  name=$1 seconds=$2
  shift 2
  if [ -e "$state/$name" ]; then
    echo "== $name: done before"
    return 0
  fi
  begun=$(date +%s)
  if [ -n "$deadline" ]; then
    left=$((deadline - begun))
    [ "$left" -lt "$seconds" ] && seconds=$left
  fi
  if [ "$seconds" -lt 5 ]; then
    verdict="not begun" result=1
  else
    timeout -k 10 "$seconds" "$@" >"$logs/$name.log" 2>&1
    result=$?
    case $result in
      0) verdict=ok ;;
      124 | 137) verdict="cut off" ;;
      *) verdict="failed ($result)" ;;
    esac
  fi
  if [ $result -eq 0 ]; then touch "$state/$name"; else failed=1; fi
  spent=$(($(date +%s) - begun))
  printf '%s\t%s\t%s\n' "$name" "$verdict" "$spent" >>"$work/steps.tsv"
  echo "== $name: $verdict, $spent s"
  [ "$verdict" = "not begun" ] || tail -n "${LINES_SHOWN:-12}" "$logs/$name.log"
  publish
  return $result
}

build_all() {
  rm -rf "$site/daco_rt"
  mkdir -p "$site/daco_rt" "$work/wheels"
  ln -s "$PWD"/python/daco_rt/* "$site/daco_rt/"
  ln -s "$PWD/export" "$site/daco_rt/export"
  for wheel in "$wheels"/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$work/wheels" "$wheel" || return
  done
  generator=
  command -v ninja >/dev/null && generator="-G Ninja"
  # shellcheck disable=SC2086
  cmake $generator -S . -B "$work/cmake" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_INSTALL_PREFIX=$site" \
    "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" \
    -DDACO_RT_CUDA=ON -DDACO_RT_TORCH=ON "-DDACO_RT_CUDA_ARCHS=${ARCHS:-90a}" &&
    cmake --build "$work/cmake" --parallel "$(nproc)" && cmake --install "$work/cmake" &&
    "$python" -c '
import sys
import torch
from daco_rt._native import load_torch_library
from daco_rt.ops import torch_ops
path = load_torch_library()
if not str(path).startswith(sys.argv[1]):
    sys.exit(f"daco_rt is taken from {path}, not from this build: uninstall the editable one first")
if not torch_ops._HAS_CUDA:
    sys.exit(f"{path} has no CUDA kernels")
print(f"loaded {path} in torch {torch.__version__}")
' "$site"
}

build() {
  rm -f "$state/build"
  # In a shell of its own, because timeout runs programs and not functions.
  step build 300 sh benchmarks/gpu_check.sh build-now
}

test_files() {
  # Where pytest-xdist is, the GPU is shared by four workers: most of a test is its reference on the CPU.
  workers=
  "$python" -c 'import xdist' 2>/dev/null && workers="-n 4"
  for name in test_sae_gpu test_pursuit_gpu test_tensorrt_plugin_gpu test_onnxruntime_gpu; do
    # shellcheck disable=SC2086
    step $name 180 "$python" -m pytest -q -rs $workers --maxfail=20 --tb=short --durations=5 \
      -p no:cacheprovider tests/gpu/$name.py
  done
}

# Nodes that the plugin's host runs, under the tool and without torch.
sanitize_nodes() {
  tool=$1 seconds=$2
  step "sanitize-$tool" "$seconds" env \
    DACO_RT_SANITIZER="compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all" \
    "$python" -m pytest -q -rs --tb=short -p no:cacheprovider tests/gpu/test_tensorrt_plugin_gpu.py -k small_nodes
}

# The same tools around torch: what only its adapter and its cases reach.
sanitize_torch() {
  step "sanitize-torch-$1" 110 compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider tests/gpu/test_sae_gpu.py tests/gpu/test_pursuit_gpu.py \
    -k "rows_without or (equals_reference and rows1 and topk and bf16) or (affine and 48-1 and fp16) or broken_rows or (odd_sizes and shape1 and positive)"
}

bench() {
  [ "${2:-$1}" = "$1" ] || return 0
  script=$1
  options=$compact
  case $1 in
    decoder_7b_b*) script=decoder_7b options="$compact --batch ${1##*_b}" ;;
  esac
  # shellcheck disable=SC2086
  LINES_SHOWN=40 step "bench-$1$compact" "$seconds_a_bench" "$python" benchmarks/gpu/$script.py $options \
    --output "$work/gpu_$1.json"
}

[ "${1:-}" = clean ] || mkdir -p "$state" "$logs"
case "${1:-}" in
  build-now) build_all ;;
  build)
    require build
    build
    ;;
  test)
    require gpu built
    test_files
    ;;
  sanitize)
    require gpu built sanitizer
    for tool in memcheck racecheck synccheck initcheck; do sanitize_nodes $tool 120; done
    for tool in memcheck initcheck; do sanitize_torch $tool; done
    ;;
  bench)
    case "${2:-sae}" in
      sae | pursuit | decoder_7b_b1 | decoder_7b_b16) ;;
      *) refuse "there is no benchmark $2; it is one of sae, pursuit, decoder_7b_b1, decoder_7b_b16" ;;
    esac
    require gpu built
    seconds_a_bench=460
    for name in sae pursuit decoder_7b_b1 decoder_7b_b16; do bench $name ${2:+"$2"}; done
    ;;
  all)
    require build gpu
    deadline=$(($(date +%s) + ${BUDGET:-720}))
    compact=--compact seconds_a_bench=180
    if build; then
      test_files
      if command -v compute-sanitizer >/dev/null; then
        sanitize_nodes memcheck 90
        sanitize_nodes racecheck 120
      fi
      for name in sae decoder_7b_b1 pursuit decoder_7b_b16; do bench $name; done
    fi
    cat "$work/summary.txt"
    ;;
  summary)
    publish
    cat "$work/summary.txt"
    ;;
  clean) rm -rf "$state" "$work/steps.tsv" ;;
  *)
    sed -n '2,42s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac || failed=1
exit $failed
