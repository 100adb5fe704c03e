// The paths: what each brings, and its name.
#pragma once

#include "similarity.h"

namespace vmad {

/// One value for each row of a panel.
template <class T>
struct Lanes {
  T lane[kPanelRows];
};

/// Products of query rows with panels of one element type, and what is kept of them.
struct Tiles {
  Index rows;    // query rows of a tile: `multiply` is given a multiple of it
  Index panels;  // panels that it takes at once
  Word flip;     // to be XORed onto query words: makes signed bytes unsigned, +128, where the instruction wants that
  std::int32_t shift;  // of the products, a unit of the bank row's sum: undoes the +128

  /// Products of lines 16·brick … of `rows` query rows [brick][row] and of panels, added to (`first`: put into)
  /// `products` [row][panel]. Each is summed in the order of the lines, wherever its rows stand.
  void (*multiply)(const Line* query, Index rows, const Line* const* panels, Index brick, Index bricks, bool first,
                   Line* products);

  /// Cosines of every `stride`-th line of products and one panel: the best so far of each lane, and its panel.
  void (*keep_best)(const Line* products, Index stride, Index rows, const float* scale, const std::int32_t* shift,
                    std::int32_t panel, Lanes<float>* best, Lanes<std::int32_t>* where);

  /// The same for the k best of each row, falling; `slot` is the panel's first. The first of a tie keeps its place.
  void (*keep_ranked)(const Line* products, Index stride, Index rows, const float* scale, const std::int32_t* shift,
                      Index slot, Index k, float* best, Index* where);
};

/// What goes with a row's words. Scale: what makes them a row of length 1 again, NaN for a NaN row.
struct Encoded {
  float scale;
  std::int32_t sum;
};

struct Path {
  const char* name;
  bool (*runs)();
  const Tiles* float32;
  const Tiles* bfloat16;  // null: widened to float32
  const Tiles* int8;      // null: the same

  /// `row` [width] scaled to length 1 and turned into words (as many as there are lines, zeros at the end).
  /// `unit` [width] is working memory.
  Encoded (*encode)(Type type, const float* row, Index width, float* unit, Word* words);

  /// The first `lines` lines of a float32 panel from a panel of another type, without the rows' scales.
  void (*widen)(Type type, const Line* panel, Index lines, Line* wide);
};

// Which of them are compiled depends on the processor's family. All are constants: code that runs when the library is
// loaded would run on processors that lack its instructions.
extern const Tiles avx512_float32, neon_float32;  // of several paths

extern const Path plain;
extern const Path avx2, avx512, avx512_vnni, avx512_bf16, amx;  // x86-64
extern const Path neon, neon_dot;                               // aarch64

}  // namespace vmad
