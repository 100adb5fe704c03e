// NEON, which every aarch64 has.
#include <arm_neon.h>

#include "tiles.h"

namespace vmad {
namespace {

struct Vector {
  using Sum = float32x4_t;
  using Operand = float32x4_t;
  using Product = float;
  static constexpr int kLanes = 4;
  static Sum zero() { return vdupq_n_f32(0); }
  static Sum load(const Word* from) { return vreinterpretq_f32_u32(vld1q_u32(from)); }
  static Sum broadcast(const Word* from) { return vreinterpretq_f32_u32(vld1q_dup_u32(from)); }
  static Sum step(Sum sum, Sum query, Sum bank) { return vfmaq_f32(sum, query, bank); }
  static Sum add(Sum a, Sum b) { return vaddq_f32(a, b); }
  static Sum load_sum(const Word* from) { return load(from); }
  static void store(Word* to, Sum sum) { vst1q_u32(to, vreinterpretq_u32_f32(sum)); }
};


}  // namespace

constexpr Tiles neon_float32 = tiles<Vector, 6, 1>();
constexpr Path neon = {"neon", [] { return true; }, &neon_float32, nullptr, nullptr, encode, widen};

}  // namespace vmad
