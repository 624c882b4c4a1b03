# shellcheck shell=bash
# Runs the step; queues the job again if it saved and stopped because its time was up or it was preempted.
set -euo pipefail
: "${requeue:?}" "${srun[@]:?}" "${command[@]:?}"
time_is_up=no
# Slurm signals the batch script alone (B:), which passes it on: SIGTERM straight to the step could not be told from
# what srun may send to the others when one process fails, and a run that fails would be queued for ever.
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
"${srun[@]}" "${command[@]}" &
code=0
wait "$!" || code=$?
if [ "$time_is_up" = yes ]; then  # the trap interrupted the wait
  code=0
  wait "$!" || code=$?
fi
preempted() { [[ "$(scontrol show job "$SLURM_JOB_ID")" == *PreemptTime=[0-9]* ]]; }
# 128 + SIGTERM: stopped and saved.
if [ "$requeue" = yes ] && [ "$code" -eq 143 ] && { [ "$time_is_up" = yes ] || preempted; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
