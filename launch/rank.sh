#!/usr/bin/env bash
# One rank: `launch/rank.sh MODULE [arguments]`. srun starts one per task, launch/torchrun.py one per process.
#
#   LOG_DIR=folder      output of every rank but the first goes to LOG_DIR/rank_<r>.log; the first keeps its output, and
#                       whoever started it copies that to LOG_DIR/rank_0.log
#   PYTHON=interpreter  default: the repository's .venv, else python3
#
# Nothing stands between the launcher and the module, which replaces this shell: signals and statuses are the rank's own.
# A signal that arrives before the module understands it ends the rank; launchers read that as "start me again", too.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # user error: what the launchers never start again
  echo "error: $*" >&2
  exit 2
}

read_slurm() { # Slurm's names of rank, world and meeting point, as torch.distributed wants to read them
  local name missing=()
  for name in SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS; do
    [ -n "${!name:-}" ] || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] || fail "${missing[*]} not set: this rank was started neither by srun nor by" \
    "launch/torchrun.py. Use sbatch launch/slurm.sbatch, or launch/local.sh without Slurm"
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  if [ -z "${MASTER_ADDR:-}" ]; then # rank 0 is on the first node; slurm.sbatch says which, a bare srun does not
    command -v scontrol >/dev/null || fail "MASTER_ADDR not set, and no scontrol here to ask: give the host of rank 0"
    read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}") ||
      fail "MASTER_ADDR not set, and Slurm names no nodes: give the host of rank 0"
  fi
  # The same on all ranks, another one for every job on a shared node, and below the ports systems hand out themselves.
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
}

[ $# -gt 0 ] || fail "usage: launch/rank.sh MODULE [arguments]"
[ -n "${TORCHELASTIC_RUN_ID:-}" ] || read_slurm
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-$([ -x "$REPOSITORY/.venv/bin/python" ] && echo "$REPOSITORY/.venv/bin/python" || echo python3)}
command -v "$PYTHON" >/dev/null || fail "no interpreter $PYTHON: run make setup, or give PYTHON=..."

if [ -n "${LOG_DIR:-}" ] && [ "$RANK" != 0 ]; then
  mkdir -p "$LOG_DIR"
  exec >>"$LOG_DIR/rank_$RANK.log" 2>&1
  echo "== $(date '+%F %T') rank $RANK of $WORLD_SIZE on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}: $*"
fi

# torchrun's ranks are sessions of their own: without this they would train on when their launcher is killed.
guard=()
[ -z "${TORCHELASTIC_RUN_ID:-}" ] || ! setpriv --pdeathsig KILL true 2>/dev/null || guard=(setpriv --pdeathsig KILL)
exec ${guard[@]+"${guard[@]}"} "$PYTHON" -u -m "$@"
