// Every kernel of the CPU backend on buffers of exactly the size it needs, for the address and undefined-behaviour
// sanitizers. test_build.py compiles this with the sources of csrc/cpu, for the instruction set RLK_ISA.
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/gemm.h"

using namespace rlk;

RowKernels rlk::row_kernels(Dtype dtype) {
  return dtype == Dtype::f64 ? row_kernels_f64() : RLK_ISA::row_kernels(dtype);
}

bool tiles = false;  // whether the emulated tiles multiply bf16

GemmKernels rlk::gemm_kernels() {
#if defined(RLK_EMULATED_TILES)
  if (tiles) return amx::gemm_kernels();
#endif
#if defined(RLK_BF16)
  return avx512_bf16::gemm_kernels();
#else
  return {};
#endif
}

GemmKernels rlk::gemm_f32_kernels() {
#if defined(__AVX512F__)
  return avx512::gemm_f32_kernels();
#else
  return {};
#endif
}

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
  b.read_targets(address(targets), 1, 4), b.read_temperatures(address(ones));
  if (masked) b.mask = address(mask), b.mask_stride = vocab;
  const uintptr_t none = 0;
  token_stats<Real>(b, {address(s[0]), address(s[1]), address(s[2]), address(s[3]), address(s[4]), address(s[5]),
                        address(top), with_ref ? address(s[6]) : none, with_ref ? address(s[7]) : none,
                        with_ref ? address(s[8]) : none, with_ref ? address(s[9]) : none});
  const Layout fresh{address(out), vocab, 0, 1};
  token_stats_backward<Real>(b,
                             {address(ones), address(ones), with_ref ? address(ones) : none, address(s[1]),
                              address(s[2]), address(s[3]), address(s[7]), address(s[8]), address(s[9])},
                             fresh);
  const uintptr_t columns[] = {address(ones), address(ones)};
  const double params[] = {0.2, 0.2};
  fused_policy<Real>(b,
                     {"ppo_clip", "k3", columns, params, {address(ones), address(ones), address(ones), address(ones)}},
                     {address(s[0]), address(s[1]), address(s[2]), address(s[3]), address(s[4])}, fresh);
  token_stats_backward<Real>(
      b, {address(ones), none, none, address(s[1]), address(s[2]), address(s[3]), none, none, none}, b.logits);
}

template <class Real>
void lists(int64_t n) {
  const auto x = filled<Real>(n, Real(0.5)), value = filled<Real>(n, Real(0)), derivative = filled<Real>(n, Real(0));
  const auto mask = filled<uint8_t>(n, 1);
  const uintptr_t columns[] = {address(x), address(x), address(x)};
  const double params[] = {0.2, 0.3};
  elementwise<Real>("ppo_clip", columns, params, x.get(), value.get(), derivative.get(), n, 2);
  const int64_t total = n + 1;
  const OfLoss of_loss{{address(x), address(x)}, mask.get(), &total, 0.5, address(value)};
  elementwise<Real>("pairwise", columns, params, nullptr, nullptr, derivative.get(), n, 2, &of_loss);
  const int64_t bounds[] = {0, n / 2, n / 2, n};
  gae<Real>({x.get(), x.get(), mask.get(), bounds, 3, 0, 0.9, 0.9, Masked::skip, value.get(), derivative.get()}, 2);
  gae<Real>({x.get(), x.get(), mask.get(), nullptr, 1, n, 0.9, 0.9, Masked::zero, value.get(), derivative.get()}, 2);
}

// A matrix of ones: row-major, column-major, or with every other element of it left out.
struct Ones {
  std::unique_ptr<unsigned char[]> block;
  Operand operand;
  Ones(int64_t rows, int64_t columns, int layout, bool wide) {
    const int64_t row = layout == 0   ? columns
                        : layout == 1 ? 1
                                      : 2 * columns,
                  column = layout == 0   ? 1
                           : layout == 1 ? rows
                                         : 2;
    const int64_t count = (rows - 1) * row + (columns - 1) * column + 1;
    block = filled<unsigned char>(count * (wide ? 4 : 2), 0);
    for (int64_t i = wide ? 2 : 0; i < count * (wide ? 4 : 2); i += wide ? 4 : 2) block[i] = 0x80, block[i + 1] = 0x3f;
    operand = {address(block), row, column, wide};
  }
};

// out = a b + a b of ones, in rows that lie 3 elements apart: true where every element is 2 k and nothing between the
// rows has changed.
bool product(int64_t m, int64_t n, int64_t k, int layout, bool wide_a, bool wide_b) {
  const Ones a(m, k, layout, wide_a), b(k, n, (layout + m) % 3, wide_b);
  const auto out = filled<float>(m * (n + 3) - 3, 0.5f);
  for (const bool accumulate : {false, true}) gemm({m, n, k, a.operand, b.operand, out.get(), n + 3, accumulate, 2});
  bool right = true;
  for (int64_t i = 0; i < m * (n + 3) - 3; ++i) right &= out[i] == (i % (n + 3) < n ? float(2 * k) : 0.5f);
  return right;
}

#if defined(RLK_BF16)
// Rows of one large element each, the last one of many: what rounding took from them comes back into both gradients.
bool repaired(int64_t rows, int64_t columns, int64_t width) {
  const auto d = filled<float>(rows * columns, 0.0f), dhidden = filled<float>(rows * width, 0.0f),
             dweight = filled<float>(columns * width, 0.0f);
  for (int64_t t = 0; t < rows; ++t) d[t * columns + t % columns] = 1.001f;
  for (int64_t v = 0; v < columns; ++v) d[(rows - 1) * columns + v] = 1.001f;
  const auto one = filled<uint16_t>((rows + columns) * width, 0x3f80);
  const auto kept = filled<Kept>(rows, Kept{});
  avx512_bf16::add_rounding({rows, columns, width, d.get(), columns, one.get(), width, one.get(), width, dhidden.get(),
                             width, dweight.get(), width, 2},
                            kept.get());
  const float lost = 1.001f - 1.0f;
  float first = 0;  // what column 0 got: from every row that has its element there, and from the last
  for (int64_t t = 0; t < rows; ++t)
    if (t % columns == 0 || t == rows - 1) first += lost;
  bool right = dweight[0] == first && dweight[width - 1] == first;
  for (int64_t i = 0; i < (rows - 1) * width; ++i) right &= dhidden[i] == lost;
  return right;
}
#endif

}  // namespace

int main() {
  for (const int64_t vocab : {1, 3, 65, 1023, 4097})
    for (const int options : {0, 1, 2, 3}) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        rows<float>(dtype, vocab, options & 1, options & 2);
      rows<double>(Dtype::f64, vocab, options & 1, options & 2);
    }
  for (const int64_t n : {0, 1, 4097, 9000}) lists<float>(n), lists<double>(n);
  constexpr int64_t kSizes[][3] = {{1, 1, 1},    {1, 50, 31},   {9, 1, 33},     {17, 47, 2},
                                   {7, 49, 129}, {70, 33, 515}, {515, 100, 70}, {33, 1000, 40}};
  for (const auto& size : kSizes)
    for (const int layout : {0, 1, 2}) {
      for (const bool wide : {false, true})
        if (gemm_available() && !product(size[0], size[1], size[2], layout, wide, false)) return 1;
      if (gemm_f32_available() && !product(size[0], size[1], size[2], layout, true, true)) return 1;
#if defined(RLK_EMULATED_TILES)
      tiles = true;
      for (const bool wide : {false, true})
        if (!product(size[0], size[1], size[2], layout, wide, false)) return 1;
      tiles = false;
#endif
    }
#if defined(RLK_BF16)
  for (const int64_t columns : {1, 63, 64, 1000})
    for (const int64_t width : {1, 17, 64})
      if (!repaired(5, columns, width)) return 1;
#endif
  std::puts("clean");
}
