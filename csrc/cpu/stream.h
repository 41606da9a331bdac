// Stores past the caches.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// Maps larger than this leave the caches before they are read again. They are written past them, which spares the memory the
// reading of every line that is about to be overwritten.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int64_t kLine = 64;

// Writes whole cache lines.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine, from += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32)));
#else
    std::memcpy(to + i, from, kLine);
#endif
  }
}

// Before other threads may read what was streamed.
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
