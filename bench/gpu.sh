#!/usr/bin/env bash
# Measures on a machine that reaches no package registry, from packed libraries. See bench/README.md.
#   bench/gpu.sh keep FILE...     put packed files aside, where they arrive one after another
#   bench/gpu.sh unpack           unpack what was kept
#   bench/gpu.sh run COMMAND...   run with those libraries: bench/gpu.sh run python3 -m bench.floor --out OUT
set -euo pipefail
kept=${KEPT:-/tmp/kept} site=${SITE:-/tmp/site}
case ${1:?keep, unpack or run} in
keep)
  shift && mkdir -p "$kept" && cp "$@" "$kept" && ls -la "$kept"
  ;;
unpack)
  mkdir -p "$site/vllm" "$site/flashinfer"
  [ ! -e "$kept/part_00" ] || cat "$kept"/part_* | xz -dc -T0 | tar -C "$site/vllm" -x
  [ ! -e "$kept/flashinfer_site.tar.xz" ] || xz -dc -T0 "$kept/flashinfer_site.tar.xz" | tar -C "$site/flashinfer" -x
  [ ! -e "$kept/fa3.so.xz" ] || xz -dc -T0 "$kept/fa3.so.xz" >"$site/fa3.so"
  du -sh "$site"/*
  ;;
run)
  shift
  [ ! -e "$site/fa3.so" ] || export PAGED_ATTN_FA3=$site/fa3.so
  export FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=$site/work FLASHINFER_DISABLE_JIT=1
  export PYTHONPATH=$PWD:$site/flashinfer PYTHONUNBUFFERED=1
  exec "$@"
  ;;
*)
  echo "keep, unpack or run, not $1" >&2 && exit 2
  ;;
esac
