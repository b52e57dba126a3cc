#!/bin/bash
#PBS -N hpcq-analysis
#PBS -l select=1:ncpus=1
# A pilot whose node or server fails goes back into the queue and starts anew, rather than being lost.
#PBS -r y

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
exec >>/state/hpcq/analysis/jobs/20250101T000000-abcdef/output.txt 2>&1


# exec: the pilot takes the place of this shell, so that PBS's SIGTERM reaches it and its exit status is the job's.
exec python -m hpcq.pilot
