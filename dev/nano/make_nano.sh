#!/usr/bin/env bash
# Rebuilds the committed files of dev/nano from scratch: the data in seconds, the base in minutes. Says which of them differ from
# the committed ones. The data must not; the base may on another processor, where sums round differently.
set -euo pipefail
cd "$(dirname "$0")"
before=$(cksum *.bin)
python3 make_nano.py
../../train_baselines --method full --base build/random_base.bin --data build/pretrain.bin --ticket-examples 0 --batch 64 --seed 0 \
    --lr 0.002 --warmup 0.025 --cooldown 0.7 --eval addition.bin --eval sizes.bin --eval packing.bin --eval build/shapes_heldout.bin \
    --out build/base --overwrite
mv build/base/model.bin base.bin
if [ "$before" = "$(cksum *.bin)" ]; then echo "make nano: all files are as committed"
else echo "make nano: these files differ from before:"; diff <(echo "$before") <(cksum *.bin) | sed -n 's/^> /  /p'; fi
