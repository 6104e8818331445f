#!/usr/bin/env bash
# The main job on real data: train on handwritten digits, evaluate, predict on image files, leave pictures.
# Everything is inside the clone; run it again and it starts a new run beside the old one.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
zoo_setup recipes,diffusion

# Maps of 8 x 8 tokens are too small to share between threads; waiting for each other costs more than it saves.
export OMP_NUM_THREADS=1

run="runs/digits-demo"
if [ -e "$run" ]; then run="$run-$(date +%Y%m%d-%H%M%S)"; fi

echo "== training nat_digits on 1,198 handwritten digits (599 more are held out)"
zoo train classification/digits --run-dir "$run"

echo "== evaluating on the held-out digits"
zoo eval "$run"

echo "== predicting image files of held-out digits"
python scripts/write_digits.py "$run/held_out" --count 10
zoo predict "$run" "$run/held_out" --top-k 3 --json "$run/predictions.json" --explain "$run/attention"

echo "== generating digits with the shipped diffusion transformer (train one: zoo train generation/digits)"
zoo generate dit_digits --output "$run/generated"

echo "== segmenting scenes of two digits, after two of the recipe's four epochs"
OMP_NUM_THREADS=2 zoo train segmentation/digit_scenes --run-dir "$run-scenes" optim.epochs=2

echo "== done; everything is in $run and $run-scenes"
echo "   curves            $run/curves.png"
echo "   confusion matrix  $run/confusion.png"
echo "   attention         $run/attention/"
echo "   predictions       $run/predictions.json"
echo "   generated digits  $run/generated/grid.png"
echo "   segmented scenes  $run-scenes/overlays.png"
echo "   model             $run/model.safetensors"
