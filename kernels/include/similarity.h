// Patch similarity on the processor. What the operators compute is defined in kernels/reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace vmad {

using Index = std::int64_t;
using Word = std::uint32_t;

/// How the rows of a bank are kept. The sums of products are float32 (int8: int32) in every case.
enum class Type { float32, bfloat16, float16, int8 };

/// Widest row whose int8 products cannot overflow int32: 2³¹ / (255 · 127), rounded down.
constexpr Index kMaxInt8Width = 65536;

/// 16 words side by side, one of each of 16 bank rows; or 16 successive words of one query row.
struct alignas(64) Line {
  Word word[16];
};

/// A panel is 16 bank rows: `lines(type, width)` lines of their elements, a word of each row a line (a word holds 1
/// float32, 2 bfloat16 or float16, or 4 int8; zeros fill up), then a line of the rows' scales (float32) and one of
/// the sums of their elements (int32, for int8 alone). A row is its elements times its scale; a NaN row has a NaN.
constexpr Index kPanelRows = 16;
constexpr Index kBlockPanels = 16;
constexpr Index kBlockRows = kPanelRows * kBlockPanels;

Index lines(Type type, Index width);
inline Index panel_lines(Type type, Index width) { return lines(type, width) + 2; }

/// Rows [first, first + count) of the slots that the blocks of kBlockPanels panels number through; or, where `rows`
/// is not null, float32 rows [count, width] that are scaled to length 1 on the way (type float32, first 0).
struct Bank {
  Type type;
  Index width;
  Index first;
  Index count;
  const Line* const* blocks;
  const float* rows;
};

struct Query {
  const float* rows;  // [count, bank's width]
  Index count;
};

/// One way through the code: an instruction set. What it lacks for a type it does in float32.
struct Path;

/// The paths that this processor can go, the plain one first, the best last.
const std::vector<const Path*>& paths();
const char* name(const Path& path);

/// Scales `rows` [count, width] to length 1 and puts them into slots start … of one block.
void pack(const Path& path, Type type, const float* rows, Index count, Index width, Line* block, Index start);

/// For each query row its k-th best bank row: `score` [Q], `index` [Q]. NaN and −1 where there is none.
/// Memory: O(Q·k) a piece of work, of which there are a few a thread, and a block of query rows a thread.
void max_cosine(const Path& path, Query query, const Bank& bank, Index k, Index threads, float* score, Index* index);

/// For each query row its best cosine in each segment [offsets[s], offsets[s + 1]) of the bank: `score` [Q, S].
/// The segments cover the bank, none is empty. Memory: a block of query rows a thread.
void segmented_max_cosine(const Path& path, Query query, const Bank& bank, const Index* offsets, Index segments,
                          Index threads, float* score);

}  // namespace vmad
