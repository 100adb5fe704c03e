// C++ for any processor.
#include "tiles.h"

namespace vmad {
namespace {

struct Vector {
  using Sum = float __attribute__((vector_size(16)));
  using Operand = Sum;
  using Product = float;
  static constexpr int kLanes = 4;
  static Sum zero() { return Sum{}; }
  static Sum load(const Word* from) {
    Sum out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  static Sum broadcast(const Word* from) { return as_float(*from) - Sum{}; }
  static Sum step(Sum sum, Sum query, Sum bank) { return sum + query * bank; }
  static Sum add(Sum a, Sum b) { return a + b; }
  static Sum load_sum(const Word* from) { return load(from); }
  static void store(Word* to, Sum sum) { std::memcpy(to, &sum, sizeof sum); }
};

constexpr Tiles kFloat32 = tiles<Vector, 2, 1>();

}  // namespace

constexpr Path plain = {"plain", [] { return true; }, &kFloat32, nullptr, nullptr, encode, widen};

}  // namespace vmad
