#!/bin/bash
#PBS -N hpcq-analysis
#PBS -l nodes=2:ppn=16:gpus=2:model=bro
#PBS -l mem=65536mb
#PBS -n
#PBS -l walltime=27:46:40
#PBS -q cms
#PBS -A t3_us
#PBS -m ae
#PBS -M alice@example.org
# A pilot whose node or server fails goes back into the queue and starts anew, rather than being lost.
#PBS -r y
#PBS -l site=a:b
#PBS -V

# The job's id, by which the pilot reports; PBS hands output over at the end only, so it is written here as it comes.
export HPCQ_JOB_ID="${PBS_JOBID:-${SLURM_JOB_ID-}}"
# PBS does not tell how often it has started a job: each start leaves a line, so that the pilot of a job that was started
# again is known to be another one.
if [ -z "${HPCQ_ON_NODE-}" ]; then
    starts=/state/hpcq/analysis/jobs/20250101T000000-abcdef/starts-"$HPCQ_JOB_ID"
    if { echo >>"$starts" && mapfile -t lines <"$starts"; } 2>/dev/null; then
        export HPCQ_STARTS="${#lines[@]}"
    else
        printf -v HPCQ_STARTS '%(%s)T' -1
        export HPCQ_STARTS
    fi
fi
exec >>/state/hpcq/analysis/jobs/20250101T000000-abcdef/output"_${PBS_ARRAY_INDEX:-$HPCQ_JOB_ID}".txt 2>&1

# On each node of the job this script runs once more, as its pilot; PBS's SIGTERM reaches each.
if [ -z "${HPCQ_ON_NODE-}" ]; then
    each=(/usr/bin/env HPCQ_ON_NODE=1 HPCQ_STARTS="$HPCQ_STARTS" PBS_JOBID="$HPCQ_JOB_ID" PBS_ARRAY_INDEX="${PBS_ARRAY_INDEX-}" /bin/bash /state/hpcq/analysis/jobs/20250101T000000-abcdef/script.sh)
    if command -v pbsdsh >/dev/null; then
        trap '' TERM
        exec pbsdsh -u "${each[@]}"
    fi
    exec mpiexec -n 2 "${each[@]}"
fi

type module >/dev/null 2>&1 || . /etc/profile
module load gcc
module load python/3.11
ulimit -n 8192
export A='it'"'"'s'
export B='$(date)'

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
rm -rf $TMPDIR/mine
exit "$status"
