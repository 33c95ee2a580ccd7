# What the examples for a laptop share; they source it first. Afterwards the working directory is the repository,
# set up and with .venv on PATH; $started_in is where the reader was, for paths that they gave.
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
# One process computes on one core here: more threads would only fight for it.
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
# Megatron-Core warns at every import, in every process, that Apex and Transformer Engine are not there.
export PYTHONWARNINGS=ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning
# Training saves and exits 0 at Ctrl-C: the script would go on with its next step.
trap 'exit 130' INT
# A picture is not what a run is for: without matplotlib, say, the script goes on.
picture() { python "$@" || echo "going on without the picture" >&2; }
step() { printf '\n== %s\n' "$*"; }
