// Runs one path on what stands on standard input, for processors that the tests' own is not: see test_paths.py.
//
// in:  int64 [type, k, first, Q, M, D, S], float32 query [Q,D] and bank [first + M,D], int64 offsets [S+1]
// out: float32 score [Q], int64 index [Q], float32 segment scores [Q,S]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "similarity.h"

using vmad::Index;

template <class T>
std::vector<T> read(Index count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != std::size_t(count)) std::abort();
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main(int, char** arguments) {
  const vmad::Path* path = nullptr;
  for (const vmad::Path* usable : vmad::paths()) {
    if (std::strcmp(vmad::name(*usable), arguments[1]) == 0) path = usable;
  }
  if (path == nullptr) return 77;

  const auto sizes = read<Index>(7);
  const auto type = vmad::Type(sizes[0]);
  const Index k = sizes[1], first = sizes[2], q = sizes[3], m = sizes[4], d = sizes[5], s = sizes[6];
  const auto query = read<float>(q * d), rows = read<float>((first + m) * d);
  const auto offsets = read<Index>(s + 1);

  std::vector<std::vector<vmad::Line>> blocks;
  std::vector<const vmad::Line*> addresses;
  for (Index start = 0; start < first + m; start += vmad::kBlockRows) {
    blocks.emplace_back(vmad::kBlockPanels * vmad::panel_lines(type, d));
    const Index count = std::min(vmad::kBlockRows, first + m - start);
    vmad::pack(*path, type, rows.data() + start * d, count, d, blocks.back().data(), 0);
  }
  for (const auto& block : blocks) addresses.push_back(block.data());
  const vmad::Bank bank{type, d, first, m, addresses.data(), nullptr};

  std::vector<float> score(q), segments(q * s);
  std::vector<Index> index(q);
  vmad::max_cosine(*path, {query.data(), q}, bank, k, 3, score.data(), index.data());
  vmad::segmented_max_cosine(*path, {query.data(), q}, bank, offsets.data(), s, 3, segments.data());
  write(score);
  write(index);
  write(segments);
}
