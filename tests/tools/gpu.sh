#!/usr/bin/env bash
# At most ten minutes on one card: the smoke scale against the record, both benchmarks, and a ViT-S/14 at 224 pixels, as one table.
#
#   bash tests/tools/gpu.sh          on CUDA
#   bash tests/tools/gpu.sh cpu      tiny sizes, to see that the script works
#
# The table and everything that was printed are kept in .work/gpu/. The commit is what is measured, not changes that are not in it.
set -uo pipefail
cd "$(dirname "$0")/../.."
export WEIGHTLENS_DEVICE=${1:-cuda}
out=.work/gpu
mkdir -p $out
case $WEIGHTLENS_DEVICE in
  cuda*) stages=() sides=(8 16 28) fleets=(1 5 20) pixels=224 ;;
  cpu) stages=(fetch_data@digits train_lenet@digits) sides=(8) fleets=(1) pixels=56 ;;
  *) echo "error: expected cuda or cpu, got $WEIGHTLENS_DEVICE" >&2; exit 2 ;;
esac
python - <<'PYTHON' || exit 1
import sys
from stages.common.runtime import pick_device
from stages.common.stage import InputError
try:
    pick_device()
except InputError as error:
    sys.exit(f"error: {error}")
PYTHON

table=$out/table.md
printf '| what | seconds | result |\n| --- | --- | --- |\n' > $table
failed=0

# measure NAME LIMIT COMMAND...: a row for each line that it prints, and one that says so if it fails or takes longer than LIMIT s
measure() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.err" || code=$?
  if [ $code -ne 0 ]; then
    failed=1
    echo "| $name | $((SECONDS - start)) | failed ($code): $(tail -n 1 "$out/$name.err" | cut -c -200 | tr '|' '/') |" >> $table
  else
    while IFS= read -r line; do echo "| $name | $((SECONDS - start)) | $line |" >> $table; done < "$out/$name.txt"
  fi
}

measure vit 100 python tests/tools/on_card.py vit $pixels
measure fleet 60 python tests/tools/benchmark_fleet.py "${fleets[@]}"
measure zoo 90 python tests/tools/benchmark_zoo.py "${sides[@]}"
measure smoke 330 python tests/tools/on_card.py smoke ${stages[@]+"${stages[@]}"}
cat $table
[ -s $out/smoke.err ] && { echo; echo "of the smoke scale's numbers, off by more than the tolerance:"; cat $out/smoke.err; }
exit $failed
