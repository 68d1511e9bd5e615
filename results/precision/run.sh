#!/usr/bin/env bash
# Does bf16 training cost accuracy? Same configuration, three seeds on the digits, one on part of MNIST.
set -euo pipefail
atmc=${ATMC:-.venv/bin/atmc}
for seed in 0 1 2; do
  for precision in bf16 fp32; do
    "$atmc" compress --config results/precision/digits.toml --precision $precision --seed $seed --threads 1 \
      --out results/precision/digits-$precision-$seed --resume
  done
done
for precision in bf16 fp32; do
  "$atmc" compress --config results/precision/mnist.toml --precision $precision --out results/precision/mnist-$precision --resume
done
