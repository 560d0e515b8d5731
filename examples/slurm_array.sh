#!/usr/bin/env bash
# A comparison as a Slurm job array: each job of the array does one run.
#
#     firn compare RECIPE key=value --output /shared/runs --print-commands > commands.txt
#     sbatch --array=1-"$(grep -c '^firn ' commands.txt)" examples/slurm_array.sh commands.txt
#
# The last line of the file is a comment with the command for table and report; it may be given while jobs still run.
# Submit the same array again after time limits, lost machines or errors: finished runs are kept, interrupted ones go on
# from their last checkpoint. --array=1-15%4 lets four run at a time. Without Slurm, run 3 of the file:
#
#     SLURM_ARRAY_TASK_ID=3 bash examples/slurm_array.sh commands.txt
#
# All machines must see the folder of the runs, the recipe, the data and the environment with firn under the same paths.
# Change these lines, and activate that environment below, to suit your cluster:
#SBATCH --job-name=firn
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=firn-%A-%a.log
# --signal: two minutes before the time limit firn is told to stop, as by Ctrl-C; then it says how to go on.
set -euo pipefail

# source /shared/venv/bin/activate

if [ $# -ne 1 ] || [ ! -r "$1" ]; then
    echo "usage: slurm_array.sh FILE, a file of firn compare ... --print-commands" >&2
    exit 2
fi
number=${SLURM_ARRAY_TASK_ID:?runs inside a job array; elsewhere set it to the number of a run}
line=$(sed -n "${number}p" "$1")
case $line in
"firn run "*) ;;
*)
    echo "$1 has no command in line $number" >&2
    exit 2
    ;;
esac
echo "$line"
eval "exec $line" # exec: firn takes the place of this shell, so that signals reach it
