#!/bin/bash
# Train on several hosts under SLURM: sbatch configs/slurm.sh configs/8b.yaml --num_steps=1000
#
# One task per host; torchrun starts one rank per GPU, and the hosts meet at the first one (rendezvous). Everything
# after the script's name goes to launch.train. --resume=auto makes a requeued job go on from its last complete
# checkpoint, also with another number of hosts, as long as global_batch_size divides. output_dir must be on a file
# system that all hosts see; data.cache may be, and is then filled once.
#
# 300 s before its time is over (--signal) the job saves a checkpoint, ends and is requeued: leave more if a checkpoint
# takes longer. Preempted, it saves one within 25 s (checkpoint.grace_seconds), and SLURM requeues it. Whatever else
# ends it loses the steps since the last checkpoint.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log
set -euo pipefail

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a host must not share a port

# The ranks of a host share its cores.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

# On each host: signals go to the ranks, past torchrun, which would kill them 30 s later.
on_each_host='
    .venv/bin/python -m torch.distributed.run "$@" &
    torchrun=$!
    tell_ranks() { for rank in $(cat "/proc/$torchrun/task/"*/children); do kill -USR1 "$rank"; done; }
    trap tell_ranks USR1 TERM
    wait "$torchrun"; status=$?
    while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; status=$?; done
    exit "$status"
'

# --kill-on-bad-exit: when the launcher of one host fails, SLURM ends the others at once.
srun --kill-on-bad-exit=1 bash -c "$on_each_host" ranks \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_host:$port" \
    -m launch.train "$@" --resume=auto &
tasks=$!

# srun passes signals on to its tasks.
time_is_over=no
trap 'time_is_over=yes; kill -USR1 "$tasks"' USR1
trap 'kill -TERM "$tasks"' TERM
status=0
wait "$tasks" || status=$?
while kill -0 "$tasks" 2>/dev/null; do
    status=0
    wait "$tasks" || status=$?
done
if [ "$time_is_over" = yes ] && [ "$status" -ne 0 ]; then # saved, not finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

# Without SLURM: the same torchrun line on every host, with the first host's name, a free port and any common id:
#
#     torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint host-0:29400 \
#         -m launch.train configs/8b.yaml --resume=auto
