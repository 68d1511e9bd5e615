#!/usr/bin/env bash
# Make every MNIST result, two runs at a time on two cores; if interrupted, call it again to resume.
set -euo pipefail
atmc=${ATMC:-.venv/bin/atmc}
go() { "$atmc" compress --config "configs/mnist-adversarial/$1.toml" --out "results/mnist-adversarial/$1" --resume; }
if [ ! -e results/mnist-adversarial/dense/metrics.json ]; then go dense; fi
export -f go; export atmc
printf '%s\n' 05 0015 01 006 | xargs -P 2 -I{} bash -c 'set -e; go atmc32-{}; go atmc8-{}; if [ {} = 006 ]; then go atmc4-006; fi'
printf '%s\n' 4519 1528 | xargs -P 2 -I{} bash -c 'set -e; go bytes-{}'
