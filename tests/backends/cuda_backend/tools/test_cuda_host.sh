#!/usr/bin/env bash
# Self-test of cuda_host.h: right results in four builds and four schedules, and every planted fault is found.
# Needs a C++17 compiler with sanitizers; with nvcc (NVCC=... or on PATH; NVCC=none: without) it also compiles the kernels for four targets.
set -u
cd "$(dirname "$0")"
CXX=${CXX:-g++}; NVCC=${NVCC:-$(command -v nvcc || true)}; out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; failed=0
flags="-std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas"
build() { $CXX $flags "${@:2}" -x c++ test_cuda_host.cu -o "$out/$1" 2>"$out/log" || { echo "BUILD FAILED: $*"; head -20 "$out/log"; exit 1; }; }
ok()   { if [ "$1" = 0 ]; then echo "ok    $2"; else echo "FAIL  $2"; failed=1; fi; }
run()  { (CUDA_HOST_ORDER=$1 "$out/$2" "$3" >"$out/log" 2>&1; exit $?) 2>/dev/null; }   # run <order> <build> <case>
says() { grep -q "$1" "$out/log"; }

build plain; build tls -DCUDA_HOST_TLS_SHARED; build tsan -fsanitize=thread
build asan -fsanitize=address,undefined -fno-sanitize-recover=undefined
for b in plain tls asan tsan; do for o in forward reverse random:1 random:2; do
  run $o $b all; ok $? "right results: $b build, $o order"
done; done
run forward asan badlabel; ok $? "label out of range gives NaN and no stray read"

bugs="-DBUG_NOSYNC -DBUG_OOB -DBUG_NOCLUSTERSYNC -DBUG_NOWAIT"
build bug $bugs; build bug_asan $bugs -fsanitize=address; build bug_tsan $bugs -fsanitize=thread
run forward bug logprob; a=$?; run reverse bug logprob; b=$?
[ $a != $b ];                                        ok $? "missing __syncthreads(): two orders disagree"
run forward bug_tsan logprob; says "data race.*row_logprob"; ok $? "missing __syncthreads(): race reported with its line"
run forward bug cluster; a=$?; run reverse bug cluster; b=$?
[ $a != $b ];                                        ok $? "missing cluster.sync(): two orders disagree"
run forward bug_tsan cluster; says "data race.*cluster_sum"; ok $? "missing cluster.sync(): race reported"
run forward bug_asan badlabel; says "heap-buffer-overflow"; ok $? "unchecked label: AddressSanitizer stops it"
run forward bug primitives; [ $? = 1 ];              ok $? "missing cp.async wait: stale data seen"
! run forward plain uninit && ! run forward tls uninit; ok $? "uninitialised __shared__ seen"
run forward plain diverge; says "deadlock: 64 threads"; ok $? "divergent barrier: deadlock reported"
run forward plain mask; says "leaves out the calling lane"; ok $? "lane outside its own mask reported"
run forward plain badgrid; says "launch: grid dimension"; ok $? "grid.y above 65535 refused"
run forward asan misaligned; says "misaligned address"; ok $? "misaligned float4 load reported"

if [ -n "$NVCC" ] && [ "$NVCC" != none ]; then for arch in sm_80 sm_90a sm_100a sm_120; do
  cluster=""; [ $arch = sm_80 ] && cluster="-DNO_CLUSTER"
  "$NVCC" -std=c++17 -O3 -cubin -arch=$arch $cluster -Xptxas -v -o "$out/k.cubin" test_cuda_host.cu >"$out/log" 2>&1; r=$?
  [ $r = 0 ] && ! grep -qE "[1-9][0-9]* bytes spill" "$out/log"; ok $? "nvcc $arch: compiles, no spills"
done; else echo "skip  nvcc not used"; fi
[ $failed = 0 ] && echo "all good" || exit 1
