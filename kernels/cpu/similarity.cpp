// One scan serves both operators. A block of query rows meets the bank's panels group by group; each group's products
// are reduced at once.
//
// The cosine of two rows is summed in an order that depends on their width alone, never on their place: equal rows
// give equal bits, so ties are ties whatever the number of threads. The reductions need no code for NaN: it never
// compares greater.
#include "similarity.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <system_error>
#include <thread>

#include "paths.h"

namespace vmad {
namespace {

constexpr Index kQueryRows = 768;    // of a block: they share one reading (and packing) of the bank
constexpr Index kBricks = 16;        // of 16 words between two sums of products: cache, and less rounding
constexpr Index kPartRows = 512;     // of the bank, at least, that a thread scans by itself ...
constexpr Index kPackedPartRows = 32;  // ... and of a bank that must be packed, which costs more than query rows do
constexpr Index kTasks = 4;          // a thread, so that none waits long for another
constexpr Index kMostThreads = 512;  // each has memory of its own

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

const Tiles* native(const Path& path, Type type) {
  return type == Type::bfloat16 ? path.bfloat16 : type == Type::int8 ? path.int8 : nullptr;
}

/// How one call's work is done and shared out: query blocks × parts of the bank.
struct Plan {
  Plan(const Path& way, Query query_, const Bank& bank_, Index wanted_threads, Index most_parts)
      : path(way),
        query(query_),
        bank(bank_),
        converts(native(path, bank.type) == nullptr && bank.type != Type::float32),
        tiles(converts || bank.type == Type::float32 ? *path.float32 : *native(path, bank.type)),
        computed(converts ? Type::float32 : bank.type) {
    const Index most = std::clamp(wanted_threads, Index{1}, kMostThreads);
    blocks = ceil_div(query.count, kQueryRows);
    const Index smallest = bank.rows ? kPackedPartRows : kPartRows;
    const Index wanted = most > 1 ? ceil_div(kTasks * most, blocks) : 1;
    parts = std::clamp(bank.count / smallest, Index{1}, std::min(wanted, most_parts));
    const Index query_tiles = ceil_div(query.count, tiles.rows);
    if (blocks * parts < most) blocks = std::min(query_tiles, ceil_div(most, parts));
    block_rows = ceil_div(query_tiles, blocks) * tiles.rows;
    blocks = ceil_div(query.count, block_rows);
    threads = std::min(most, blocks * parts);
  }

  const Path& path;
  const Query query;
  const Bank& bank;
  const bool converts;  // the bank's panels to float32, on the way
  const Tiles& tiles;
  const Type computed;
  Index blocks, parts, block_rows, threads;
};

/// The best of each query row and lane since the last `clear`.
struct Best {
  explicit Best(Index rows) : score(rows), where(rows) {}

  void clear() {
    for (auto& row : score) std::fill(std::begin(row.lane), std::end(row.lane), kNone);
  }
  /// Slot of row i's best, −1 if it has none; `value` is its score.
  Index find(Index i, float& value) const {
    Index slot = -1;
    value = kNone;
    for (Index lane = 0; lane < kPanelRows; ++lane) {
      const Index candidate = Index{where[i].lane[lane]} * kPanelRows + lane;
      const float found = score[i].lane[lane];
      if (found > value || (found == value && found != kNone && candidate < slot)) value = found, slot = candidate;
    }
    return slot;
  }

  std::vector<Lanes<float>> score;
  std::vector<Lanes<std::int32_t>> where;
};

template <class T>
using Buffer = std::unique_ptr<T[]>;

/// One thread's working memory. What `new` brings is not initialised.
struct Scratch {
  explicit Scratch(const Plan& plan)
      : query(new Line[lines(plan.computed, plan.bank.width) / 16 * plan.block_rows]),
        query_scale(new float[plan.block_rows]),
        products(new Line[plan.block_rows * plan.tiles.panels]),
        panels(new Line[plan.tiles.panels * panel_lines(Type::float32, plan.bank.width)]),
        best(plan.block_rows),
        unit(new float[plan.bank.width]),
        words(new Word[lines(Type::float32, plan.bank.width)]) {}

  Index block = -1;           // that `query` holds
  Buffer<Line> query;         // [brick][row]
  Buffer<float> query_scale;  // [row]
  Buffer<Line> products;      // [row][panel]
  Buffer<Line> panels;        // packed or converted
  Best best;
  Buffer<float> unit;
  Buffer<Word> words;
};

/// Rows first, first + 1, … into a panel's lanes.
void pack_panel(const Path& path, Type type, const float* rows, Index count, Index width, Line* panel, Index lane,
                float* unit, Word* words) {
  const Index n = lines(type, width);
  for (Index i = 0; i < count; ++i, ++lane) {
    const Encoded row = path.encode(type, rows + i * width, width, unit, words);
    for (Index line = 0; line < n; ++line) panel[line].word[lane] = words[line];
    std::memcpy(&panel[n].word[lane], &row.scale, sizeof row.scale);
    std::memcpy(&panel[n + 1].word[lane], &row.sum, sizeof row.sum);
  }
}

/// Query rows first … first + count into scratch.query; rows of zeros fill the block up.
void encode_query(const Plan& plan, Index block, Index first, Index count, Scratch& scratch) {
  if (scratch.block == block) return;
  const Index width = plan.bank.width, bricks = lines(plan.computed, width) / 16;
  for (Index brick = 0; brick < bricks; ++brick) {
    std::memset(&scratch.query[brick * plan.block_rows + count], 0, (plan.block_rows - count) * sizeof(Line));
  }
  for (Index i = 0; i < count; ++i) {
    Word* words = scratch.words.get();
    const float* row = plan.query.rows + (first + i) * width;
    scratch.query_scale[i] = plan.path.encode(plan.computed, row, width, scratch.unit.get(), words).scale;
    for (Index brick = 0; brick < bricks; ++brick) {
      Line& line = scratch.query[brick * plan.block_rows + i];
      for (Index w = 0; w < 16; ++w) line.word[w] = words[brick * 16 + w] ^ plan.tiles.flip;
    }
  }
  scratch.block = block;
}

/// Scales and shifts of a panel's lanes; NaN outside of [from, to), so that those never win.
struct Factors {
  Factors(const Plan& plan, const Line* panel, Index from, Index to) {
    const Line* line = panel + lines(plan.bank.type, plan.bank.width);
    std::memcpy(scale, line, sizeof scale);
    std::memcpy(shift, line + 1, sizeof shift);
    for (Index i = 0; i < kPanelRows; ++i) {
      const bool inside = i >= from && i < to;
      shift[i] = inside ? shift[i] * plan.tiles.shift : 0;
      if (!inside) scale[i] = kNan;
    }
  }

  float scale[16];
  std::int32_t shift[16];
};

/// Calls reduce(slot, panel, products) for each panel that has slots in [from, to), in rising order. `slot` is the
/// panel's first; the block's row i has its products in products[i * plan.tiles.panels].
template <class Reduce>
void scan(const Plan& plan, Index from, Index to, Scratch& scratch, Reduce reduce) {
  const Bank& bank = plan.bank;
  const Index count = plan.tiles.panels, bricks = lines(plan.computed, bank.width) / 16;
  const Index step = count * kPanelRows;
  for (Index group = from / step * step; group < to; group += step) {
    const Line *stored[2], *panels[2];
    for (Index p = 0; p < count; ++p) {
      const Index slot = group + p * kPanelRows;
      Line* own = scratch.panels.get() + p * panel_lines(Type::float32, bank.width);
      if (bank.rows) {
        const Index rows = std::clamp(bank.count - slot, Index{0}, kPanelRows);
        pack_panel(plan.path, Type::float32, bank.rows + slot * bank.width, rows, bank.width, own, 0,
                   scratch.unit.get(), scratch.words.get());
        stored[p] = panels[p] = own;
      } else {
        const Line* block = bank.blocks[slot / kBlockRows];
        stored[p] = panels[p] = block + slot % kBlockRows / kPanelRows * panel_lines(bank.type, bank.width);
        if (plan.converts) {
          plan.path.widen(bank.type, stored[p], bricks * 16, own);
          panels[p] = own;
        }
      }
    }
    for (Index brick = 0; brick < bricks; brick += kBricks) {
      plan.tiles.multiply(scratch.query.get(), plan.block_rows, panels, brick, std::min(kBricks, bricks - brick),
                          brick == 0, scratch.products.get());
    }
    for (Index p = 0; p < count; ++p) {
      const Index slot = group + p * kPanelRows;
      if (slot + kPanelRows > from && slot < to) reduce(slot, stored[p], scratch.products.get() + p);
    }
  }
}

/// Calls work(scratch, part, first, count) for each query block and part of the bank.
template <class Work>
void run(const Plan& plan, Work work) {
  std::vector<Scratch> scratch;  // here, so that no thread can run out of memory
  for (Index i = 0; i < plan.threads; ++i) scratch.emplace_back(plan);
  std::atomic<Index> next{0};
  auto take = [&](Scratch& own) {
    for (Index task; (task = next.fetch_add(1)) < plan.blocks * plan.parts;) {
      const Index block = task / plan.parts, first = block * plan.block_rows;
      const Index count = std::min(plan.block_rows, plan.query.count - first);
      encode_query(plan, block, first, count, own);
      work(own, task % plan.parts, first, count);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(plan.threads - 1);
  try {
    for (Index i = 1; i < plan.threads; ++i) helpers.emplace_back(take, std::ref(scratch[i]));
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run do the work.
  }
  take(scratch[0]);
  for (std::thread& helper : helpers) helper.join();
}

void keep_best(const Plan& plan, const Factors& factors, const Line* products, Index rows, Index panel, Best& best) {
  plan.tiles.keep_best(products, plan.tiles.panels, rows, factors.scale, factors.shift, std::int32_t(panel),
                       best.score.data(), best.where.data());
}

/// Rounding may leave the dot product of two unit rows a little outside [−1, 1].
float score_of(float best, float query_scale) {
  return best == kNone ? kNan : std::clamp(best * query_scale, -1.0f, 1.0f);
}

}  // namespace

const std::vector<const Path*>& paths() {
  static const std::vector<const Path*> usable = [] {
    std::vector<const Path*> found;
#if defined(__x86_64__)
    const Path* all[] = {&plain, &avx2, &avx512, &avx512_vnni, &avx512_bf16, &amx};
#elif defined(__aarch64__)
    const Path* all[] = {&plain, &neon, &neon_dot};
#else
    const Path* all[] = {&plain};
#endif
    for (const Path* path : all) {
      if (path->runs()) found.push_back(path);
    }
    return found;
  }();
  return usable;
}

const char* name(const Path& path) { return path.name; }

Index lines(Type type, Index width) {
  const Index elements = type == Type::float32 ? 1 : type == Type::int8 ? 4 : 2;
  return ceil_div(ceil_div(width, elements), 16) * 16;
}

void pack(const Path& path, Type type, const float* rows, Index count, Index width, Line* block, Index start) {
  std::vector<float> unit(width);
  std::vector<Word> words(lines(type, width));
  while (count > 0) {
    const Index lane = start % kPanelRows, now = std::min(count, kPanelRows - lane);
    Line* panel = block + start / kPanelRows * panel_lines(type, width);
    pack_panel(path, type, rows, now, width, panel, lane, unit.data(), words.data());
    rows += now * width, start += now, count -= now;
  }
}

void max_cosine(const Path& path, Query query, const Bank& bank, Index k, Index threads, float* score, Index* index) {
  if (query.count == 0) return;
  const Plan plan(path, query, bank, threads, bank.count);
  std::vector<float> best(plan.parts * query.count * k, kNone);  // [part][query row][rank]
  std::vector<Index> where(best.size(), -1);
  std::vector<float> query_scale(query.count);
  run(plan, [&](Scratch& scratch, Index part, Index first, Index count) {
    std::copy_n(scratch.query_scale.get(), count, query_scale.begin() + first);
    const Index step = plan.tiles.panels * kPanelRows;
    const auto bound = [&](Index p) {
      return p == 0 ? bank.first
                    : p == plan.parts ? bank.first + bank.count : (bank.first + bank.count * p / plan.parts) / step * step;
    };
    const Index from = bound(part), to = bound(part + 1), place = (part * query.count + first) * k;
    Best& lanes = scratch.best;
    lanes.clear();
    scan(plan, from, to, scratch, [&](Index slot, const Line* panel, const Line* products) {
      const Factors factors(plan, panel, from - slot, to - slot);
      if (k == 1) {
        keep_best(plan, factors, products, count, slot / kPanelRows, lanes);
      } else {
        plan.tiles.keep_ranked(products, plan.tiles.panels, count, factors.scale, factors.shift, slot, k,
                               &best[place], &where[place]);
      }
    });
    for (Index i = 0; k == 1 && i < count; ++i) where[place + i] = lanes.find(i, best[place + i]);
  });
  std::vector<Index> at(plan.parts);
  for (Index i = 0; i < query.count; ++i) {
    // Merge the parts' falling scores up to rank k. The parts rise: the first of a tie comes first.
    std::fill(at.begin(), at.end(), 0);
    float value = kNone;
    Index slot = -1;
    for (Index rank = 0; rank < k; ++rank) {
      Index from = 0;
      value = kNone, slot = -1;
      for (Index part = 0; part < plan.parts; ++part) {
        const Index place = (part * query.count + i) * k + at[part];
        if (at[part] < k && best[place] > value) value = best[place], slot = where[place], from = part;
      }
      ++at[from];
    }
    score[i] = score_of(value, query_scale[i]);
    index[i] = score[i] == score[i] ? slot - bank.first : -1;
  }
}

void segmented_max_cosine(const Path& path, Query query, const Bank& bank, const Index* offsets, Index segments,
                          Index threads, float* score) {
  if (query.count == 0) return;
  const Plan plan(path, query, bank, threads, segments);
  run(plan, [&](Scratch& scratch, Index part, Index first, Index count) {
    Index segment = segments * part / plan.parts;
    const Index last = segments * (part + 1) / plan.parts;
    Best& lanes = scratch.best;
    lanes.clear();
    scan(plan, bank.first + offsets[segment], bank.first + offsets[last], scratch,
         [&](Index slot, const Line* panel, const Line* products) {
           for (; segment < last; ++segment) {
             const Index from = bank.first + offsets[segment] - slot, to = bank.first + offsets[segment + 1] - slot;
             if (from >= kPanelRows) return;
             keep_best(plan, Factors(plan, panel, from, to), products, count, 0, lanes);
             if (to > kPanelRows) return;
             for (Index i = 0; i < count; ++i) {
               float value;
               lanes.find(i, value);
               score[(first + i) * segments + segment] = score_of(value, scratch.query_scale[i]);
             }
             lanes.clear();
           }
         });
  });
}

}  // namespace vmad
