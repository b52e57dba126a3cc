#!/bin/bash
#SBATCH --job-name=hpcq-analysis
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32768M
#SBATCH --time=0-08:00:00
#SBATCH --partition='cms long'
#SBATCH --account=t3_us
#SBATCH --qos=normal
#SBATCH --constraint='[knl|hsw]'
# SIGTERM to the pilot (B: this script, which becomes the pilot) while there is time to hand its tasks back.
#SBATCH --signal=B:TERM@120
# A preempted pilot goes back into the queue and starts anew (the manager sees another incarnation of it), rather
# than being lost; appending keeps the output of the first start.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --licenses=cvmfs:1
#SBATCH '-xnode[1-3]'

module load python/3.11
export A='it'"'"'s'
export B='$(date)'

# exec: the pilot takes the place of this shell. It then is the process that Slurm's signals go to, both the warning
# above and scancel's; a shell in between would be told, and the pilot would not.
exec '/opt/py thon/bin/python' -m hpcq.pilot --require cvmfs:cms.cern.ch
