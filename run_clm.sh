#!/usr/bin/env bash
# Trains a language model. `bash run_clm.sh --help` shows how.
set -euo pipefail

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do # follow links to the checkout, without `readlink -f`, which macOS lacks
  target=$(readlink "$script")
  case $target in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
repo=$(cd "$(dirname "$script")" && pwd -P)
. "$repo/.bootstrap.sh"

print_usage() {
  cat <<'USAGE'
bash run_clm.sh [CONFIG.json] [--field value ...]

Trains a language model. Without CONFIG.json it trains recipe/configs/llama_180m.json if there is a CUDA GPU, otherwise
recipe/configs/cpu_demo.json. --field value overrides any key of the config. The first use makes the Python environment
(about 1-3 minutes).

  bash run_clm.sh --max_steps 100 --learning_rate 1e-3
  bash run_clm.sh my_config.json --output_dir runs/mine

All keys: python -m recipe train --help, in the environment. A config to start from: python -m recipe new my.json

All GPUs are used, by torch.distributed.run. Environment variables:
  CUDA_VISIBLE_DEVICES   the GPUs to use; empty: none
  NPROC                  number of processes, also without a GPU (default: one per GPU)
  NNODES, NODE_RANK      number of machines, and which one this is, from 0; start the same command on each
  MASTER_ADDR, MASTER_PORT   of machine 0 (port: 29400 if unset); output_dir must be on a disk that all of them share
  MAX_RESTARTS           how often the processes are started again when one of them is lost (default 0); the run then
                         goes on from its last checkpoint. What a guard, your input or the data ended is not repeated
  RECIPE_PYTHON          the Python (3.11 or newer) that makes the environment
  RECIPE_VENV            folder of the environment (default: the active one, or .venv beside this script)
  TORCH_INDEX_URL        package index to install torch from, for example the one with the small CPU builds

Exit codes: 0 good, 1 unexpected, 2 your input, 3 a guard stopped the run, 4 data, disk or network,
129 / 130 / 138 / 143 ended by SIGHUP / SIGINT / SIGUSR1 / SIGTERM, with a checkpoint saved if it was training.
USAGE
}

# Sets config, if the first argument is one, and shift_config. A relative path may start here or in the checkout.
choose_given_config() {
  config='' shift_config=0
  case ${1:---} in -*) return 0 ;; esac
  config=$1 shift_config=1
  [ -f "$config" ] || config=$repo/$1
  [ -f "$config" ] || fail 2 "no such config file: $1 (try recipe/configs/cpu_demo.json; see --help)"
}

# Sets gpus to the number that the environment's torch can use. Starts torch, which takes seconds, only if nvidia-smi lists any.
count_gpus() {
  gpus=$(count_nvidia_gpus) torch_problem=''
  [ "$gpus" != 0 ] || return 0
  local listed=$gpus
  gpus=$("$env_python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || gpus=0
  [ "$gpus" != 0 ] || torch_problem="nvidia-smi lists $listed GPU(s) but torch can use none (a CPU build of torch, or a driver that is too old)"
}

choose_default_config() {
  if [ "$gpus" != 0 ]; then
    config=$repo/recipe/configs/llama_180m.json
    say "$gpus CUDA GPU(s): training recipe/configs/llama_180m.json"
  else
    config=$repo/recipe/configs/cpu_demo.json
    say "${torch_problem:-no CUDA GPU}: training the demo, recipe/configs/cpu_demo.json"
  fi
}

wants_cpu() {
  case " $* " in
    *" --use_cpu false "* | *" --use_cpu=false "*) return 1 ;;
    *" --use_cpu "* | *" --use_cpu=true "*) return 0 ;;
  esac
  grep -qE '"use_cpu"[[:space:]]*:[[:space:]]*true' "$config"
}

# Sets processes: NPROC, or one per GPU.
count_processes() {
  processes=${NPROC:-$gpus}
  if [ -z "${NPROC:-}" ] && { [ "$gpus" -le 1 ] || wants_cpu "$@"; }; then processes=1; fi
}

train() {
  if [ "$processes" -eq 1 ] && [ "$nodes" -eq 1 ] && [ "$restarts" -eq 0 ]; then
    run_child "$env_python" -m recipe train "$config" "$@"
    return
  fi
  local rendezvous=(--standalone)
  if [ "$nodes" -gt 1 ]; then
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-recipe}" --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}")
    rendezvous+=(--rdzv-conf "is_host=$([ "${NODE_RANK:-0}" -eq 0 ] && echo true || echo false)")
  fi
  case "$restarts $*" in
    "0 "* | *--resume_from_checkpoint*) ;;
    *) set -- "$@" --resume_from_checkpoint auto ;; # a process that is started again must not begin again
  esac
  local cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null) || cores=$processes
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes > 1 ? cores / processes : 1))}"
  # torchrun kills its children 30 s after a signal, which is too early for a large checkpoint on a slow disk.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
  # Processes that are started again would find the addresses of those that are gone, and wait for them (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # Without these it leaves SIGUSR1 to its default, which kills it, and its children go on alone. The second is the default of its
  # option --signals-to-handle, which replaces the first where torch has it (2.13 does).
  export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
  export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-$TORCHELASTIC_SIGNALS_TO_HANDLE}"
  run_child "$env_python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" --max-restarts "$restarts" \
    -m recipe train "$config" "$@"
}

# torchrun turns its children's exit codes into 1, so rank 0 writes {"code": N, "reason": "..."} to RECIPE_EXIT_FILE.
reported_code() { sed -n 's/.*"code"[[:space:]]*:[[:space:]]*\([0-9][0-9]*\).*/\1/p' "$RECIPE_EXIT_FILE" | head -n 1; }
reported_reason() { sed -n 's/.*"reason"[[:space:]]*:[[:space:]]*"\(.*\)".*/\1/p' "$RECIPE_EXIT_FILE" | head -n 1; }

case ${1:-} in -h | --help) print_usage && exit 0 ;; esac
case ${NPROC:-1} in 0* | *[!0-9]*) fail 2 "NPROC must be a whole number of at least 1, not '$NPROC'" ;; esac
nodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0}
case $nodes in 0* | *[!0-9]*) fail 2 "NNODES must be a whole number of at least 1, not '$NNODES'" ;; esac
case $restarts in '' | *[!0-9]*) fail 2 "MAX_RESTARTS must be a whole number, not '$MAX_RESTARTS'" ;; esac
[ "$nodes" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail 2 "NNODES is $nodes: set MASTER_ADDR to the address of machine 0"
choose_given_config "$@"
shift "$shift_config"
bootstrap
count_gpus
if [ -z "$config" ]; then
  choose_default_config
elif [ -n "$torch_problem" ]; then
  say "$torch_problem"
fi
count_processes "$@"

RECIPE_EXIT_FILE=$(mktemp "${TMPDIR:-/tmp}/recipe-exit.XXXXXX")
export RECIPE_EXIT_FILE
trap 'rm -f "$RECIPE_EXIT_FILE"' EXIT
train "$@"
code=$(reported_code)
code=${code:-$child_code}
# Repeats the run's message, which torchrun's own error report has scrolled off the screen.
if [ $((processes * nodes + restarts)) -gt 1 ] && [ "$code" != 0 ]; then say "exit code $code: $(printf '%b' "$(reported_reason)")"; fi
exit "$code"
