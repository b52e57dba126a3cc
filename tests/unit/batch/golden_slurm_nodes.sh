#!/bin/bash
#SBATCH --job-name=hpcq-analysis
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --reservation=maintenance
#SBATCH --exclusive
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=alice@example.org
# A preempted pilot goes back into the queue and starts anew (the manager sees another incarnation of it), rather
# than being lost; appending keeps the output of the first start.
#SBATCH --requeue
#SBATCH --open-mode=append

type module >/dev/null 2>&1 || . /etc/profile
module load gcc
module load python/3.11

# One pilot on each node; one that ends does not end the others.
set -- srun --ntasks=2 --ntasks-per-node=1 --cpus-per-task=4 --kill-on-bad-exit=0
# This shell stays, for the lines after the pilot: it passes SIGTERM on, and the pilot's exit status is the job's.
trap 'told=1; [ -z "${pilot-}" ] || kill -TERM "$pilot" 2>/dev/null' TERM
"$@" python -m hpcq.pilot &
pilot=$!
[ -z "${told-}" ] || kill -TERM "$pilot" 2>/dev/null
wait "$pilot"
status=$?
# A signal ends the wait, not the pilot.
while kill -0 "$pilot" 2>/dev/null; do
    wait "$pilot"
    status=$?
done
trap - TERM
echo over
exit "$status"
