// Register blocks of outer products: sums over pairs of rows, kept in registers.
#pragma once

#include "conv_block.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// sums[r][0..NV) += sum over pairs of a[pair][r] * b[pair]; `a` has `step` elements a pair, sums NV vectors a row.
template <int MR, int NV, class T>
inline void outer_block(int64_t pairs, const T* a, int64_t step, const T* b, T* sums) {
  using Vector = typename Simd<T>::Vector;
  constexpr int L = kLanes<T>;
  Vector sum[MR][NV];
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = Vector{};
  for (int64_t i = 0; i < pairs; ++i, a += step, b += NV * L) {
    Vector panel[NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load(b + v * L);
    MWM_UNROLL for (int r = 0; r < MR; ++r) {
      const Vector x = repeat(a[r]);
      MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = fused(x, panel[v], sum[r][v]);
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) 
    store(sums + (r * NV + v) * L, load(sums + (r * NV + v) * L) + sum[r][v]);
}

#if defined(__AVX512BF16__)
// Two pairs at a time: a [pairs / 2][step][2], b [pairs / 2][NV vectors][2].
template <int MR, int NV>
inline void outer_block(int64_t pairs, const BFloat16* a, int64_t step, const BFloat16* b, float* sums) {
  __m512 sum[MR][NV];
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i += 2, a += 2 * step, b += NV * 32) {
    __m512bh panel[NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load_pairs(b + v * 32);
    MWM_UNROLL for (int r = 0; r < MR; ++r) {
      const __m512bh x = repeat_pair(a + 2 * r);
      MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, panel[v]);
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) 
    _mm512_storeu_ps(sums + (r * NV + v) * 16, _mm512_add_ps(_mm512_loadu_ps(sums + (r * NV + v) * 16), sum[r][v]));
}
#endif

// Fewer rows than a full block, chosen at run time.
template <int MR, int NV, class P, class T>
inline void outer_rows(int64_t rows, int64_t pairs, const P* a, int64_t step, const P* b, T* sums) {
  if (rows == MR) return outer_block<MR, NV>(pairs, a, step, b, sums);
  if constexpr (MR > 1) outer_rows<MR - 1, NV>(rows, pairs, a, step, b, sums);
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
