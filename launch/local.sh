#!/usr/bin/env bash
# Train on this machine, or without Slurm on several: launch/local.sh experiment=NAME [overrides]
#
#   launch/local.sh experiment=quickstart_ar                         # one rank per GPU; without a GPU, one rank
#   NPROC_PER_NODE=2 launch/local.sh experiment=quickstart_joint     # two ranks
#   MODULE=lora.train launch/local.sh checkpoint=DIR data=PATH       # the draft adapter
#   NNODES=2 RDZV_ENDPOINT=node1:29500 launch/local.sh ...           # run this on every host; node1 is one of them
#   launch/local.sh experiment=nld_8b_ar --cfg job                   # what would run
#
# After Ctrl-C or SIGTERM the ranks finish their step, save and exit; the same command continues. Every rank's output is
# appended to <run.dir>/logs/rank_<r>.log, and rank 0's is also shown. Exit status: 0 complete, 2 user error (one message),
# 75 stopped by SIGTERM or SIGUSR1: start it again, 130 stopped by Ctrl-C, 1 crashed.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --- What runs, and where
: "${MODULE:=pretrain.train}"       # or lora.train
: "${NNODES:=1}"                    # hosts
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # only some GPUs may be used
  : "${NPROC_PER_NODE:=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)}"
fi
: "${NPROC_PER_NODE:=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU" || true)}"  # ranks per host: one per GPU
[ "$NPROC_PER_NODE" != 0 ] || NPROC_PER_NODE=1
: "${RDZV_ENDPOINT:=localhost:0}"   # host:port where several hosts meet; one host takes any free port
: "${LOCAL_ADDR:=}"                 # this host's address, if the others cannot resolve its name
: "${RDZV_ID:=tri-mode}"            # the same on all hosts of a run, different for a second run on the same port
: "${PYTHON:=$([ -x "$REPOSITORY/.venv/bin/python" ] && echo "$REPOSITORY/.venv/bin/python" || echo python3)}"

# --- Library settings
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"          # paths in overrides stay relative to the current folder
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                      # more threads than cores spin and slow each other down
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"    # its threads do not survive the forks of data loading
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # megatron-core overlaps by launch order on Hopper
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"  # shapes vary per step: less fragmentation
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                             # reports why a collective failed

fail() { echo "error: $*" >&2; exit 2; }

case " $* " in
  *" --help "* | *" -h "*) sed -n '2,/^set /{/^#/!d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *" --cfg"*) exec "$PYTHON" -m "$MODULE" "$@" ;;
esac
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NNODES is not a number of hosts"
[[ $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE=$NPROC_PER_NODE is not a number of ranks"
if [ "$NNODES" -gt 1 ] && [ "$RDZV_ENDPOINT" = localhost:0 ]; then
  fail "NNODES=$NNODES hosts need an endpoint to meet at: RDZV_ENDPOINT=<one of the hosts>:29500"
fi
if [ -z "${LOG_DIR:-}" ]; then
  # This is also the first check of the overrides: a mistake is one message, before any rank starts.
  LOG_DIR=$(WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" -m launch.run_dir "$MODULE" "$@")/logs || exit 2
fi
mkdir -p "$LOG_DIR" || fail "logs cannot be written to $LOG_DIR"
export LOG_DIR

# torch compares host names to find out which host the endpoint is; an address of a second network has no name.
rendezvous=()
if [ "$NNODES" -gt 1 ]; then
  [ -z "${LOCAL_ADDR:-}" ] || rendezvous+=(--local-addr="$LOCAL_ADDR")
  read -r address _ < <(getent ahosts "${RDZV_ENDPOINT%:*}") || address=none
  [[ " $(hostname -I 2>/dev/null) " != *" $address "* ]] || rendezvous+=(--rdzv-conf=is_host=1)
fi

exec "$PYTHON" -m launch.torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" ${rendezvous[@]+"${rendezvous[@]}"} \
  --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$RDZV_ID" -m "$MODULE" "$@"
