#!/usr/bin/env bash
# Tests, figures and pictures from one data-center GPU in under nine minutes, on a machine without a network.
#
#   benchmarks/gpu_session.sh pack --dataset PHOTOS [--peer PATH/train_text_to_image.py]
#       on a machine with a package index: makes gpu_session/, which travels with the working tree
#   benchmarks/gpu_session.sh run [--tiny] [--limit STEP=SECONDS]… [STEP…]
#       on the GPU machine: runs all steps or the named ones, with results in $OUT (gpu_session/results). --tiny: a rehearsal on a CPU
#
# The most valuable steps come first. Each has its own time limit and keeps its output. None stops the next.
# $OUT gets session.txt (a line per step), CARD.jsonl (figures), log.txt (all output) and pictures.png. Exit code 1: a step failed.
set -uo pipefail
OUT=${OUT:+$(realpath -m "$OUT")}
PACKED=${GPU_SESSION_FOLDER:+$(realpath -m "$GPU_SESSION_FOLDER")}
cd "$(dirname "$0")/.." || exit 2
PACKED=${PACKED:-$PWD/gpu_session}
OUT=${OUT:-$PACKED/results}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit "$1"
}

say() { printf '%s\n' "$*" | tee -a "$OUT/session.txt"; }

# step NAME COMMAND…: run a command within its time limit, and keep its ending and its JSON lines
step() {
  local name=$1 begin=$SECONDS left=$((in_all - SECONDS)) ending=ok offset status took last
  local limit=${limits[$name]}
  shift
  [[ " $steps " == *" $name "* ]] || return 0
  if ((left < 5)); then
    say "$name: not started, since the time is over"
    failed=1
    return 1
  fi
  ((limit < left)) || limit=$left
  printf '\n== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
  offset=$(stat -c %s "$OUT/log.txt")
  timeout --preserve-status --kill-after=20 "$limit" "$@" >>"$OUT/log.txt" 2>&1 </dev/null
  status=$?
  took=$((SECONDS - begin))
  if ((status == 75)); then
    ending="stopped at its limit of $limit s with a checkpoint" # as a training is meant to
  elif ((status && took >= limit)); then
    ending="cut at its limit of $limit s"
  elif ((status)); then
    ending="failed with exit code $status"
  fi
  ((status == 0 || status == 75)) || failed=1
  local shown=${*//$work\//}
  "$PYTHON" benchmarks/gpu_session.py collect "$OUT/log.txt" "$offset" "$figures" "$name" "$took" "$ending" "${shown//$PWD\//}"
  last=$(tail -c "+$((offset + 1))" "$OUT/log.txt" | tr '\r' '\n' | grep -v -e '^{' -e '^ *$' | tail -n 1 | cut -c 1-160)
  say "$name: $ending, $took s${last:+: $last}"
  return "$status"
}

run() {
  local -A limits=([tests]=110 [train]=140 [vae]=50 [unet]=100 [pictures]=40 [gpu]=180)
  local order="tests train vae unet pictures gpu" steps="" tiny="" failed=0 wheels word
  while (($#)); do
    word=$1
    if [[ $word == --limit ]]; then
      shift
      word=--limit=${1:-}
    fi
    case $word in
      --tiny) tiny=1 ;;
      --limit=*=*)
        word=${word#--limit=}
        if [[ " $order " != *" ${word%=*} "* || ! ${word#*=} =~ ^[1-9][0-9]*$ ]]; then
          echo "error: --limit $word is not STEP=SECONDS; steps are $order" >&2
          exit 2
        fi
        limits[${word%=*}]=${word#*=}
        ;;
      *)
        if [[ " $order " != *" $word "* ]]; then
          echo "error: unknown step or option $word; steps are $order, options --tiny and --limit STEP=SECONDS" >&2
          exit 2
        fi
        steps+=" $word"
        ;;
    esac
    shift
  done
  steps=${steps:-$order}
  local in_all=500 # the last step may take 20 s more to end
  [[ -n $tiny ]] && in_all=3600
  mkdir -p "$OUT" && : >"$OUT/session.txt" && : >"$OUT/log.txt" || exit 2
  work=$(mktemp -d) || exit 2
  trap 'rm -rf "$work"' EXIT
  export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 BENCHMARK_RESULTS=$work/results

  # the machine, and its missing packages
  wheels=("$PACKED"/wheels/*.whl)
  if [[ -e ${wheels[0]} ]]; then
    timeout 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
      "${wheels[@]}" >>"$OUT/log.txt" 2>&1 || say "wheels: not installed; log.txt says why"
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
  fi
  local machine gpu card
  machine=$(timeout 60 "$PYTHON" benchmarks/gpu_session.py check) || exit 2
  gpu=$(sed -n 's/.*"gpu": "\([^"]*\)".*/\1/p' <<<"$machine")
  if [[ -z $gpu && -z $tiny ]]; then
    echo "error: PyTorch finds no NVIDIA GPU here; give --tiny for a rehearsal on the CPU" >&2
    exit 2
  fi
  card=$(sed -E 's/^(NVIDIA|Tesla) //; s/ .*//; s/[^A-Za-z0-9.-]/-/g' <<<"${gpu:-cpu}" | tr '[:upper:]' '[:lower:]')
  figures=$OUT/$card.jsonl
  printf '%s\n' "$machine" >"$figures"
  say "machine: ${gpu:-CPU}, $SECONDS s"

  # shared by the steps
  local recipe=benchmarks/flagship.yaml photos=$PACKED/photos prompts=$PACKED/prompts.txt peer=$PACKED/train_text_to_image.py
  [[ -n $tiny ]] && recipe=benchmarks/flagship_tiny.yaml
  if [[ ! -d $photos && " $steps " == *" vae "* ]]; then
    say "photos: none in ${PACKED##*/}/, so the flagship trains on drawn flowers"
    photos=$work/photos prompts=$work/prompts.txt
    timeout 60 "$PYTHON" scripts/make_flowers.py --output_dir "$photos" --count "$([[ -n $tiny ]] && echo 40 || echo 4000)" \
      --validation_count 8 --test_count 4 --size "$([[ -n $tiny ]] && echo 32 || echo 128)" >>"$OUT/log.txt" 2>&1
    printf 'a single %s flower\n' red white blue yellow >"$prompts"
  fi
  local shared=(--config "$recipe" --dataset "$photos" --cache_dir "$work/cache" --report_to none)
  local xdist=()
  [[ -z $tiny ]] && "$PYTHON" -c "import xdist" 2>>"$OUT/log.txt" && xdist=(-n 4)
  local precision=bf16
  [[ -z $gpu ]] && precision=no && export ACCELERATE_USE_CPU=true

  # the steps
  step tests "$PYTHON" -m pytest tests/test_gpu.py -rfE --tb=short "${xdist[@]}"
  if [[ -f $peer ]]; then
    step train "$PYTHON" benchmarks/train.py "$peer" $([[ -n $tiny ]] && echo tiny || echo 40 1)
  elif [[ " $steps " == *" train "* ]]; then
    say "train: left out, since ${PACKED##*/}/ has no train_text_to_image.py; pack it with --peer"
  fi
  step vae "$PYTHON" scripts/train_vae.py "${shared[@]}" --output_dir "$work/vae"
  step unet env ACCELERATE_MIXED_PRECISION=$precision "$PYTHON" scripts/train_unet.py "${shared[@]}" --vae "$work/vae" --output_dir "$work/unet"
  step pictures "$PYTHON" benchmarks/gpu_session.py pictures "$work/unet" "$work/vae" "$prompts" "$OUT/pictures.png"
  step gpu "$PYTHON" benchmarks/gpu.py "$([[ -n $tiny ]] && echo tiny || echo short)"
  say "$([[ $failed == 0 ]] && echo "all well" || echo "some steps failed"), $SECONDS s; results in $OUT"
  exit "$failed"
}

action=${1:-}
shift
case $action in
  pack) exec "$PYTHON" benchmarks/gpu_session.py pack "$@" ;;
  run) run "$@" ;;
  -h | --help) usage 0 ;;
  *) usage 2 >&2 ;;
esac
