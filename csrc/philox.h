// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, SC 2011), sixteen counters at a time. Integers only, so
// the words are the same on every instruction set.
#pragma once

#include <cstdint>

#include "philox_scalar.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mwm {
namespace {

constexpr int kPhiloxLanes = 16;

#if defined(__AVX512F__)
using Words = __m512i;
inline Words philox_load(const uint32_t* from) { return _mm512_loadu_si512(from); }
inline void philox_store(uint32_t* to, Words x) { _mm512_storeu_si512(to, x); }
inline Words philox_all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Words philox_xor(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline void philox_multiply(Words a, Words m, Words& high, Words& low) {
  const Words even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
#elif defined(__AVX2__)
using Words = __m256i;
inline Words philox_load(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void philox_store(uint32_t* to, Words x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
inline Words philox_all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Words philox_xor(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void philox_multiply(Words a, Words m, Words& high, Words& low) {
  const Words even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
#else
struct Words { uint32_t lane[4]; };
inline Words philox_load(const uint32_t* from) { return {{from[0], from[1], from[2], from[3]}}; }
inline void philox_store(uint32_t* to, Words x) { for (int i = 0; i < 4; ++i) to[i] = x.lane[i]; }
inline Words philox_all(uint32_t x) { return {{x, x, x, x}}; }
inline Words philox_xor(Words a, Words b, Words c) {
  Words out;
  for (int i = 0; i < 4; ++i) out.lane[i] = a.lane[i] ^ b.lane[i] ^ c.lane[i];
  return out;
}
inline void philox_multiply(Words a, Words m, Words& high, Words& low) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.lane[i]) * m.lane[i];
    high.lane[i] = static_cast<uint32_t>(product >> 32);
    low.lane[i] = static_cast<uint32_t>(product);
  }
}
#endif

// out[w][i] = word w of the counter (c0[i], c1, c2, c3[i]).
inline void philox16(const uint32_t* c0, uint32_t c1, uint32_t c2, const uint32_t* c3, uint64_t key, uint32_t out[4][kPhiloxLanes]) {
  constexpr int kWidth = static_cast<int>(sizeof(Words) / sizeof(uint32_t));
  const Words m0 = philox_all(kPhiloxMultiplier0), m1 = philox_all(kPhiloxMultiplier1);
  for (int lane = 0; lane < kPhiloxLanes; lane += kWidth) {
    Words x0 = philox_load(c0 + lane), x1 = philox_all(c1), x2 = philox_all(c2), x3 = philox_load(c3 + lane);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      Words high0, low0, high1, low1;
      philox_multiply(x0, m0, high0, low0);
      philox_multiply(x2, m1, high1, low1);
      x0 = philox_xor(high1, x1, philox_all(k0));
      x1 = low1;
      x2 = philox_xor(high0, x3, philox_all(k1));
      x3 = low0;
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
    philox_store(out[0] + lane, x0);
    philox_store(out[1] + lane, x1);
    philox_store(out[2] + lane, x2);
    philox_store(out[3] + lane, x3);
  }
}

// Counter of each lane in philox_words: with this order the words come out in sequence from unpacking inside 128-bit lanes.
inline int philox_counter_of_lane(int lane) { return lane % 4 * 4 + lane / 4; }

// words[4 * i + w] = word w of the counter (first + i, c1, c2, tail) for i in [0, 16). Where `last_tail` differs from tail, the last
// counter is (0, c1, c2, last_tail) instead: a second stream for free, when there is room.
inline void philox_words(uint32_t first, uint32_t c1, uint32_t c2, uint32_t tail, uint32_t last_tail, uint64_t key, uint32_t* words) {
  alignas(64) uint32_t c0[kPhiloxLanes], c3[kPhiloxLanes], out[4][kPhiloxLanes];
  for (int lane = 0; lane < kPhiloxLanes; ++lane) c0[lane] = first + static_cast<uint32_t>(philox_counter_of_lane(lane)), c3[lane] = tail;
  if (last_tail != tail) c0[kPhiloxLanes - 1] = 0, c3[kPhiloxLanes - 1] = last_tail;
  philox16(c0, c1, c2, c3, key, out);
#if defined(__AVX512F__)
  const __m512i a = philox_load(out[0]), b = philox_load(out[1]), c = philox_load(out[2]), d = philox_load(out[3]);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
  philox_store(words, _mm512_unpacklo_epi64(ab, cd));
  philox_store(words + 16, _mm512_unpackhi_epi64(ab, cd));
  philox_store(words + 32, _mm512_unpacklo_epi64(ab2, cd2));
  philox_store(words + 48, _mm512_unpackhi_epi64(ab2, cd2));
#else
  for (int lane = 0; lane < kPhiloxLanes; ++lane)
    for (int w = 0; w < 4; ++w) words[4 * philox_counter_of_lane(lane) + w] = out[w][lane];
#endif
}

}  // namespace
}  // namespace mwm
