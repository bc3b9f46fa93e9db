// The kernels whose threads talk to one another, as a program: the row that a cluster of blocks keeps in shared memory,
// the sums over rows, the scan. A sanitizer that must be there before the process starts cannot be loaded into Python.
// Prints a hash of every result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_host.h"
#include "launchers.h"

using namespace rlk;

namespace {

template <class T>
uintptr_t at(std::vector<T>& block) {
  return reinterpret_cast<uintptr_t>(block.data());
}

struct Hash {
  unsigned long long value = 1469598103934665603ull;
  template <class T>
  void add(const std::vector<T>& block) {
    const unsigned char* byte = reinterpret_cast<const unsigned char*>(block.data());
    for (size_t i = 0; i < block.size() * sizeof(T); ++i) value = (value ^ byte[i]) * 1099511628211ull;
  }
};

// From -4 to 4, the same on every machine.
std::vector<float> drawn(long long n, unsigned seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) seed = seed * 1664525u + 1013904223u, v = float(seed >> 8) / float(1 << 21) - 4.0f;
  return x;
}

void policy(long long rows, long long columns, int team) {
  std::vector<float> x = drawn(rows * columns, 1), out(x.size()), old = drawn(rows, 2), advantage = drawn(rows, 3),
                     weight(size_t(rows), 0.5f);
  x[0] = -INFINITY;
  std::vector<int64_t> targets(static_cast<size_t>(rows));
  for (long long r = 0; r < rows; ++r) targets[size_t(r)] = r == 1 ? -100 : columns - 1 - r;
  std::vector<unsigned char> mask(x.size(), 1);
  for (size_t i = 0; i < mask.size(); i += 5) mask[i] = 0;
  std::vector<std::vector<float>> found(5, std::vector<float>(size_t(rows)));
  std::vector<double> losses(size_t(rows) + 1);
  std::vector<float> loss(1);
  Rows at_rows;
  at_rows.rows = rows, at_rows.columns = columns, at_rows.logits = {at(x), columns, 0, 1},
  at_rows.targets = at(targets);
  at_rows.inverse_temperature = 1.25f, at_rows.mask = at(mask), at_rows.mask_stride = columns;
  PolicyArguments in{};
  in.objective = objective_id("ppo_clip"), in.kl = objective_id("k3");
  in.columns[0] = at(old), in.columns[1] = at(advantage), in.params[0] = 0.2f, in.params[1] = 0.3f;
  in.per_row = {at(weight), at(weight), at(advantage), at(weight)};
  const PolicyOutputs to{at(found[0]), at(found[1]), at(found[2]), at(found[3]), at(found[4])};
  const LossSum total{at(losses), at(losses) + 8 * uintptr_t(rows), at(loss)};
  choices().fused_cluster = team;
  fused_policy<Dtype::f32, Dtype::f32>(at_rows, in, to, total, {at(out), columns, 0, 1}, {});
  Hash hash;
  for (const auto& column : found) hash.add(column);
  hash.add(out), hash.add(loss);
  std::printf("%016llx fused_policy [%lld, %lld]\n", hash.value, rows, columns);  // the same for every team
}

void list(long long n) {
  std::vector<float> x = drawn(n, 4), weight = drawn(n, 5), value(x.size()), derivative(x.size()), loss(1);
  const long long count = elementwise_parts(n);
  std::vector<double> parts(size_t(count) + 1);
  ElementwiseJob<float> job{};
  job.columns[0] = x.data(), job.weight = weight.data(), job.value = value.data(), job.derivative = derivative.data(),
  job.loss = loss.data();
  job.parts = parts.data(), job.ticket = count > 1 ? reinterpret_cast<unsigned*>(parts.data() + count) : nullptr,
  job.n = n;
  elementwise<float>("pairwise", job, {});
  Hash hash;
  hash.add(value), hash.add(derivative), hash.add(loss);
  std::printf("%016llx elementwise [%lld]\n", hash.value, n);
}

void scan(long long length, Masked masked) {
  std::vector<float> rewards = drawn(2 * length, 6), values = drawn(2 * length, 7), advantages(rewards.size()),
                     returns(rewards.size());
  std::vector<unsigned char> mask(rewards.size(), 1);
  for (size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
  GaeJob<float> job{rewards.data(), values.data(), mask.data(),       nullptr,       2, length, 0.99,
                    0.95,           masked,        advantages.data(), returns.data()};
  gae<float>(job, {});
  Hash hash;
  hash.add(advantages), hash.add(returns);
  std::printf("%016llx gae [2, %lld]\n", hash.value, length);
}

}  // namespace

int main() {
  for (const int team : {-1, 1, 2, 4, 8}) policy(2, 1033, team);
  for (const int team : {2, 8}) policy(1, 8199, team);
  for (const long long n : {31, 3000}) list(n);
  scan(2500, Masked::skip), scan(300, Masked::zero);
}
