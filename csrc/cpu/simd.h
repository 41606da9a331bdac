// Vectors of the widest kind that the instruction set has, for the kernels that are written by hand.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// kPanelVectors vectors side by side and kBlockRows rows fill the register file without spilling.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kPanelVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPanelVectors = 2;
#else
constexpr int kVectorBytes = 16, kPanelVectors = 2;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));

template <class T> struct Simd;
template <> struct Simd<float> { using Vector = FloatVector; };
template <> struct Simd<double> { using Vector = DoubleVector; };

template <class T> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T> constexpr int kPanel = kPanelVectors * kLanes<T>;

template <class T>
inline typename Simd<T>::Vector load(const T* from) {
  typename Simd<T>::Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, typename Simd<T>::Vector v) { std::memcpy(to, &v, sizeof v); }

template <class T>
inline typename Simd<T>::Vector repeat(T x) { return x - typename Simd<T>::Vector{}; }

// a * b + c, with one rounding where the machine has it. The build forbids the compiler to contract on its own.
inline FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline DoubleVector fused(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return (DoubleVector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (DoubleVector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
#if defined(__clang__)
#define MWM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MWM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif

// A square of 4 x 4 words of four bytes, from four rows to four rows `to_step` elements apart.
template <class E, class P>
inline void transpose(const E* first, const E* second, const E* third, const E* fourth, P* to, int64_t to_step) {
  Four a, b, c, d;
  std::memcpy(&a, first, 16);
  std::memcpy(&b, second, 16);
  std::memcpy(&c, third, 16);
  std::memcpy(&d, fourth, 16);
  const Four ab0 = MWM_SHUFFLE(a, b, 0, 4, 1, 5), ab1 = MWM_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd0 = MWM_SHUFFLE(c, d, 0, 4, 1, 5), cd1 = MWM_SHUFFLE(c, d, 2, 6, 3, 7);
  const Four rows[4] = {MWM_SHUFFLE(ab0, cd0, 0, 1, 4, 5), MWM_SHUFFLE(ab0, cd0, 2, 3, 6, 7), MWM_SHUFFLE(ab1, cd1, 0, 1, 4, 5),
                        MWM_SHUFFLE(ab1, cd1, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_step, &rows[i], 16);
}

// Rows that a register block holds for a panel of `vectors` vectors.
constexpr int block_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
#elif defined(__AVX2__)
  return vectors == 2 ? 6 : 10;
#else
  return vectors == 2 ? 4 : 8;
#endif
}

constexpr int kMaxBlockRows = 12;

#define MWM_UNROLL _Pragma("GCC unroll 16")

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
