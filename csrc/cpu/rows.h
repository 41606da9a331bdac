// Rows of channels-last maps, read and written a vector of channels at a time in the type that sums are taken in.
#pragma once

#include "conv_window.h"
#include "simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// `Lanes<E, true>`: a full vector; `Lanes<E, false>`: a single channel, for what does not fill one.
template <class E, bool kFull>
struct Lanes {
  using T = typename Wide<E>::type;
  using V = typename Simd<T>::Vector;
  static constexpr int64_t count = kLanes<T>;

  static V load(const E* from) {
    if constexpr (sizeof(E) == sizeof(T)) {
      return MWM_ISA::load(reinterpret_cast<const T*>(from));
    } else {
#if defined(__AVX512F__)
      if constexpr (sizeof(E) == 2) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if constexpr (__is_same(E, BFloat16)) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        else return (V)_mm512_cvtph_ps(bits);
      }
#endif
      T wide[count];
      for (int64_t i = 0; i < count; ++i) wide[i] = widen(from[i]);
      return MWM_ISA::load(wide);
    }
  }
  static void store(E* to, V v) {
    if constexpr (sizeof(E) == sizeof(T)) {
      MWM_ISA::store(reinterpret_cast<T*>(to), v);
    } else {
#if defined(__AVX512F__)
      if constexpr (__is_same(E, Half)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return;
      }
      if constexpr (__is_same(E, BFloat16)) {
        // As narrow() rounds, to nearest even; the instruction for it would flush subnormals.
        const __m512i bits = (__m512i)v;
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        high = _mm512_mask_set1_epi32(high, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), 0x7fc0);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
        return;
      }
#endif
      T wide[count];
      MWM_ISA::store(wide, v);
      for (int64_t i = 0; i < count; ++i) put(to[i], wide[i]);
    }
  }
  // A store past the caches, to an address that is a multiple of `kStreamAlign`; `finish_streaming` before others read it.
  static constexpr int64_t kStreamAlign = count * int64_t{sizeof(E)};
  static void stream(E* to, V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(E) == sizeof(T)) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
    } else {
      alignas(32) E narrow[count];
      store(narrow, v);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(reinterpret_cast<const __m256i*>(narrow)));
    }
#else
    store(to, v);
#endif
  }
  static V load_wide(const T* from) { return MWM_ISA::load(from); }
  static void store_wide(T* to, V v) { MWM_ISA::store(to, v); }
  static V zero() { return V{}; }
  static V all(T x) { return repeat(x); }
  static V multiply_add(V a, V b, V c) { return fused(a, b, c); }
  // `then` where x < bound (false for NaN), else `otherwise`.
  static V where_below(V x, V bound, V then, V otherwise) { return x < bound ? then : otherwise; }
  static V where_at_most(V x, V bound, V then, V otherwise) { return x <= bound ? then : otherwise; }
};

template <class E>
struct Lanes<E, false> {
  using T = typename Wide<E>::type;
  using V = T;
  static constexpr int64_t count = 1;

  static V load(const E* from) { return widen(*from); }
  static void store(E* to, V v) { put(*to, v); }
  static void stream(E* to, V v) { store(to, v); }
  static V load_wide(const T* from) { return *from; }
  static void store_wide(T* to, V v) { *to = v; }
  static V zero() { return T{}; }
  static V all(T x) { return x; }
  // The vector's operation, so that a channel's result does not depend on where it falls.
  static V multiply_add(V a, V b, V c) {
#if defined(__FMA__)
    if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
    else return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  static V where_below(V x, V bound, V then, V otherwise) { return x < bound ? then : otherwise; }
  static V where_at_most(V x, V bound, V then, V otherwise) { return x <= bound ? then : otherwise; }
};

// Calls function(Lanes, channel) for every vector of channels in [begin, end), then for the single ones left.
template <class E, class Function>
inline void for_lanes(int64_t begin, int64_t end, const Function& function) {
  using Full = Lanes<E, true>;
  int64_t c = begin;
  for (; c + Full::count <= end; c += Full::count) function(Full{}, c);
  for (; c < end; ++c) function(Lanes<E, false>{}, c);
}

// The same with several vectors side by side, function(Lanes, Group<n>, channel): rows are then read in longer runs, as memory likes.
template <int N> struct Group { static constexpr int value = N; };

template <class E, class Function>
inline void for_groups(int64_t begin, int64_t end, const Function& function) {
  using Full = Lanes<E, true>;
  constexpr int kGroup = 4;
  int64_t c = begin;
  for (; c + kGroup * Full::count <= end; c += kGroup * Full::count) function(Full{}, Group<kGroup>{}, c);
  switch ((end - c) / Full::count) {
    case 3: function(Full{}, Group<3>{}, c); c += 3 * Full::count; break;
    case 2: function(Full{}, Group<2>{}, c); c += 2 * Full::count; break;
    case 1: function(Full{}, Group<1>{}, c); c += Full::count; break;
  }
  for (; c < end; ++c) function(Lanes<E, false>{}, Group<1>{}, c);
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
