// AMX: tiles of 16 rows of 64 bytes, which are a line of 16 query rows and 16 lines of a panel just as they stand.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace vmad {
namespace {

struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// 2 × 2 tiles of products (0 to 3) of two of the query (4, 5) and two panels (6, 7).
template <bool kBytes>
void multiply(const Line* query, Index rows, const Line* const* panels, Index brick, Index bricks, bool first,
              Line* products) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (Index row = 0; row < rows; row += 32) {
    Line* out = products + row * 2;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, out, 128);
      _tile_loadd(1, out + 1, 128);
      _tile_loadd(2, out + 32, 128);
      _tile_loadd(3, out + 33, 128);
    }
    for (Index b = brick; b < brick + bricks; ++b) {
      const Line* q = query + b * rows + row;
      _tile_loadd(4, q, 64);
      _tile_loadd(6, panels[0] + b * 16, 64);
      _tile_loadd(7, panels[1] + b * 16, 64);
      _tile_loadd(5, q + 16, 64);
      if constexpr (kBytes) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 1, 128);
    _tile_stored(2, out + 32, 128);
    _tile_stored(3, out + 33, 128);
  }
  _tile_release();
}

constexpr Tiles kBfloat16 = {32, 2, 0, 0, multiply<false>, keep_best<float>, keep_ranked<float>};
constexpr Tiles kInt8 = {32, 2, 0, 0, multiply<true>, keep_best<std::int32_t>, keep_ranked<std::int32_t>};

/// The processor has it, and the kernel lets this process use the tile registers.
bool runs() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return avx512_bf16.runs() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

constexpr Path amx = {"amx", runs, &avx512_float32, &kBfloat16, &kInt8, encode, widen};

}  // namespace vmad
