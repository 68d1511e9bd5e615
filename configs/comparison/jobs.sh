#!/usr/bin/env bash
# Print the commands of one group of the comparison, one per line: jobs.sh methods | codebooks | adversarial | caffe-dense | caffe.
#     bash configs/comparison/jobs.sh methods | xargs -d '\n' -P 2 -n 1 sh -c
# After the dense network every method has 12 epochs. It is that of results/mnist, but nap trains its own; in `adversarial` that of
# results/mnist-adversarial, and in `caffe` that of `caffe-dense`. `codebooks` continues from al0 of `methods` with 4 epochs. DATA, DEVICE, OUT, SEEDS, RATIOS, BITS and ATMC may be set.
set -euo pipefail
atmc=${ATMC:-.venv/bin/atmc} data=${DATA:-ylecun/mnist} device=${DEVICE:-cpu} out=${OUT:-results/comparison}
dense=results/mnist/dense/model.atmc
run() { # CONFIG METHOD NAME SEED EPOCHS OPTIONS
  echo "$atmc compress --config configs/comparison/$1.toml --data $data --device $device --threads 1" \
    "--method $2 --seed $4 --epochs $5 --out $out/$3-seed$4 ${*:6}"
}
case $1 in
  methods)
    for ratio in ${RATIOS:-0.006 0.0015}; do
      for seed in ${SEEDS:-0 1 2}; do
        given="--ratio $ratio --checkpoint $dense"
        three=dense=0,l0=8,admm=3,tune=1 two=dense=0,l0=10,admm=0,tune=2 one=dense=0,l0=0,admm=0,tune=12
        run base al0 "al0-$ratio" "$seed" $two "$given"
        run base al0q "al0q4-$ratio" "$seed" $three --bits 4 "$given"
        run identity atmc "identity4-$ratio" "$seed" $three --bits 4 "$given"
        run eager atmc "eager4-$ratio" "$seed" $three --bits 4 "$given"
        run finetune ap "ap-$ratio" "$seed" $one "$given"
        run magnitude al0 "magnitude-$ratio" "$seed" $two "$given"
        run base atmc "atmc4-$ratio" "$seed" $three --bits 4 "$given"
        run base al0q "al0q8-$ratio" "$seed" $three --bits 8 "$given"
        run base atmc "atmc8-$ratio" "$seed" $three --bits 8 "$given"
        run base atmc "atmc32-$ratio" "$seed" $three "$given"
        run base nap "nap-$ratio" "$seed" dense=5,l0=10,admm=0,tune=2 --ratio "$ratio"
        if [ "$ratio" = 0.006 ]; then
          run finetune alr "alr-$ratio" "$seed" $one "$given"
        fi
      done
    done
    ;;
  adversarial)
    given="--checkpoint results/mnist-adversarial/dense/model.atmc"
    for seed in ${SEEDS:-0 1 2}; do
      run adversarial al0 adversarial-al0-0.006 "$seed" dense=0,l0=10,admm=0,tune=2 "$given"
      run adversarial al0q adversarial-al0q8-0.006 "$seed" dense=0,l0=8,admm=3,tune=1 --bits 8 "$given"
      run adversarial atmc adversarial-atmc8-0.006 "$seed" dense=0,l0=8,admm=3,tune=1 --bits 8 "$given"
    done
    ;;
  caffe-dense)
    run caffe da caffe-da 0 dense=12
    ;;
  caffe)
    given="--ratio 0.006 --checkpoint $out/caffe-da-seed0/model.atmc"
    run caffe al0q caffe-al0q8-0.006 0 dense=0,l0=8,admm=3,tune=1 --bits 8 "$given"
    run caffe atmc caffe-atmc8-0.006 0 dense=0,l0=8,admm=3,tune=1 --bits 8 "$given"
    ;;
  codebooks)
    for bits in ${BITS:-2 1 3 4}; do
      for seed in ${SEEDS:-0 1 2}; do
        given="--ratio 0.006 --bits $bits --checkpoint $out/al0-0.006-seed$seed/model.atmc"
        for config in base gradient unweighted straight-through; do
          run $config al0q "$config-${bits}bit" "$seed" dense=0,l0=0,admm=3,tune=1 "$given"
        done
        run base al0q "rounding-${bits}bit" "$seed" dense=0,l0=0,admm=0,tune=4 "$given"
      done
    done
    ;;
esac
