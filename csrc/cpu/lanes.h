// Vectors of which only the first lanes exist, and of narrower types than the sums: for kernels whose vectors run along channels.
#pragma once

#include "simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// The lanes of a vector of T that exist. Lanes that do not are read as zero and never touched in memory.
template <class T>
struct Lanes {
  Lanes() : count(0) {}
  explicit Lanes(int64_t wanted) : count(static_cast<int>(least<int64_t>(wanted, kLanes<T>))) {}
  int count;
#if defined(__AVX512F__)
  __mmask16 mask() const { return static_cast<__mmask16>((1u << count) - 1u); }
#endif
};

#if defined(__AVX512F__)

typedef uint32_t DoubleWords __attribute__((vector_size(64)));

inline FloatVector load_lanes(const float* from, Lanes<float> lanes) { return (FloatVector)_mm512_maskz_loadu_ps(lanes.mask(), from); }
inline DoubleVector load_lanes(const double* from, Lanes<double> lanes) {
  return (DoubleVector)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.mask()), from);
}
inline FloatVector load_lanes(const BFloat16* from, Lanes<float> lanes) {
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes.mask(), from)), 16);
}
inline FloatVector load_lanes(const Half* from, Lanes<float> lanes) {
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(lanes.mask(), from));
}

inline void store_lanes(float* to, FloatVector x, Lanes<float> lanes) { _mm512_mask_storeu_ps(to, lanes.mask(), (__m512)x); }
inline void store_lanes(double* to, DoubleVector x, Lanes<double> lanes) { _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes.mask()), (__m512d)x); }
inline void store_lanes(BFloat16* to, FloatVector x, Lanes<float> lanes) {
  // As narrow<BFloat16>: the instruction of AVX512-BF16 would take subnormals for zero.
  const DoubleWords bits = (DoubleWords)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  _mm256_mask_storeu_epi16(to, lanes.mask(), _mm512_cvtepi32_epi16((__m512i)(x == x ? rounded : DoubleWords{} + 0x7fc0)));
}
inline void store_lanes(Half* to, FloatVector x, Lanes<float> lanes) {
  _mm256_mask_storeu_epi16(to, lanes.mask(), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

template <class E, class T>
inline typename Simd<T>::Vector load_lanes(const E* from, Lanes<T> lanes) {
  constexpr int L = kLanes<T>;
  if (__builtin_expect(lanes.count == L, 1)) {
    if constexpr (sizeof(E) == sizeof(T)) return load(reinterpret_cast<const T*>(from));
    T values[L];
    for (int i = 0; i < L; ++i) values[i] = widen(from[i]);
    return load(values);
  }
  T values[L] = {};
  for (int i = 0; i < lanes.count; ++i) values[i] = widen(from[i]);
  return load(values);
}

template <class E, class T>
inline void store_lanes(E* to, typename Simd<T>::Vector x, Lanes<T> lanes) {
  T values[kLanes<T>];
  store(values, x);
  for (int i = 0; i < lanes.count; ++i) put(to[i], values[i]);
}

#endif

// The numbers that E has for these.
template <class E>
inline FloatVector rounded(FloatVector x) {
  const Lanes<float> all(kLanes<float>);
  E values[kLanes<float>];
  store_lanes(values, x, all);
  return load_lanes(values, all);
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
