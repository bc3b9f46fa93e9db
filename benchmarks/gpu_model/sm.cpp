// One multiprocessor, clock by clock: four schedulers, blocks of warps, one after another, that run the hot loops of a
// kernel. Reads cases from the standard input and prints for each what it moves per clock and how busy its issue is.
//
// A scheduler issues one instruction per clock, of the first warp that may: the compiler's stall count is over, its
// scoreboards are free, and so is the pipe. Memory is this multiprocessor's share of the device's: a queue of so many
// bytes per clock, and behind it a latency. Stores take their place in the queue and wait for nothing. What lies
// between the loops of a row is a delay. Not modelled: DRAM pages, slices of the second-level cache, bank conflicts,
// the instruction cache, the last rows of a launch.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <iostream>
#include <vector>

using Clock = long long;
constexpr Clock kNever = 1LL << 60;

enum Pipe { kFma, kFmaHeavy, kOther };  // from kOther on each number is a pipe of its own
constexpr int kPipes = 16, kSchedulers = 4, kScoreboards = 6;
enum Kind { kPlain, kLoad, kStore, kCopy, kCommit, kWaitGroups, kBarrier };

struct Instruction {
  int pipe, cycles, latency, stall, writes, reads, waits, kind, operand;
  double bytes;
};
struct Phase {  // `times` passes through a loop, then the block's warps meet, then a delay
  int loop, times;
  Clock delay;
  double hits;  // share of the loads that the second-level cache serves
};
struct Warp {
  int block = 0, phase = 0, at = 0, pass = 0;
  Clock next = 0, free[kScoreboards] = {}, group = 0;
  std::deque<Clock> groups;  // when the copies of each group are there
  Clock ready = 0;           // but for its pipe, which others share
  int pipe = kOther;
};

struct Case {
  int blocks, warps, rows;
  double rate;
  Clock latency, hit, start;
  std::vector<std::vector<Instruction>> loops;
  std::vector<Phase> phases;

  bool read() {
    int count, length;
    if (!(std::cin >> blocks >> warps >> rows >> rate >> latency >> hit >> start >> count)) return false;
    loops.resize(count);
    for (auto& loop : loops) {
      std::cin >> length;
      loop.resize(length);
      for (auto& i : loop)
        std::cin >> i.pipe >> i.cycles >> i.latency >> i.stall >> i.writes >> i.reads >> i.waits >> i.kind >>
            i.operand >> i.bytes;
    }
    std::cin >> count;
    phases.resize(count);
    for (auto& p : phases) std::cin >> p.loop >> p.times >> p.delay >> p.hits;
    return bool(std::cin);
  }
};

struct Multiprocessor {
  const Case& of;
  std::vector<Warp> warps;
  std::vector<int> arrived, rows_left;
  Clock now = 0, pipes[kSchedulers][kPipes] = {}, halves[kSchedulers][2] = {};
  double queue = 0, moved = 0, hits = 0;
  long long issued = 0;
  int last[kSchedulers] = {}, rows_done = 0;
  unsigned random = 1;
  // The window that counts: from the first row of every block to the last but one.
  double moved_from = 0, moved_to = 0;
  Clock from = 0, to = 1;
  long long issued_from = 0, issued_to = 0;

  explicit Multiprocessor(const Case& c)
      : of(c), warps(c.blocks * c.warps), arrived(c.blocks), rows_left(c.blocks, c.rows) {
    for (int w = 0; w < int(warps.size()); ++w) {
      warps[w].block = w / of.warps;
      // Blocks are spread over a row, as they are after some rows.
      warps[w].next = of.start + warps[w].block * Clock(12000 / of.blocks) + jitter();
      look_ahead(warps[w]);
    }
  }
  Clock jitter() { return (random = random * 1664525u + 1013904223u) >> 27; }
  Clock memory(double bytes, Clock latency) {
    queue = std::max(queue, double(now)) + bytes / of.rate, moved += bytes;
    return Clock(queue) + latency;
  }

  // Notes from which clock on the next instruction of a warp may be issued.
  void look_ahead(Warp& w) const {
    const Instruction& i = of.loops[of.phases[w.phase].loop][w.at];
    w.ready = w.next, w.pipe = i.pipe;
    for (int b = 0; b < kScoreboards; ++b)
      if (i.waits >> b & 1) w.ready = std::max(w.ready, w.free[b]);
    if (i.kind == kWaitGroups && int(w.groups.size()) > i.operand)
      w.ready = std::max(w.ready, w.groups[w.groups.size() - 1 - i.operand]);
  }
  Clock pipe_free(const Warp& w, int scheduler) const {
    const Clock* half = halves[scheduler];
    return w.pipe == kFma ? std::min(half[0], half[1]) : w.pipe == kFmaHeavy ? half[0] : pipes[scheduler][w.pipe];
  }

  void issue(Warp& w, int scheduler) {
    const Phase& phase = of.phases[w.phase];
    const auto& loop = of.loops[phase.loop];
    const Instruction& i = loop[w.at];
    Clock* half = halves[scheduler];
    ++issued;
    if (i.pipe == kFma)
      half[half[1] <= now] = now + 2;
    else if (i.pipe == kFmaHeavy)
      half[0] = now + 2;
    else
      pipes[scheduler][i.pipe] = now + i.cycles;
    Clock there = now + i.latency;
    w.next = now + std::max(1, i.stall);
    switch (i.kind) {
      case kLoad:
        hits += phase.hits;
        if (hits >= 1)
          hits -= 1, there = now + of.hit;
        else
          there = memory(i.bytes, of.latency);
        break;
      case kStore: memory(i.bytes, 0); break;
      case kCopy: w.group = std::max(w.group, memory(i.bytes, of.latency)); break;
      case kCommit: w.groups.push_back(w.group), w.group = 0; break;
      case kWaitGroups:
        while (int(w.groups.size()) > i.operand) w.groups.pop_front();
        break;
      default: break;
    }
    if (i.writes < kScoreboards) w.free[i.writes] = std::max(w.free[i.writes], there);
    if (i.reads < kScoreboards) w.free[i.reads] = std::max(w.free[i.reads], now + 10);
    const bool ends = ++w.at == int(loop.size());
    if (ends) w.at = 0, ++w.pass;
    if (ends && w.pass == phase.times)
      meet(w, true);
    else if (i.kind == kBarrier)
      meet(w, false);
    else
      look_ahead(w);
  }

  // A warp waits for the others of its block, in the middle of a loop or at the end of a phase.
  void meet(Warp& w, bool phase_ends) {
    w.ready = kNever;
    if (phase_ends) w.pass = 0;
    if (++arrived[w.block] < of.warps) return;
    arrived[w.block] = 0;
    Clock resume = now + 20;
    bool row_ends = false, ended = false;
    if (phase_ends) {
      resume += of.phases[w.phase].delay;
      row_ends = w.phase + 1 == int(of.phases.size());
    }
    if (row_ends) {
      ended = --rows_left[w.block] == 0;
      resume += of.start;
      ++rows_done;
      if (rows_done == of.blocks) from = now, moved_from = moved, issued_from = issued;
      if (rows_done <= of.blocks * (of.rows - 1)) to = now, moved_to = moved, issued_to = issued;
    }
    for (int k = w.block * of.warps; k < (w.block + 1) * of.warps; ++k) {
      Warp& x = warps[k];
      if (phase_ends) x.phase = row_ends ? 0 : x.phase + 1, x.next = resume + jitter();
      if (row_ends) x.groups.clear();
      if (!ended) look_ahead(x);
    }
  }

  void run() {
    while (rows_done < of.blocks * of.rows) {
      bool any = false;
      Clock soon = kNever;
      for (int s = 0; s < kSchedulers; ++s) {
        const int count = (int(warps.size()) - s + kSchedulers - 1) / kSchedulers;
        for (int d = 0; d < count; ++d) {  // the warp of the last issue first
          const int k = (last[s] + d) % count;
          Warp& w = warps[k * kSchedulers + s];
          if (w.ready > now) {
            soon = std::min(soon, w.ready);
            continue;
          }
          const Clock at = pipe_free(w, s);
          if (at <= now) {
            issue(w, s), last[s] = k, any = true;
            break;
          }
          soon = std::min(soon, at);
        }
      }
      now = any ? now + 1 : std::max(now + 1, soon);
    }
  }
};

int main() {
  for (Case c; c.read();) {
    Multiprocessor sm(c);
    sm.run();
    const double clocks = double(sm.to - sm.from);
    std::printf("%.4f %.4f\n", (sm.moved_to - sm.moved_from) / clocks,
                double(sm.issued_to - sm.issued_from) / kSchedulers / clocks);
  }
}
