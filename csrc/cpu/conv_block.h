// Register blocks: rows of features times a panel of filters, sums kept in registers over `depth` inputs.
#pragma once

#include "simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// sums[r] += a[r][0..depth) * b, b [depth][NV vectors]; kFresh: sums[r] = that. The block is summed on its own first, which keeps
// rounding errors small.
template <int MR, int NV, bool kFresh = false, class T>
inline void multiply_block(int64_t depth, const T* const* a, const T* b, T* const* sums) {
  using Vector = typename Simd<T>::Vector;
  constexpr int L = kLanes<T>;
  Vector sum[MR][NV];
  const T* row[MR];
  MWM_UNROLL for (int r = 0; r < MR; ++r) {
    row[r] = a[r];
    MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = Vector{};
  }
  for (int64_t p = 0; p < depth; ++p, b += NV * L) {
    Vector panel[NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load(b + v * L);
    MWM_UNROLL for (int r = 0; r < MR; ++r) {
      const Vector x = repeat(row[r][p]);
      MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = fused(x, panel[v], sum[r][v]);
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) 
    store(sums[r] + v * L, kFresh ? sum[r][v] : load(sums[r] + v * L) + sum[r][v]);
}

#if defined(__AVX512BF16__)
inline __m512bh load_pairs(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline int32_t load_word(const BFloat16* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

inline __m512bh repeat_pair(const BFloat16* from) { return (__m512bh)_mm512_set1_epi32(load_word(from)); }

// The same on pairs of bfloat16: depth counts inputs and is even, b [depth / 2][NV vectors of pairs].
template <int MR, int NV>
inline void multiply_block(int64_t depth, const BFloat16* const* a, const BFloat16* b, float* const* sums) {
  __m512 sum[MR][NV];
  const BFloat16* row[MR];
  MWM_UNROLL for (int r = 0; r < MR; ++r) {
    row[r] = a[r];
    MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < depth; p += 2, b += NV * 32) {
    __m512bh panel[NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load_pairs(b + v * 32);
    MWM_UNROLL for (int r = 0; r < MR; ++r) {
      const __m512bh x = repeat_pair(row[r] + p);
      MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, panel[v]);
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) 
    _mm512_storeu_ps(sums[r] + v * 16, _mm512_add_ps(_mm512_loadu_ps(sums[r] + v * 16), sum[r][v]));
}
#endif

// Calls function(std::integral_constant-like of the number of vectors).
template <int N> struct Count { static constexpr int value = N; };

template <class Function>
inline void with_vectors(int vectors, const Function& function) {
  switch (vectors) {
    case 1: return function(Count<1>{});
    case 2: return function(Count<2>{});
#if defined(__AVX512F__)
    case 3: return function(Count<3>{});
    case 4: return function(Count<4>{});
#endif
  }
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
