// Every kernel of the CPU backend on buffers of exactly the size it needs, for the address and undefined-behaviour sanitizers.
// test_build.py compiles this with the sources of csrc/cpu, for the instruction set RLK_ISA.
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/batch.h"

using namespace rlk;

RowKernels rlk::row_kernels(Dtype dtype) { return dtype == Dtype::f64 ? row_kernels_f64() : RLK_ISA::row_kernels(dtype); }

namespace {

template <class T>
std::unique_ptr<T[]> filled(int64_t n, T value) {
  std::unique_ptr<T[]> block(new T[size_t(n)]);  // not a vector: its capacity may exceed its size
  for (int64_t i = 0; i < n; ++i) block[i] = value;
  return block;
}

template <class T>
uintptr_t address(const std::unique_ptr<T[]>& block) {
  return reinterpret_cast<uintptr_t>(block.get());
}

// 1.5, -2, -inf, NaN, 3 in turn, as bytes of the dtype.
std::unique_ptr<unsigned char[]> logits(Dtype dtype, int64_t n) {
  auto block = filled<unsigned char>(n * item_size(dtype), 0);
  Batch writer;
  writer.dtype = dtype;
  const double values[] = {1.5, -2.0, -HUGE_VAL, double(NAN), 3.0};
  for (int64_t i = 0; i < n; ++i) writer.set(block.get(), i, values[i % 7 < 5 ? i % 7 == 3 && i % 2 ? 0 : i % 7 : 4]);
  return block;
}

template <class Real>
void rows(Dtype dtype, int64_t vocab, bool masked, bool with_ref) {
  const int64_t count = 5;
  const auto x = logits(dtype, count * vocab), ref = logits(dtype, count * vocab), out = logits(dtype, count * vocab);
  const auto targets = filled<int32_t>(count, int32_t(vocab - 1));
  targets[2] = -100;
  const auto mask = filled<uint8_t>(count * vocab, 1);
  for (int64_t i = 0; i < count * vocab; i += 3) mask[i] = 0;
  const auto ones = filled<Real>(count, Real(1));
  std::vector<std::unique_ptr<Real[]>> s;
  for (int k = 0; k < 10; ++k) s.push_back(filled<Real>(count, Real(0)));
  const auto top = filled<uint8_t>(count, 0);
  Batch b;
  b.dtype = dtype, b.rows = count, b.columns = vocab, b.threads = 2;
  b.logits = {address(x), vocab, 0, 1};
  if (with_ref) b.ref = {address(ref), vocab, 0, 1};
  b.targets = address(targets), b.target_bytes = 4, b.temperatures = address(ones);
  if (masked) b.mask = address(mask), b.mask_stride = vocab;
  const uintptr_t none = 0;
  token_stats<Real>(b, {address(s[0]), address(s[1]), address(s[2]), address(s[3]), address(s[4]), address(s[5]), address(top),
                        with_ref ? address(s[6]) : none, with_ref ? address(s[7]) : none, with_ref ? address(s[8]) : none,
                        with_ref ? address(s[9]) : none});
  const Layout fresh{address(out), vocab, 0, 1};
  token_stats_backward<Real>(b, {address(ones), address(ones), with_ref ? address(ones) : none, address(s[1]), address(s[2]), address(s[3]),
                                 address(s[7]), address(s[8]), address(s[9])}, fresh);
  const uintptr_t columns[] = {address(ones), address(ones)};
  const double params[] = {0.2, 0.2};
  fused_policy<Real>(b, {"ppo_clip", "k3", columns, params, address(ones), address(ones), address(ones), address(ones)},
                     {address(s[0]), address(s[1]), address(s[2]), address(s[3]), address(s[4])}, fresh);
  token_stats_backward<Real>(b, {address(ones), none, none, address(s[1]), address(s[2]), address(s[3]), none, none, none}, b.logits);
}

template <class Real>
void lists(int64_t n) {
  const auto x = filled<Real>(n, Real(0.5)), value = filled<Real>(n, Real(0)), derivative = filled<Real>(n, Real(0));
  const auto mask = filled<uint8_t>(n, 1);
  const uintptr_t columns[] = {address(x), address(x), address(x)};
  const double params[] = {0.2, 0.3};
  elementwise<Real>("ppo_clip", columns, params, x.get(), value.get(), derivative.get(), n, 2);
  const int64_t bounds[] = {0, n / 2, n / 2, n};
  gae<Real>(x.get(), x.get(), mask.get(), bounds, 3, 0, 0.9, 0.9, Masked::skip, value.get(), derivative.get(), 2);
  gae<Real>(x.get(), x.get(), mask.get(), nullptr, 1, n, 0.9, 0.9, Masked::zero, value.get(), derivative.get(), 2);
}

}  // namespace

int main() {
  for (const int64_t vocab : {1, 3, 65, 1023, 4097})
    for (const int options : {0, 1, 2, 3}) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) rows<float>(dtype, vocab, options & 1, options & 2);
      rows<double>(Dtype::f64, vocab, options & 1, options & 2);
    }
  for (const int64_t n : {0, 1, 4097, 9000}) lists<float>(n), lists<double>(n);
  std::puts("clean");
}
