#!/usr/bin/env bash
# A fleet on SLURM, a replica on each GPU of each node: sbatch configs/fleet/slurm.sh (docs/fleet.md).
#SBATCH --job-name=fleet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

pool=${POOL:-configs/serve_pool.yaml} # on a file system that all nodes see, as is what it names
replicas=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_AUTH_MODE=token # the token is ~/.ray/auth_token, made once by `ray get-auth-token --generate`
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# One task a node: the first node's runs the command, the others' lend Ray their GPUs until it ends.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    python -m launch.fleet "$pool" --host=0.0.0.0 --min-replicas="$replicas" --max-replicas="$replicas"
