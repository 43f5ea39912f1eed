#!/bin/bash
# Train on several hosts under SLURM: sbatch configs/slurm.sh configs/8b.yaml --num_steps=1000
#
# One task per host; torchrun starts one rank per GPU, and the hosts meet at the first one (rendezvous). Everything
# after the script's name goes to launch.train. --resume=auto makes a requeued job go on from its last complete
# checkpoint, also with another number of hosts, as long as global_batch_size divides. output_dir must be on a file
# system that all hosts see; data.cache may be, and is then filled once.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --output=train-%j.log
set -euo pipefail

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a host must not share a port

# The ranks of a host share its cores.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

# --kill-on-bad-exit: when the launcher of one host fails, SLURM ends the others at once.
srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_host:$port" \
    -m launch.train "$@" --resume=auto

# Without SLURM: the same torchrun line on every host, with the first host's name, a free port and any common id:
#
#     torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint host-0:29400 \
#         -m launch.train configs/8b.yaml --resume=auto
