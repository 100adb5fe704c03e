// NEON's dot products of bytes (Armv8.2: Jetson Xavier, Orin and later).
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "tiles.h"

namespace vmad {
namespace {

struct Vector {
  using Sum = int32x4_t;
  using Operand = int8x16_t;
  using Product = std::int32_t;
  static constexpr int kLanes = 4;
  static Sum zero() { return vdupq_n_s32(0); }
  static Operand load(const Word* from) { return vreinterpretq_s8_u32(vld1q_u32(from)); }
  static Operand broadcast(const Word* from) { return vreinterpretq_s8_u32(vld1q_dup_u32(from)); }
  static Sum step(Sum sum, Operand query, Operand bank) { return vdotq_s32(sum, query, bank); }
  static Sum add(Sum a, Sum b) { return vaddq_s32(a, b); }
  static Sum load_sum(const Word* from) { return vreinterpretq_s32_u32(vld1q_u32(from)); }
  static void store(Word* to, Sum sum) { vst1q_u32(to, vreinterpretq_u32_s32(sum)); }
};

constexpr Tiles kInt8 = tiles<Vector, 6, 1>();
bool runs() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

}  // namespace

constexpr Path neon_dot = {"neon_dot", runs, &neon_float32, nullptr, &kInt8, encode, widen};

}  // namespace vmad
