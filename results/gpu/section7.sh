#!/usr/bin/env bash
# How the numbers in this folder were made: SAT's Section 7 and Table 1 on CIFAR-10, on one GPU.
#   bash results/gpu/section7.sh OUT SECONDS     CIFAR-10 is in data/; after SECONDS nothing new begins
# A tiny one for a CPU: TRAIN="--arch resnet8 --limit 640" MEASURE="--limit 40" bash results/gpu/section7.sh out/tiny 60
# The first run is alone on the card. Later ones are compiled while the one before trains its last epochs, and measured
# while the next one trains.
out=$1
end=$2
mkdir -p "$out"

run() {  # NAME FLAGS...
    if [ $SECONDS -ge $end ]; then echo "no time for $1"; return; fi
    train_and_measure "$@" &
    until grep -qs "epoch   7/15 | train" "$out/$1.log" || ! kill -0 $! 2>/dev/null; do sleep 0.2; done
}

train_and_measure() {
    python train.py --data cifar10 --out "$out/$1" "${@:2}" $TRAIN > "$out/$1.log" 2>&1 || { tail -3 "$out/$1.log"; return; }
    echo "$SECONDS s: $1 $(grep held-out "$out/$1.log" | tail -1)"
    python evaluate.py --out "$out/$1" --dtype bf16 --batch-size 1000 $MEASURE >> "$out/$1.log" 2>&1
    echo "$SECONDS s: $1 $(grep ^robust "$out/$1.log" | tail -1)"
    if [[ $1 == *-0 ]]; then
        python evaluate.py --out "$out/$1" --dtype bf16 --batch-size 500 --attack apgd --limit ${APGD:-1000} >> "$out/$1.log" 2>&1
        echo "$SECONDS s: $1 APGD $(grep ^robust "$out/$1.log" | tail -1)"
    fi
}

SECONDS=0
run relu-0 --act relu
run silu-0 --act silu
run gelu-0 --act gelu
run softplus_centred-0 --act softplus_centred
for seed in 1 2; do
    for act in relu silu gelu; do run $act-$seed --act $act --seed $seed; done
done
run softplus-0 --act softplus
run smoothrelu-0 --act smoothrelu
for who in both attacker optimizer; do run $who-0 --act relu --smooth-backward $who; done
run elu-0 --act elu
wait
