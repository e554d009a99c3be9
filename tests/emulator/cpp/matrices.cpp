// ldmatrix, stmatrix, movmatrix and mma.sync: what a warp does with 8 x 8 matrices of sixteen-bit values.
#include <cstring>

#include "machine.h"
#include "ptx.h"

namespace emu {

namespace {

// Lane 8 m + r addresses row r of matrix m.
uint16_t* row(Warp& warp, const Collective& all, int matrix, int r) {
  const auto address = static_cast<uint32_t>(all.value[8 * matrix + r]);
  if (address % 16) fail("%s: the row address 0x%x is not a multiple of 16", all.kind, address);
  return reinterpret_cast<uint16_t*>(window(*warp.cta, address, 16));
}

// Element `half` of a lane's register: row lane / 4 and column 2 (lane % 4) + half, or the other way round.
uint16_t& element(Warp& warp, const Collective& all, int matrix, int lane, int half, bool transpose) {
  const int major = lane / 4, minor = 2 * (lane % 4) + half;
  return transpose ? row(warp, all, matrix, minor)[major] : row(warp, all, matrix, major)[minor];
}

}  // namespace

void load_matrix(uint32_t smem, int count, bool transpose, uint32_t* const* registers) {
  EMU_ENTER();
  converge(kFull, true, "ldmatrix", static_cast<uint64_t>(count) << 1 | transpose, smem,
           reinterpret_cast<uint64_t>(registers), [](Warp& warp, Collective& all) {
             const int count = static_cast<int>(all.tag >> 1);
             for (int lane = 0; lane < 8 * count; ++lane) {
               generic_access(warp, static_cast<uint32_t>(all.value[lane]), 16, false, warp.lanes[lane]->caller);
             }
             for (int lane = 0; lane < 32; ++lane) {
               for (int matrix = 0; matrix < count; ++matrix) {
                 uint32_t packed = 0;
                 for (int half = 0; half < 2; ++half) {
                   packed |= uint32_t{element(warp, all, matrix, lane, half, all.tag & 1)} << (16 * half);
                 }
                 *reinterpret_cast<uint32_t* const*>(all.extra[lane])[matrix] = packed;
               }
             }
             return true;
           });
}

void store_matrix(uint32_t smem, int count, bool transpose, const uint32_t* registers) {
  EMU_ENTER();
  converge(kFull, true, "stmatrix", static_cast<uint64_t>(count) << 1 | transpose, smem,
           reinterpret_cast<uint64_t>(registers), [](Warp& warp, Collective& all) {
             const int count = static_cast<int>(all.tag >> 1);
             for (int lane = 0; lane < 32; ++lane) {
               // Which thread wrote what is not architected: whoever addressed a row is taken for its writer, and must
               // fence.
               if (lane < 8 * count) {
                 const auto address = static_cast<uint32_t>(all.value[lane]);
                 mark_written(*warp.lanes[lane], address, 16);
                 generic_access(warp, address, 16, true, warp.lanes[lane]->caller);
               }
               for (int matrix = 0; matrix < count; ++matrix) {
                 const uint32_t packed = reinterpret_cast<const uint32_t*>(all.extra[lane])[matrix];
                 for (int half = 0; half < 2; ++half) {
                   element(warp, all, matrix, lane, half, all.tag & 1) = static_cast<uint16_t>(packed >> (16 * half));
                 }
               }
             }
             return true;
           });
}

void transpose_matrix(uint32_t& to, uint32_t from) {
  EMU_ENTER();
  converge(kFull, true, "movmatrix", 0, from, reinterpret_cast<uint64_t>(&to), [](Warp&, Collective& all) {
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t packed = 0;
      for (int half = 0; half < 2; ++half) {  // of row 2 (lane % 4) + half, column lane / 4
        const int from = 4 * (2 * (lane % 4) + half) + lane / 8;
        packed |= (static_cast<uint32_t>(all.value[from]) >> 16 * (lane / 4 % 2) & 0xffff) << 16 * half;
      }
      *reinterpret_cast<uint32_t*>(all.extra[lane]) = packed;
    }
    return true;
  });
}

void mma_m16n8k16(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16) {
  EMU_ENTER();
  struct Operands {
    float* const* d;
    const uint32_t *a, *b;
    const float* c;
  } mine{d, a, b, c};
  converge(kFull, true, "mma.sync", bf16, reinterpret_cast<uint64_t>(&mine), 0, [](Warp&, Collective& all) {
    float a[16][16], b[16][8];
    const auto half = [&](uint32_t packed, int which) {
      return all.tag ? half_of<true>(packed, which) : half_of<false>(packed, which);
    };
    const auto of = [&](int lane) -> const Operands& { return *reinterpret_cast<const Operands*>(all.value[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i)
          a[lane / 4 + 8 * (i & 1)][2 * (lane & 3) + 8 * (i >> 1) + h] = half(of(lane).a[i], h);
        for (int i = 0; i < 2; ++i) b[2 * (lane & 3) + 8 * i + h][lane / 4] = half(of(lane).b[i], h);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
        float sum = of(lane).c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        *of(lane).d[i] = sum;
      }
    }
    return true;
  });
}

}  // namespace emu
