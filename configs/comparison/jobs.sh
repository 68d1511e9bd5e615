#!/usr/bin/env bash
# Print the commands of the comparison, one per line, the most telling ones first.
#     bash configs/comparison/jobs.sh | xargs -d '\n' -P 2 -n 1 sh -c
# All but nap start from the dense model of results/mnist; after it every method has 12 epochs. DATA, DEVICE, OUT, SEEDS and
# ATMC may be set.
set -euo pipefail
atmc=${ATMC:-.venv/bin/atmc} data=${DATA:-ylecun/mnist} device=${DEVICE:-cpu} out=${OUT:-results/comparison}
dense=results/mnist/dense/model.atmc
run() { # METHOD NAME SEED EPOCHS OPTIONS
  local config=base
  case $1 in ap | alr) config=finetune ;; esac
  echo "$atmc compress --config configs/comparison/$config.toml --data $data --device $device --threads 1" \
    "--method $1 --seed $3 --epochs $4 --out $out/$2-seed$3 ${*:5}"
}
for ratio in 0.006 0.0015; do
  for seed in ${SEEDS:-0 1 2}; do
    for bits in 4 8; do
      for method in al0q atmc; do
        run $method "$method$bits-$ratio" "$seed" dense=0,l0=8,admm=3,tune=1 --ratio $ratio --bits $bits --checkpoint $dense
      done
    done
    run al0 "al0-$ratio" "$seed" dense=0,l0=10,admm=0,tune=2 --ratio $ratio --checkpoint $dense
    run ap "ap-$ratio" "$seed" dense=0,l0=0,admm=0,tune=12 --ratio $ratio --checkpoint $dense
    run atmc "atmc32-$ratio" "$seed" dense=0,l0=8,admm=3,tune=1 --ratio $ratio --checkpoint $dense
    run nap "nap-$ratio" "$seed" dense=5,l0=10,admm=0,tune=2 --ratio $ratio
    if [ $ratio = 0.006 ]; then
      run alr "alr-$ratio" "$seed" dense=0,l0=0,admm=0,tune=12 --ratio $ratio --checkpoint $dense
    fi
  done
done
