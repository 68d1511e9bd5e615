#!/usr/bin/env bash
# Print the commands of the trials on digits, one per line: digits.sh dense, then digits.sh trials.
#     bash configs/defaults/digits.sh trials | xargs -d '\n' -P 2 -n 1 sh -c
# LeNet, l-infinity 0.2, adversarial training (pgd_at), 4,305 nonzeros of 4 bits, optimizers, rates of l0 and sizes of batches, from one dense network per seed.
# SEEDS, RATES, OUT and ATMC may be set.
set -euo pipefail
atmc=${ATMC:-.venv/bin/atmc} out=${OUT:-results/defaults/digits}
given="--model lenet --data digits --threat linf:0.2 --objective pgd_at --no-checks --threads 1"
case $1 in
  dense)
    for seed in ${SEEDS:-0 1 2 3 4}; do
      echo "$atmc compress $given --method da --attack pgd --seed $seed --out $out/dense-seed$seed"
    done
    ;;
  trials)
    for rate in ${RATES:-adamw-0.003 adamw-0.003-batch32 adamw-0.006 sgd-0.02 sgd-0.05}; do
      for seed in ${SEEDS:-0 1 2 3 4}; do
        echo "$atmc compress --config configs/defaults/digits-$rate.toml --threads 1 --seed $seed" \
          "--checkpoint $out/dense-seed$seed/model.atmc --out $out/$rate-seed$seed"
      done
    done
    ;;
esac
