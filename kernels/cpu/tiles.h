// What the paths' source files are made of. They are compiled for instructions that the processor at hand may lack,
// so nothing here may be shared with other files by the linker: all is static, none is of the standard library.
#pragma once

#include <cstring>

#include "paths.h"

namespace vmad {
namespace {

template <class T>
inline Lanes<T> lanes(const Line& line) {
  Lanes<T> out;
  std::memcpy(&out, &line, sizeof out);
  return out;
}

/// V is one vector of the instruction set: Sum, kLanes, load, broadcast, step (sum + query · bank), add, store.
template <class V, int kRows, int kPanels>
void multiply(const Line* query, Index rows, const Line* const* panels, Index brick, Index bricks, bool first,
              Line* products) {
  constexpr int kVectors = kPanelRows / V::kLanes;  // of a panel
  for (Index row = 0; row < rows; row += kRows) {
    typename V::Sum sum[kRows][kPanels][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][p][v] = V::zero();
      }
    }
    for (Index b = brick; b < brick + bricks; ++b) {
      const Line* q = query + b * rows + row;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(q + rows + i);
      for (int w = 0; w < 16; ++w) {
        typename V::Operand bank[kPanels][kVectors];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) bank[p][v] = V::load(panels[p][b * 16 + w].word + v * V::kLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const typename V::Operand one = V::broadcast(q[i].word + w);
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[i][p][v] = V::step(sum[i][p][v], one, bank[p][v]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Word* out = products[(row + i) * kPanels + p].word + v * V::kLanes;
          V::store(out, first ? sum[i][p][v] : V::add(V::load_sum(out), sum[i][p][v]));
        }
      }
    }
  }
}

inline float cosine(float product, float scale, std::int32_t) { return product * scale; }
inline float cosine(std::int32_t product, float scale, std::int32_t shift) { return float(product + shift) * scale; }

template <class T>
void keep_best(const Line* products, Index stride, Index rows, const float* scale, const std::int32_t* shift,
               std::int32_t panel, Lanes<float>* best, Lanes<std::int32_t>* where) {
  for (Index row = 0; row < rows; ++row) {
    const Lanes<T> product = lanes<T>(products[row * stride]);
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const float found = cosine(product.lane[i], scale[i], shift[i]);
      const bool better = found > best[row].lane[i];
      best[row].lane[i] = better ? found : best[row].lane[i];
      where[row].lane[i] = better ? panel : where[row].lane[i];
    }
  }
}

template <class T>
void keep_ranked(const Line* products, Index stride, Index rows, const float* scale, const std::int32_t* shift,
                 Index slot, Index k, float* best, Index* where) {
  for (Index row = 0; row < rows; ++row, best += k, where += k) {
    const Lanes<T> product = lanes<T>(products[row * stride]);
    float found[16];
    int better = 0;
#pragma omp simd reduction(+ : better)
    for (int i = 0; i < 16; ++i) {
      found[i] = cosine(product.lane[i], scale[i], shift[i]);
      better += found[i] > best[k - 1];
    }
    for (int i = 0; better && i < 16; ++i) {
      if (!(found[i] > best[k - 1])) continue;
      Index rank = k - 1;
      for (; rank > 0 && found[i] > best[rank - 1]; --rank) {
        best[rank] = best[rank - 1];
        where[rank] = where[rank - 1];
      }
      best[rank] = found[i];
      where[rank] = slot + i;
    }
  }
}

template <class V, int kRows, int kPanels>
constexpr Tiles tiles(Word flip = 0, std::int32_t shift = 0) {
  using T = typename V::Product;
  return {kRows, kPanels, flip, shift, multiply<V, kRows, kPanels>, keep_best<T>, keep_ranked<T>};
}

inline float as_float(Word bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Word as_word(float value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

/// Half precision's exponent is 112 smaller: shifted into place it is a float32 2¹¹² times too small.
inline float from_float16(Word half) {
  const Word magnitude = as_word(as_float((half & 0x7fff) << 13) * 0x1p112f);
  const Word nan = (half & 0x7c00) == 0x7c00 ? 0x7fc00000u : 0;
  return as_float(magnitude | nan | (half & 0x8000) << 16);
}

/// Of magnitudes up to 1, and NaN; to nearest, ties to even.
inline Word to_float16(float value) {
  const Word bits = as_word(value) & 0x7fffffff, small = as_word(as_float(bits) * 0x1p-112f);
  const Word half = (small + 0xfff + (small >> 13 & 1)) >> 13;
  return (bits > 0x7f800000 ? 0x7e00 : half) | (as_word(value) >> 16 & 0x8000);
}

inline Word to_bfloat16(float value) {
  const Word bits = as_word(value);
  return value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// No fused multiply-add and eight partial sums: these sums are the same on every path.
double squares(const float* row, Index width) {
  double partial[8] = {};  // double: squares of any float32 fit
  Index d = 0;
  for (; d + 8 <= width; d += 8) {
#pragma omp simd
    for (int i = 0; i < 8; ++i) partial[i] += double(row[d + i]) * double(row[d + i]);
  }
  for (; d < width; ++d) partial[d % 8] += double(row[d]) * double(row[d]);
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

/// Of a row whose squares sum to `sum`. NaN stays NaN; after an infinity the scale is 0, and 0 · ∞ is NaN.
double unit_scale(double sum) { return sum != sum ? sum : sum > 0 ? 1 / __builtin_sqrt(sum) : 0; }

Encoded encode(Type type, const float* row, Index width, float* unit, Word* words) {
  std::memset(words, 0, lines(type, width) * sizeof(Word));
  const double scale = unit_scale(squares(row, width));
#pragma omp simd
  for (Index d = 0; d < width; ++d) unit[d] = float(double(row[d]) * scale);

  if (type == Type::float32) {
    std::memcpy(words, unit, width * sizeof(float));
    return {1, 0};
  }
  if (type == Type::int8) {
    float most = 0;
    int nan = 0;
#pragma omp simd reduction(max : most) reduction(+ : nan)
    for (Index d = 0; d < width; ++d) {
      most = __builtin_fabsf(unit[d]) > most ? __builtin_fabsf(unit[d]) : most;
      nan += unit[d] != unit[d];
    }
    if (nan) return {__builtin_nanf(""), 0};
    const float steps = most > 0 ? 127 / most : 0;
    auto* bytes = reinterpret_cast<signed char*>(words);
    std::int32_t sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (Index d = 0; d < width; ++d) {
      // Above 1.5 · 2²³ a float32 counts in ones: the addition rounds.
      const std::int32_t step = std::int32_t(as_word(unit[d] * steps + 0x1.8p23f)) - 0x4b400000;
      bytes[d] = static_cast<signed char>(step);
      sum += step;
      square += step * step;
    }
    return {float(unit_scale(square)), sum};
  }
  auto* halves = reinterpret_cast<unsigned char*>(words);
#pragma omp simd
  for (Index d = 0; d < width; ++d) {
    const Word half = type == Type::bfloat16 ? to_bfloat16(unit[d]) : to_float16(unit[d]);
    const auto two = static_cast<std::uint16_t>(half);
    std::memcpy(halves + 2 * d, &two, sizeof two);
    unit[d] = type == Type::bfloat16 ? as_float(half << 16) : from_float16(half);
  }
  return {float(unit_scale(squares(unit, width))), 0};
}

void widen(Type type, const Line* panel, Index lines, Line* wide) {
  const int elements = type == Type::int8 ? 4 : 2;
  for (Index line = 0; line < lines; ++line) {
    const Line& packed = panel[line / elements];
    const int bits = 32 / elements, from = int(line % elements) * bits;
    Lanes<float> out;
    if (type == Type::int8) {
#pragma omp simd
      for (int i = 0; i < 16; ++i) out.lane[i] = float(std::int32_t(packed.word[i] << (24 - from)) >> 24);
    } else if (type == Type::bfloat16) {
#pragma omp simd
      for (int i = 0; i < 16; ++i) out.lane[i] = as_float(packed.word[i] >> from << 16);
    } else {
#pragma omp simd
      for (int i = 0; i < 16; ++i) out.lane[i] = from_float16(packed.word[i] >> from & 0xffff);
    }
    std::memcpy(wide + line, &out, sizeof out);
  }
}

}  // namespace
}  // namespace vmad
