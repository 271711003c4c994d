#!/usr/bin/env bash
# Everything that only a GPU can tell, the most valuable first. Each stage has its own limit and its own log, a stage
# that fails loses nothing of the others, and after each one all that there is lies packed in $OUT/gpu.tgz.
#   OUT=out BUDGET=300 bash benchmarks/gpu_run.sh facts tests steps profile ddp
#   OUT=out BUDGET=400 bash benchmarks/gpu_run.sh peers bench-ram bench-device compile18
# BUDGET: seconds for all stages of the call; what no time is left for is skipped and says so. LOGS: where stages write,
# kept between calls. Needs torch with CUDA, this project's dependencies, pytest with xdist, and timm for `peers`; no
# network, for weights are random. TRY=1 makes everything tiny, to see on a CPU that every command runs.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-run}
LOGS=${LOGS:-/tmp/gpu-run}
PHOTOS=$LOGS-photographs # thousands of copies, not to be packed
PY=${PY:-python3}
END=$((SECONDS + ${BUDGET:-540}))
mkdir -p "$OUT" "$LOGS"
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # for programs that are started elsewhere
unset OMP_NUM_THREADS # the program chooses
if [[ -n ${TRY:-} ]]; then
    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
    BATCH=4 LIMIT=20 SIZE=(--img-size 64) FILES=4 MANY=8 WARMUP=1 STEPS=2
    SIZES=(--models resnet18 --batch-sizes 2 --precisions no) PLAN=(--windows 1 --window-steps 1 --warmup-steps 1 --epoch-steps 2)
    CASES=(--cases "resnet18 bf16 32" --options "--batch-size 2 --img-size 64 --mixed-precision no") BACKEND=(-n 1)
else
    BATCH=256 LIMIT=1 SIZE=() FILES=512 MANY=32768
    WARMUP=140 STEPS=100 # of peers: the timed steps lie within the second epoch of 128
    SIZES=(--batch-sizes 32 128 256 512 --precisions bf16 fp16)
    PLAN=(--windows 3 --warmup-steps 4 --epoch-steps 64)
    CASES=() BACKEND=(-n 4)
fi

stage() { # seconds, name, command...
    local limit=$(($1 * LIMIT)) name=$2 left=$((END - SECONDS)) started=$SECONDS code
    shift 2
    if ((left < 20)); then
        echo "$name: skipped, no time is left" | tee -a "$LOGS/summary.txt"
        return
    fi
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$LOGS/$name.log" 2>&1
    code=$?
    echo "$name: code $code after $((SECONDS - started)) s" | tee -a "$LOGS/summary.txt"
    ((code == 0)) || tail -n 12 "$LOGS/$name.log"
    tar -C "$LOGS" -czf "$OUT/gpu.tgz" . 2>/dev/null
}

bench() { # seconds, name, options...
    local limit=$1 name=$2
    shift 2
    stage "$limit" "$name" "$PY" -m resnet_dist bench "$PHOTOS" --model resnet18 --batch-size "$BATCH" --regimes full \
        --no-predict "${PLAN[@]}" "${SIZE[@]}" --json "$LOGS/$name.json" "$@"
}

steps() { # seconds, name, options...
    local limit=$1 name=$2
    shift 2
    stage "$limit" "$name" "$PY" benchmarks/gpu_steps.py --json "$LOGS/$name.json" "${SIZE[@]}" "$@"
}

have_photographs() { # MANY names of FILES photographs: they cost as much to decode, and less to make
    [[ -f $PHOTOS/done ]] || stage 90 photographs "$PY" - "$PHOTOS" "$FILES" "$MANY" <<'P'
import os, pathlib, shutil, sys
from multiprocessing import Pool
from resnet_dist.bench.synthetic import photographs
root, files, many = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.environ["OMP_NUM_THREADS"] = "1"
parts = [root.with_name(f"{root.name}-{i}") for i in range(16)]
with Pool() as pool:
    pool.starmap(photographs, [(part, files // 16 or 1) for part in parts])
kinds = {kind: sorted(file for part in parts for file in part.rglob(f"{kind}/*/*.jpg")) for kind in ("train", "val")}
for n in range(many + 64):  # copies: links to one file across train and val are refused
    kind = "train" if n < many else "val"
    file = root / kind / "ab"[n % 2] / f"{n:06d}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(kinds[kind][n % len(kinds[kind])], file)
(root / "done").touch()
print(sum(map(len, kinds.values())), "photographs under", many + 64, "names")
from safetensors.torch import save_file
from torchvision.models import resnet18
save_file(resnet18().state_dict(), root.with_name("random-resnet18.safetensors"))
P
}

for name in "${@:-facts tests steps profile ddp peers bench-ram bench-device bench-augment compile18 graphs compile50 bench-files regimes}"; do
    for wanted in $name; do
        case $wanted in
        facts)
            stage 20 nvidia-smi nvidia-smi -q
            stage 60 facts "$PY" benchmarks/gpu_facts.py
            stage 60 doctor "$PY" -m resnet_dist doctor --no-self-test
            ;;
        tests) # four at a time, but those that need the GPU alone; warnings are told, not errors
            ALONE="does_not_fit or do_not_touch_the_gpu"
            stage 240 tests "$PY" -m pytest -q "${BACKEND[@]}" --dist load -W default --durations=12 \
                -p no:cacheprovider -m gpu -k "not ($ALONE)" tests/test_gpu.py
            stage 100 tests-alone "$PY" -m pytest -q -n 0 -W default -p no:cacheprovider -m gpu -k "$ALONE" tests/test_gpu.py
            tail -n 40 "$LOGS/tests.log"
            ;;
        steps) steps 120 steps "${SIZES[@]}" ;;
        float32) steps 40 float32 --models resnet18 --precisions no --batch-sizes "$BATCH" ;;
        ema) steps 40 ema --models resnet18 --batch-sizes 32 "$BATCH" --precisions bf16 --options "--ema --opt adamw" ;;
        ddp) stage 60 ddp "$PY" -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/gpu_steps.py \
            --json "$LOGS/ddp.json" "${SIZE[@]}" "${SIZES[@]}" ;;
        profile) stage 70 profile "$PY" benchmarks/gpu_profile.py --json "$LOGS/profile.json" --trace "$LOGS" "${CASES[@]}" ;;
        compile18) steps 120 compile18 --models resnet18 --batch-sizes "$BATCH" --options "--compile on" ;;
        graphs) steps 120 graphs --models resnet18 --batch-sizes 32 --options "--compile graphs" ;;
        compile50) steps 150 compile50 --models resnet50 --batch-sizes "$BATCH" --options "--compile on" ;;
        bench-ram) have_photographs && bench 100 bench-ram --cache ram ;;
        bench-files) have_photographs && bench 100 bench-files --cache none ;;
        bench-device) have_photographs && bench 100 bench-device --cache device --aug none ;;
        bench-augment) have_photographs && bench 100 bench-augment --cache device --augment-on device ;;
        regimes) have_photographs && bench 100 bench-regimes --cache ram --aug none --regimes "layer4+head,head" ;;
        peers) have_photographs && stage 150 peers "$PY" benchmarks/peers/compare.py --data "$PHOTOS" \
            --weights "${LOGS%/*}/random-resnet18.safetensors" --peers "$PY" --jobs full --batch-size "$BATCH" --steps "$STEPS" \
            --warmup "$WARMUP" --rounds 1 --json "$LOGS/peers.json" \
            --only "timm tuned, bf16 channels_last" resnet-dist "torchvision references, fp32" ;;
        *) echo "no stage $wanted" ;;
        esac
    done
done
"$PY" benchmarks/gpu_table.py "$LOGS" | tee "$OUT/table.md"
cp "$LOGS/summary.txt" "$OUT/"
