// One scan serves both operators. A block of query rows, transposed so that kLanes of them lie side by side,
// meets the bank in blocks of rows; each block of similarities is reduced at once, bank rows in rising order.
//
// The cosine of two rows is summed in an order that depends on their width alone, never on their place in a
// block: equal rows give equal bits, so ties are ties whatever the number of threads. The reductions need no code
// for NaN: it never compares greater.
#include "similarity.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace vmad {
namespace {

using Index = std::int64_t;

constexpr Index kLanes = 16;       // query rows of a tile, the vectorised side
constexpr Index kTileRows = 4;     // bank rows of a tile
constexpr Index kBankBlock = 32;   // bank rows between two reductions
constexpr Index kQueryBlock = 96;  // query rows that share one reading of the bank
constexpr Index kDepth = 128;      // summands before a partial sum is put away: cache, and less rounding

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

/// Element d of the unit row goes to unit[d * stride].
void normalise_row(const float* row, Index width, float* unit, Index stride) {
  double partial[8] = {};  // double: squares of any float32 fit
  Index d = 0;
  for (; d + 8 <= width; d += 8) {
#pragma omp simd
    for (int i = 0; i < 8; ++i) partial[i] += double(row[d + i]) * double(row[d + i]);
  }
  for (; d < width; ++d) partial[d % 8] += double(row[d]) * double(row[d]);
  double squares = 0;
  for (double p : partial) squares += p;

  // A NaN stays one. After an infinity the scale is 0, and 0 · ∞ is NaN.
  const double scale = squares > 0 ? 1 / std::sqrt(squares) : 0;
  for (d = 0; d < width; ++d) unit[d * stride] = float(double(row[d]) * scale);
}

/// Adds the partial dot products of kTileRows bank rows and kLanes query rows to a tile [kTileRows, kQueryBlock].
void accumulate(const float* const (&rows)[kTileRows], const float* __restrict panel, Index depth,
                float* __restrict tile) {
  float sum[kTileRows][kLanes] = {};
  for (Index d = 0; d < depth; ++d) {
    for (Index r = 0; r < kTileRows; ++r) {
#pragma omp simd
      for (Index i = 0; i < kLanes; ++i) sum[r][i] += rows[r][d] * panel[d * kLanes + i];
    }
  }
  for (Index r = 0; r < kTileRows; ++r) {
#pragma omp simd
    for (Index i = 0; i < kLanes; ++i) tile[r * kQueryBlock + i] += sum[r][i];
  }
}

/// One thread's working memory.
struct Scratch {
  Scratch(const Rows& bank, Index k)
      : panels(kQueryBlock * bank.width),
        rows(bank.normalised ? 0 : kBankBlock * bank.width),
        similarity(kBankBlock * kQueryBlock),
        best(kQueryBlock * k),
        index(kQueryBlock * k) {}

  std::vector<float> panels;      // the query block, normalised: [panel][width][kLanes]
  std::vector<float> rows;        // a bank block, normalised
  std::vector<float> similarity;  // [kBankBlock, kQueryBlock]
  std::vector<float> best;        // the reduction's
  std::vector<Index> index;
};

/// Calls reduce(j, s) for each bank row j in rising order; s[i] is its cosine with query row first + i, i < count.
template <class Reduce>
void scan(const Rows& query, Index first, Index count, const Rows& bank, Scratch& scratch, Reduce reduce) {
  const Index width = bank.width;
  const Index panels = ceil_div(count, kLanes);
  std::fill(scratch.panels.begin(), scratch.panels.end(), 0.0f);
  for (Index i = 0; i < count; ++i) {
    float* panel = &scratch.panels[i / kLanes * kLanes * width];
    normalise_row(query.data + (first + i) * width, width, panel + i % kLanes, kLanes);
  }

  for (Index start = 0; start < bank.count; start += kBankBlock) {
    const Index rows = std::min(kBankBlock, bank.count - start);
    const float* block = bank.data + start * width;
    if (!bank.normalised) {
      normalise({block, rows, width, false}, scratch.rows.data());
      block = scratch.rows.data();
    }
    std::fill(scratch.similarity.begin(), scratch.similarity.end(), 0.0f);
    for (Index d = 0; d < width; d += kDepth) {
      const Index depth = std::min(kDepth, width - d);
      for (Index p = 0; p < panels; ++p) {
        for (Index r = 0; r < rows; r += kTileRows) {
          const float* tile_rows[kTileRows];  // the last tile repeats the last row: nothing reads those results
          for (Index i = 0; i < kTileRows; ++i) tile_rows[i] = block + std::min(r + i, rows - 1) * width + d;
          accumulate(tile_rows, &scratch.panels[(p * width + d) * kLanes], depth,
                     &scratch.similarity[r * kQueryBlock + p * kLanes]);
        }
      }
    }
    for (Index r = 0; r < rows; ++r) reduce(start + r, &scratch.similarity[r * kQueryBlock]);
  }
}

/// Calls work(first, count, scratch) until all query rows are done, in blocks that share them out evenly.
template <class Work>
void in_query_blocks(const Rows& query, const Rows& bank, Index k, Index threads, Work work) {
  if (query.count == 0) return;
  const Index panels = ceil_div(query.count, kLanes);
  threads = std::min(threads, panels);
  const Index share = ceil_div(panels, threads);
  const Index block = kLanes * ceil_div(share, ceil_div(share * kLanes, kQueryBlock));

  std::vector<Scratch> scratch(threads, Scratch(bank, k));  // here, so that no thread can run out of memory
  std::atomic<Index> next{0};
  auto run = [&](Scratch& own) {
    for (Index first; (first = next.fetch_add(block)) < query.count;) {
      work(first, std::min(block, query.count - first), own);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (Index i = 1; i < threads; ++i) helpers.emplace_back(run, std::ref(scratch[i]));
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run do the work.
  }
  run(scratch[0]);
  for (std::thread& helper : helpers) helper.join();
}

/// Rounding may leave the dot product of two unit rows a little outside [−1, 1].
float score_of(float best) { return best == kNone ? kNan : std::clamp(best, -1.0f, 1.0f); }

}  // namespace

void normalise(Rows rows, float* unit) {
  for (Index i = 0; i < rows.count; ++i) {
    normalise_row(rows.data + i * rows.width, rows.width, unit + i * rows.width, 1);
  }
}

void max_cosine(Rows query, Rows bank, Index k, Index threads, float* score, Index* index) {
  in_query_blocks(query, bank, k, threads, [&](Index first, Index count, Scratch& scratch) {
    std::fill(scratch.best.begin(), scratch.best.end(), kNone);
    std::fill(scratch.index.begin(), scratch.index.end(), Index{-1});
    scan(query, first, count, bank, scratch, [&](Index row, const float* similarity) {
      for (Index i = 0; i < count; ++i) {
        float* best = &scratch.best[i * k];  // falling; the first row of a tie keeps its place
        if (!(similarity[i] > best[k - 1])) continue;
        Index rank = k - 1;
        for (; rank > 0 && similarity[i] > best[rank - 1]; --rank) {
          best[rank] = best[rank - 1];
          scratch.index[i * k + rank] = scratch.index[i * k + rank - 1];
        }
        best[rank] = similarity[i];
        scratch.index[i * k + rank] = row;
      }
    });
    for (Index i = 0; i < count; ++i) {
      score[first + i] = score_of(scratch.best[i * k + k - 1]);
      index[first + i] = scratch.index[i * k + k - 1];
    }
  });
}

void segmented_max_cosine(Rows query, Rows bank, const Index* offsets, Index segments, Index threads,
                          float* score) {
  in_query_blocks(query, bank, 1, threads, [&](Index first, Index count, Scratch& scratch) {
    Index segment = 0;
    std::fill(scratch.best.begin(), scratch.best.end(), kNone);
    scan(query, first, count, bank, scratch, [&](Index row, const float* similarity) {
      for (Index i = 0; i < count; ++i) {
        if (similarity[i] > scratch.best[i]) scratch.best[i] = similarity[i];
      }
      if (row + 1 < offsets[segment + 1]) return;
      for (Index i = 0; i < count; ++i) score[(first + i) * segments + segment] = score_of(scratch.best[i]);
      std::fill(scratch.best.begin(), scratch.best.end(), kNone);
      ++segment;
    });
  });
}

}  // namespace vmad
