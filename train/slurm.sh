#!/usr/bin/env bash
# A training run as a SLURM job: on one node with 4 GPUs as it stands, on several by --nodes. Takes a command of svf-fast; is submitted
# from an environment in which svf_fast is installed, and from where relative places are meant.
#
#   sbatch train/slurm.sh train pascal_baseline_resnet50 data.root=FOLDER data.fold=0 backbone.weights=FILE run.dir=runs/svf0
#   sbatch --nodes=2 train/slurm.sh train coco_baseline_resnet50 data.root=FOLDER backbone.weights=FILE run.dir=runs/coco0
#
# What it does: on each node torchrun starts one process a GPU, which share every step (data.batch is that of all together, and a multiple
# of their number). Five minutes before its time is over the job is told; the run writes last.pt and ends, and the job goes back into the
# queue. --resume lets each turn go on from the last checkpoint, also on another number of nodes. scancel ends it for good.
#SBATCH --job-name=svf-fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail

gpus_per_node=${SLURM_GPUS_ON_NODE:-4}
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# This shell waits for the notice while srun works behind it.
is_told=
trap 'is_told=yes; kill -TERM "$!" || true' USR1

# Seconds that torchrun leaves the processes to stop in: they end the step, or the round of a validation.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-16}" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$gpus_per_node" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_node:$((20000 + SLURM_JOB_ID % 20000))" \
    -m svf_fast.train "$@" --resume &
step=$!

status=0
wait "$step" || status=$?
if [[ $is_told ]]; then
    # the first wait ended with the notice, this one with the run
    wait "$step" || status=$?
    if ((status != 0)); then
        echo "stopped before its time was over: back into the queue"
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
