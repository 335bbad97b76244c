#!/usr/bin/env bash
# What a user does, by the commands of the docs: `bash tests/journeys.sh [--record] [NAME ...]`, most in under a minute each.
# Without NAME all journeys, in this order; later ones use the runs of `tutorial` and `jsonl`. Each prints its commands and
# the end of their output. --record writes docs/journeys.md. Exit code 1 if a journey fails, 2 for an unknown name.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$repo"

JOURNEYS=(tutorial jsonl tokenizer continue resume processes trl generate evaluate compare tracker)
ABOUT_tutorial="own .txt, generate, a guard in a stock Trainer (docs/tutorial.md, command by command)"
ABOUT_jsonl="own .jsonl"
ABOUT_tokenizer="own tokenizer"
ABOUT_continue="continue from final/"
ABOUT_resume="stop with Ctrl-C, resume"
ABOUT_processes="two processes"
ABOUT_trl="a guard in TRL's SFTTrainer"
ABOUT_generate="generate"
ABOUT_evaluate="evaluate on another file"
ABOUT_compare="compare two runs"
ABOUT_tracker="curves in a tracker"

DEMO=recipe/configs/cpu_demo.json
out=runs/journeys
log=$out/log.txt

# The command as a user types it, the last lines of its output, and its exit code unless it is 0.
run() {
  printf '$ %s\n' "$1" | tee -a "$record"
  local code=0
  bash -c "$1" >"$log" 2>&1 || code=$?
  tr '\r' '\n' <"$log" | grep -v -e '%|' -e '^ *$' | tail -n "${2:-8}" | tee -a "$record" # without the progress bars
  [ "$code" = 0 ] || printf '(exit code %s)\n' "$code" | tee -a "$record"
  return "$code"
}

# The last command's output has this line.
expect() { grep -Eq -- "$1" "$log" || { echo "expected in the output: $1" | tee -a "$record"; return 1; }; }

# Every block of bash in the tutorial, in its order, in one shell as a reader has it.
tutorial() {
  rm -rf tutorial
  awk '/^```bash$/ { inside = 1; next } /^```$/ { inside = 0 } inside' docs/tutorial.md >"$out/tutorial.sh"
  run "bash -e $out/tutorial.sh" 20
  expect 'missing_label_shift'
  [ -f tutorial/run/report.html ] && [ -f tutorial/run/final/model.safetensors ]
}

jsonl() {
  python3 - "$out/my.jsonl" <<'EOF'
import json, pathlib, sys, sysconfig
paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*/*.py"))[:400]
with open(sys.argv[1], "w") as file:
    for path in paths:
        file.write(json.dumps({"name": path.name, "body": path.read_text(encoding="utf-8", errors="replace")}) + "\n")
EOF
  run "bash run_clm.sh $DEMO --source $out/my.jsonl --text_column body --max_steps 30 --save_steps 10 --output_dir $out/jsonl"
  expect 'verdict: (healthy|no fault found)'
}

tokenizer() {
  run "$python tokenizer/train_tokenizer.py $out/tokenizer --vocab_size 2000 --input $out/my.jsonl --text_column body"
  run "bash run_clm.sh $DEMO --source $out/my.jsonl --text_column body --tokenizer $out/tokenizer --max_steps 10 --output_dir $out/own-tokenizer"
  expect 'verdict: (healthy|no fault found)'
}

continue_() {
  local from="--model_name_or_path $out/jsonl/final --tokenizer $out/jsonl/final"
  run "bash run_clm.sh $DEMO --source $out/my.jsonl --text_column body $from --max_steps 10 --output_dir $out/continued"
  expect 'verdict: (healthy|no fault found)'
}

resume() {
  local words="$DEMO --source $out/my.jsonl --text_column body --max_steps 3000 --output_dir $out/resumed"
  run "timeout --preserve-status --signal INT 60 bash run_clm.sh $words" || [ $? = 130 ] # as Ctrl-C
  expect 'checkpoint'
  run "timeout --preserve-status --signal INT 60 bash run_clm.sh $words --resume_from_checkpoint latest" 12 || [ $? = 130 ]
  expect 'resum'
}

processes() {
  run "NPROC=2 bash run_clm.sh $DEMO --source $out/my.jsonl --text_column body --use_cpu true --max_steps 10 --output_dir $out/two"
  expect 'verdict: (healthy|no fault found)'
}

trl() {
  cat >"$out/sft.py" <<EOF
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recipe.guards import RegressionCallback

folder = "$out/jsonl/final"
rows = Dataset.from_list([{"prompt": f"What is {i} + 1? ", "completion": f"It is {i + 1}."} for i in range(400)])
arguments = SFTConfig("$out/sft", max_steps=20, per_device_train_batch_size=8, max_length=64, use_cpu=True, bf16=False, report_to="none")
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.eos_token
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.add_callback(RegressionCallback())
trainer.train()
EOF
  run "$python $out/sft.py"
  expect 'recipe guards'
}

generate() {
  run "$python -m recipe generate $out/jsonl 'def __init__(self' --max_new_tokens 30 --num_samples 2 --seed 1"
}

evaluate() {
  run "$python -m recipe evaluate $out/jsonl $out/my.jsonl README.md"
  expect 'bits'
}

compare() {
  run "$python -m recipe compare $out/jsonl $out/own-tokenizer"
  expect 'html'
}

tracker() {
  run "bash run_clm.sh $DEMO --source $out/my.jsonl --text_column body --max_steps 10 --report_to tensorboard --output_dir $out/tracked"
  expect 'verdict: (healthy|no fault found)'
  ls -R "$out/tracked" | grep -q 'events.out.tfevents'
}

write_page() {
  {
    printf '# Journeys\n\nWhat a user does, walked by `bash tests/journeys.sh --record`: the commands, the end of their output, and the minutes.\n\n'
    printf '%s, %s, commit %s, %s processor cores (%s).\n\n' "$(date +%Y-%m-%d)" "$("$python" --version)" "$(git rev-parse --short HEAD)" \
      "$(getconf _NPROCESSORS_ONLN)" "$(grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && echo AVX512-BF16 || echo 'without AVX512-BF16')"
    printf '| journey | result | minutes |\n|---|---|---|\n'
    cat "$table"
    for name in "${JOURNEYS[@]}"; do
      printf '\n## %s\n\n```\n' "$name"
      sed -e "s|$repo|CHECKOUT|g" -e 's/\x1b\[[0-9;]*m//g' "$out/$name.txt" | cut -c1-160
      printf '```\n'
    done
  } >docs/journeys.md
}

should_record='' chosen=()
for word in "$@"; do
  case " ${JOURNEYS[*]} " in
    *" $word "*) chosen+=("$word") ;;
    *) [ "$word" = --record ] && should_record=1 || { echo "no such journey: $word (${JOURNEYS[*]})" >&2; exit 2; } ;;
  esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${JOURNEYS[@]}")

bash tests/run.sh --version >/dev/null # makes the environment, with the packages of the tests
. .bootstrap.sh
choose_environment
python=$env_python
rm -rf "$out"
mkdir -p "$out"
table=$out/table.md failed=0
: >"$table"
for name in "${chosen[@]}"; do
  record=$out/$name.txt about=ABOUT_$name begun=$SECONDS
  printf '\n== %s: %s\n' "$name" "${!about}"
  journey=$name
  [ "$name" = continue ] && journey=continue_ # a word of the shell
  set +e # in a condition, `set -e` would not hold inside
  (set -e; "$journey")
  [ $? = 0 ] && result=passed || { result=failed failed=1; }
  set -e
  printf '| %s: %s | %s | %s |\n' "$name" "${!about}" "$result" "$(((SECONDS - begun + 5) / 6))" | sed -E 's/\| ([0-9]*)([0-9]) \|$/| 0\1.\2 |/; s/\| 0([0-9]+\.)/| \1/' >>"$table"
done
printf '\n'
cat "$table"
[ -z "$should_record" ] || write_page
exit "$failed"
